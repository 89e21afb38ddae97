"""The models that a run begins from: it goes on with the same ones or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ldm.errors import user_input
from ldm.files import write_text
from ldm.interchange.fingerprint import base_model_hash, check_base_model

FILE = "bases.json"


def claim_bases(folder: Path, bases: Mapping[str, str | None], *, resumed: bool) -> None:
    """Note in the run folder which models the run begins from, or check them when it is resumed.

    `bases` are paths by config key, None where there is none. Frozen parts are not in the checkpoints, so with another
    model at the same path a resumed run would be neither the old one nor a new one. Raises `UserError` naming the key.
    """
    path = folder / FILE
    named = {key: base for key, base in bases.items() if base is not None}
    if resumed and path.exists():
        with user_input(str(path)):
            hashes = json.loads(path.read_text(encoding="utf-8"))
        for key, base in named.items():
            if key in hashes:
                check_base_model(base, hashes[key], what=key)
        return
    write_text(path, json.dumps({key: base_model_hash(base) for key, base in named.items()}, indent=2) + "\n")

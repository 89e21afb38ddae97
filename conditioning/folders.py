"""Where a pretrained model lies: a local folder, which is never looked up on the network, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def pretrained_location(name: str, subfolder: str, marker: str = "config.json") -> dict[str, Any]:
    """The arguments by which diffusers' and transformers' `from_pretrained` find `name`.

    `name` is a folder or a hub id, either of a whole pipeline, whose part in `subfolder` is meant, or of that part
    alone; `marker` is the file that tells the part is there. A folder that exists is never looked up on the network.
    Raises FileNotFoundError when `name` is neither a folder nor of a hub id's form, owner/name.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        inner = folder / subfolder
        found = inner if (inner / marker).is_file() else folder
        if not (found / marker).is_file():
            raise FileNotFoundError(
                f"pretrained: found no {marker} in {inner} or {folder}; it must have one; check the path"
            )
        return {"pretrained_model_name_or_path": str(found), "local_files_only": True}
    if not looks_like_hub_id(name):
        raise FileNotFoundError(
            f"pretrained: found {name!r}, which does not exist; "
            "allowed is an existing folder or a hub id of the form owner/name; check the path"
        )
    return {"pretrained_model_name_or_path": name, "subfolder": subfolder if _on_hub(name, subfolder, marker) else ""}


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` is of the form owner/name and no local path: its owner is no folder here."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).parent.is_dir()


def _on_hub(name: str, subfolder: str, marker: str) -> bool:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(name, f"{subfolder}/{marker}")
    except EntryNotFoundError:  # also when offline and not in the cache; then loading says so
        return False
    return True

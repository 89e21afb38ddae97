"""Where a pretrained model lies: a local folder, which is never looked up on the network, or a hub id."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PROGRAMS = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code")
"""Keys by which diffusers and transformers take code from a folder or from the hub."""
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""What a config may ask for; any other name is looked up on the hub, as a kernel to fetch."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def pretrained_location(name: str, subfolder: str, marker: str = "config.json") -> dict[str, Any]:
    """The arguments by which diffusers' and transformers' `from_pretrained` find `name`.

    `name` is a folder or a hub id, either of a whole pipeline, whose part in `subfolder` is meant, or of that part
    alone; `marker` is the file that tells the part is there. A folder that exists is never looked up on the network.
    Raises FileNotFoundError when `name` is neither a folder nor of a hub id's form, owner/name, and ValueError for a
    folder as in `check_stays_inside`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        inner = folder / subfolder
        found = inner if (inner / marker).is_file() else folder
        if not (found / marker).is_file():
            raise FileNotFoundError(
                f"pretrained: found no {marker} in {inner} or {folder}; it must have one; check the path"
            )
        check_stays_inside(found)
        return {"pretrained_model_name_or_path": str(found), "local_files_only": True}
    if not looks_like_hub_id(name):
        raise FileNotFoundError(
            f"pretrained: found {name!r}, which does not exist; "
            "allowed is an existing folder or a hub id of the form owner/name; check the path"
        )
    return {"pretrained_model_name_or_path": name, "subfolder": subfolder if _on_hub(name, subfolder, marker) else ""}


def check_stays_inside(folder: Path) -> None:
    """Raise ValueError, naming the file, if a part of a model would have a library run a program or look elsewhere.

    transformers loads the model that an `adapter_config.json` names in place of the one asked for, and a kernel that an
    `attn_implementation` names; a sharded model's index names files. The hub's cache, where every file is a link into
    `blobs`, counts as inside.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: found adapter_config.json, which names another model to load; remove it")
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(("config.json", "index.json")):
            for wrong in _reaching(_table(path), folder):
                raise ValueError(f"{path}: found {wrong}; allowed is a model that needs nothing else; do not use it")


def _reaching(table: dict[str, Any], folder: Path) -> Iterator[str]:
    """What in a config or an index runs or reads something that is not the folder's own."""
    for key, value in table.items():
        if key in _PROGRAMS and value:
            yield f"{key}, which names a program to run"
        if "attn_implementation" in key and value not in (None, *_ATTENTION):
            yield f"{key} {value!r}, which is to be fetched and run"
    files = table.get("fast_tokenizer_files") or []
    shards = table.get("weight_map")
    names = [*(files if isinstance(files, list) else []), *(shards.values() if isinstance(shards, dict) else [])]
    for name in dict.fromkeys(map(str, names)):
        if Path(name).name != name or not _is_inside(folder / name, folder):
            yield f"the file {name!r}, which is not in that folder"


def _is_inside(path: Path, folder: Path) -> bool:
    homes = [folder.resolve()]
    homes += [above.parent.resolve() / "blobs" for above in folder.absolute().parents if above.name == "snapshots"]
    return any(path.resolve().is_relative_to(home) for home in homes)


def _table(path: Path) -> dict[str, Any]:
    """The table in a JSON file; empty for what is none, which the libraries refuse."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


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

"""Fine-tuning on a few images is refused when no caption names what is to be learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm.config import build
from ldm.data.folder import FolderSource
from ldm.errors import UserError
from ldm.training.captions import check_captions
from ldm.training.stage2_config import Stage2Config

WORD = {"textual_inversion": {"token": "<mine>", "initial": "toy"}}


def config(**changes: Any) -> Stage2Config:
    values = {"out": "o", "data": {}, "training": {"steps": 1, "batch_size": 1}, "model": "M"}
    return build(Stage2Config, {**values, "conditions": {"text": {"encoder": "model"}}, **changes})


def source(folder: Path, *captions: str) -> FolderSource:
    for number, _ in enumerate(captions):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return FolderSource(folder)


@pytest.mark.parametrize(
    ("changes", "captions", "message"),
    [
        (WORD, ("a toy", "a mine"), "textual_inversion.token: found <mine> in none of the captions"),
        (WORD, ("a toy", "a <MINE>"), None),
        ({"prior": {}}, ("", ""), "data: found no captions; with prior"),
        ({"prior": {}}, ("", "a zwx dog"), None),
        ({}, ("", ""), None),
    ],
)
def test_captions_must_name_what_is_to_be_learned(
    tmp_path: Path, changes: dict[str, Any], captions: tuple[str, ...], message: str | None
) -> None:
    if message is None:
        check_captions(source(tmp_path, *captions), config(**changes))
        return
    with pytest.raises(UserError) as error:
        check_captions(source(tmp_path, *captions), config(**changes))
    assert message in str(error.value)

"""Labels by number and name, the row for "unknown", and the round trip."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conditioning.label import LabelConfig, LabelEncoder

NAMES = ("apple", "Bicycle", "hot dog")


def test_each_label_has_its_row_and_unknown_the_last() -> None:
    encoder = LabelEncoder(NAMES, 6)
    embedded = encoder(torch.tensor([2, -1, 0, 2]))
    assert embedded.shape == (4, 6) and encoder.width == 6
    assert torch.equal(embedded, encoder.embedding.weight[[2, 3, 0, 2]])
    assert torch.equal(encoder(encoder.unknown_labels(2)), encoder.embedding.weight[[3, 3]])
    assert encoder.unknown_labels(2).dtype == torch.int64


def test_the_labels_given_are_left_alone() -> None:
    labels = torch.tensor([-1, 1])
    LabelEncoder(NAMES, 4)(labels)
    assert labels.tolist() == [-1, 1]


def test_only_the_rows_used_learn() -> None:
    encoder = LabelEncoder(NAMES, 4)
    encoder(torch.tensor([1, -1])).sum().backward()
    assert encoder.embedding.weight.grad is not None
    assert encoder.embedding.weight.grad.sum(dim=1).tolist() == [0, 4, 0, 4]


@pytest.mark.parametrize("value", [3, -2, 1000])
def test_numbers_out_of_range(value: int) -> None:
    encoder = LabelEncoder(NAMES, 4)
    with pytest.raises(ValueError, match=rf"label: found {value}; allowed is 0 \(apple\) to 2 \(hot dog\), or -1"):
        encoder(torch.tensor([0, value]))
    for label in (value, str(value)):
        with pytest.raises(ValueError, match=rf"label: found {value}; allowed is 0 \(apple\) to 2 \(hot dog\)"):
            encoder.index_of(label)


def test_names_and_numbers() -> None:
    encoder = LabelEncoder(NAMES, 4)
    assert [encoder.index_of(name) for name in NAMES] == [0, 1, 2]
    assert [encoder.index_of(label) for label in (0, 2, "1", " hot dog ", np.int64(2))] == [0, 2, 1, 2, 2]
    assert LabelEncoder(("1", "0"), 4).index_of("1") == 0  # a name goes before a number


def test_unknown_names_tell_the_nearest_and_the_range() -> None:
    encoder = LabelEncoder(NAMES, 4)
    with pytest.raises(
        ValueError, match=r"found 'bicycel', nearest is 'Bicycle'; allowed is a name or 0 \(apple\) to 2"
    ):
        encoder.index_of("bicycel")
    with pytest.raises(ValueError, match=r"found 'zzz'; allowed is a name or 0 \(apple\) to 2 \(hot dog\)"):
        encoder.index_of("zzz")
    with pytest.raises(TypeError):
        encoder.index_of(1.5)  # type: ignore[arg-type]


def test_configuration_errors() -> None:
    with pytest.raises(ValueError, match=r"^classes: found 0; allowed is 1 or more, or null"):
        LabelConfig(classes=0)
    for build in (lambda: LabelConfig(width=0), lambda: LabelEncoder(NAMES, 0)):
        with pytest.raises(ValueError, match=r"^width: found 0; allowed is 1 or more"):
            build()
    with pytest.raises(ValueError, match=r"^dropout: found -0.1; allowed is 0 to 1"):
        LabelConfig(dropout=-0.1)
    with pytest.raises(ValueError, match=r"^classes: found none"):
        LabelEncoder((), 4)
    with pytest.raises(ValueError, match=r"^classes: found 'a' twice"):
        LabelEncoder(("a", "b", "a"), 4)


def test_round_trip(tmp_path: Path) -> None:
    encoder = LabelEncoder(NAMES, 6)
    encoder.save_pretrained(tmp_path)
    names = sorted(path.name for path in (tmp_path / "label_encoder").iterdir())
    assert names == ["config.json", "model.safetensors"]
    state = torch.get_rng_state()
    loaded = LabelEncoder.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.classes == NAMES
    assert torch.equal(loaded.embedding.weight, encoder.embedding.weight)


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file"):
        LabelEncoder.from_pretrained(tmp_path)
    LabelEncoder(NAMES, 6).save_pretrained(tmp_path)
    config = tmp_path / "label_encoder" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "width": 7}))
    with pytest.raises(ValueError, match=r"found the weights .*\[4, 6\].*needs .*\[4, 7\]"):
        LabelEncoder.from_pretrained(tmp_path)
    config.write_text(json.dumps({**values, "classes": [1, 2, 3]}))
    with pytest.raises(ValueError, match=r"found classes \[1, 2, 3\] and width 6"):
        LabelEncoder.from_pretrained(tmp_path)

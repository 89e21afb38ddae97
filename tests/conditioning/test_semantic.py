"""The reduction against brute force, the encoder's round trip, and index maps from files."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from conditioning.class_file import UNKNOWN_CLASS
from conditioning.semantic import SemanticConfig, SemanticEncoder, read_map


def encoder_of(classes: int, channels: int = 4) -> SemanticEncoder:
    return SemanticEncoder(tuple(f"class {i}" for i in range(classes)), channels)


def random_maps(shape: tuple[int, ...], classes: int, seed: int) -> Tensor:
    maps = torch.randint(0, classes + 1, shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(maps == classes, UNKNOWN_CLASS, maps)


def brute_force(maps: Tensor, classes: int, height: int, width: int) -> Tensor:
    """Each pixel is split into as many parts as there are cells along an axis; the parts then fill cells exactly."""
    one_hot = F.one_hot(torch.where(maps == UNKNOWN_CLASS, classes, maps), classes + 1).permute(0, 3, 1, 2).double()
    fine = one_hot.repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
    return F.avg_pool2d(fine, (maps.shape[1], maps.shape[2]))


sizes = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=80, deadline=None)
@given(size=sizes, classes=st.integers(1, 7), seed=st.integers(0, 2**32))
def test_shares_are_brute_force(size: tuple[int, int, int, int], classes: int, seed: int) -> None:
    rows, columns, height, width = size
    maps = random_maps((2, rows, columns), classes, seed)
    shares = encoder_of(classes).shares(maps, height, width)
    expected = brute_force(maps, classes, height, width)
    assert shares.shape == (2, classes + 1, height, width)
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2, height, width), rtol=0, atol=1e-6)
    assert torch.equal(shares == 0, expected == 0)  # no class where it is not, none lost where it is


@pytest.mark.parametrize("size", [(64, 48, 8, 6), (50, 37, 7, 5), (8, 8, 8, 8), (5, 6, 10, 9)])
def test_the_embedding_is_the_mixture_of_the_classes_inside(size: tuple[int, int, int, int]) -> None:
    rows, columns, height, width = size
    encoder = encoder_of(5, channels=3)
    maps = random_maps((2, rows, columns), 5, 0)
    embedded = encoder(maps, height, width)
    expected = torch.einsum(
        "bkhw,sk->bshw", brute_force(maps, 5, height, width).float(), encoder.projection.weight[:, :, 0, 0]
    )
    assert embedded.shape == (2, 3, height, width)
    torch.testing.assert_close(embedded, expected)


def test_a_region_of_one_class_is_that_classs_embedding_and_nothing_lies_between() -> None:
    """Between classes 0 and 4 a mean of the indices would be 2: here 2 has no share."""
    encoder = encoder_of(5)
    maps = torch.zeros(1, 16, 16, dtype=torch.int64)
    maps[:, :, 4:] = 4
    shares = encoder.shares(maps, 2, 2)
    assert shares[0, :, 0, 0].tolist() == [0.5, 0, 0, 0, 0.5, 0]
    assert shares[0, :, 0, 1].tolist() == [0, 0, 0, 0, 1, 0]
    assert torch.equal(encoder(maps, 2, 2)[0, :, 0, 1], encoder.projection.weight[:, 4, 0, 0])


def test_unknown_is_a_class_of_its_own() -> None:
    encoder = encoder_of(3)
    unknown = encoder.unknown_map(2, 20, 31)
    assert unknown.dtype == torch.int64 and unknown.shape == (2, 20, 31) and (unknown == 255).all()
    embedded = encoder(torch.full((2, 20, 31), 255), 3, 4)
    assert torch.equal(embedded, encoder(unknown, 3, 4))
    torch.testing.assert_close(embedded, encoder.projection.weight[:, 3, 0, 0].view(1, -1, 1, 1).expand(2, -1, 3, 4))
    known = encoder(torch.zeros(1, 20, 31, dtype=torch.int64), 3, 4)
    assert not torch.allclose(known, embedded[:1])


def test_255_classes_leave_room_for_unknown() -> None:
    encoder = encoder_of(255, channels=2)
    shares = encoder.shares(torch.tensor([[[254, 255]]]), 1, 2)
    assert shares[0, 254, 0].tolist() == [1, 0]
    assert shares[0, 255, 0].tolist() == [0, 1]


def test_gradients_reach_the_embedding_and_the_type_is_the_weights() -> None:
    encoder = encoder_of(3).double()
    embedded = encoder(random_maps((1, 8, 8), 3, 0), 2, 2)
    assert embedded.dtype == torch.float64
    embedded.sum().backward()
    assert encoder.projection.weight.grad is not None and encoder.projection.weight.grad.abs().sum() > 0


def test_classes_out_of_range_are_named() -> None:
    encoder = encoder_of(12)
    encoder.check(torch.tensor([0, 11, 255]))
    message = "semantic map: found class 300; allowed is 0 to 11, or 255 for unknown; "
    with pytest.raises(ValueError, match=message):
        encoder.check(torch.tensor([[0, 300], [300, 11]]))
    with pytest.raises(ValueError, match=message):
        encoder(torch.full((1, 4, 4), 300), 2, 2)
    with pytest.raises(ValueError, match="found class -1, 12, 254; allowed is 0 to 11"):
        encoder.check(torch.tensor([12, -1, 254, 3]))


def test_configuration_errors() -> None:
    for build in (lambda: SemanticConfig(channels=0), lambda: encoder_of(2, channels=0)):
        with pytest.raises(ValueError, match=r"^channels: found 0; allowed is 1 or more"):
            build()
    with pytest.raises(ValueError, match=r"^dropout: found 1.5; allowed is 0 to 1"):
        SemanticConfig(dropout=1.5)
    for number in (0, 256):
        with pytest.raises(ValueError, match=f"^classes: found {number}; allowed is 1 to 255"):
            encoder_of(number)


# --- on disk ---


def test_round_trip(tmp_path: Path) -> None:
    encoder = SemanticEncoder(("sky", "hot dog", "Bäume 樹"), 5)
    encoder.save_pretrained(tmp_path)
    assert sorted(path.name for path in (tmp_path / "semantic_encoder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    state = torch.get_rng_state()
    loaded = SemanticEncoder.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)  # no weights are drawn only to be replaced
    assert loaded.classes == encoder.classes and loaded.channels == 5
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for name, weight in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    loaded.save_pretrained(tmp_path)  # over the files that it was read from
    again = SemanticEncoder.from_pretrained(tmp_path)
    assert torch.equal(again.projection.weight, encoder.projection.weight)
    maps = random_maps((1, 9, 9), 3, 0)
    assert torch.equal(again(maps, 2, 2), encoder(maps, 2, 2))


def broken(path: Path, what: str) -> None:
    config, weights = path / "config.json", path / "model.safetensors"
    values: dict[str, Any] = json.loads(config.read_text())
    if what == "no config":
        config.unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "no JSON":
        config.write_text("{classes")
    elif what == "not UTF-8":
        config.write_bytes(b'{"classes": ["\xff"]}')
    elif what == "a list":
        config.write_text("[]")
    elif what == "no classes":
        config.write_text(json.dumps({"channels": 5}))
    elif what == "numbers for names":
        config.write_text(json.dumps({**values, "classes": list(range(90))}))
    elif what == "text for a number":
        config.write_text(json.dumps({**values, "channels": "5"}))
    elif what == "empty":
        config.write_text(json.dumps({**values, "classes": []}))
    elif what == "too many classes":
        config.write_text(json.dumps({**values, "classes": ["a", "b", "c", "d"]}))
    elif what == "cut short":
        weights.write_bytes(weights.read_bytes()[:-3])
    elif what == "no safetensors":
        weights.write_bytes(b"words")
    elif what == "other names":
        save_file({"weight": torch.zeros(2)}, weights)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no config", "config.json: no such file"),
        ("no weights", "model.safetensors: no such file"),
        ("no JSON", "config.json: found no JSON"),
        ("not UTF-8", "config.json: found no JSON"),
        ("a list", "config.json: found classes None and channels None"),
        ("no classes", "config.json: found classes None and channels 5"),
        ("numbers for names", r"config.json: found classes \[0, 1, 2"),
        ("text for a number", "channels '5'; allowed is a list of names and a whole number"),
        ("empty", "classes: found 0"),
        (
            "too many classes",
            r"model.safetensors: found the weights .*\[5, 4, 1, 1\].*; config.json needs .*\[5, 5, 1, 1\]",
        ),
        ("cut short", "model.safetensors: it is broken"),
        ("no safetensors", "model.safetensors: it is broken"),
        ("other names", "model.safetensors: found the weights"),
    ],
)
def test_a_broken_folder_is_one_line(tmp_path: Path, what: str, says: str) -> None:
    SemanticEncoder(("sky", "sea", "land"), 5).save_pretrained(tmp_path)
    broken(tmp_path / "semantic_encoder", what)
    with pytest.raises((ValueError, OSError), match=says) as caught:
        SemanticEncoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file; a saved model has one"):
        SemanticEncoder.from_pretrained(tmp_path / "none")


# --- index maps ---


def test_a_palette_png_is_read_as_its_indices(tmp_path: Path) -> None:
    indices = np.array([[0, 1, 2], [11, 255, 1]], dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(bytes(range(255, -1, -1)) * 3)  # colours that have nothing to do with the indices
    image.save(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as saved:
        assert saved.mode == "P"
    found = read_map(tmp_path / "map.png")
    assert found.dtype == torch.int64
    assert found.tolist() == indices.tolist()
    assert read_map(str(tmp_path / "map.png")).equal(read_map(image))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_keep_class_300_and_the_check_names_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"map.{suffix}"
    Image.fromarray(np.array([[3, 300], [255, 0]], dtype=np.uint16)).save(path)
    found = read_map(path)
    assert found.tolist() == [[3, 300], [255, 0]]
    with pytest.raises(ValueError, match="found class 300; allowed is 0 to 11, or 255 for unknown"):
        encoder_of(12).check(found)


def test_8_bit_grey_and_1_bit(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 7, 255]], dtype=np.uint8)).save(tmp_path / "grey.png")
    assert read_map(tmp_path / "grey.png").tolist() == [[0, 7, 255]]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert read_map(tmp_path / "bits.png").tolist() == [[1, 0]]


def packed_grey_png(rows: list[bytes], width: int, bits: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("bits", "row", "classes"), [(4, b"\x12\x3b", [1, 2, 3, 11]), (2, b"\x1b", [0, 1, 2, 3])])
def test_grey_of_few_bits_is_not_stretched(tmp_path: Path, bits: int, row: bytes, classes: list[int]) -> None:
    """Pillow makes 17, 34, ... of 1, 2, ... in 4 bits, which is right for light and wrong for classes."""
    (tmp_path / "map.png").write_bytes(packed_grey_png([row], 4, bits))
    assert read_map(tmp_path / "map.png").tolist() == [classes]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_name_the_importer(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (3, 2)).save(tmp_path / "map.png")
    for source in (tmp_path / "map.png", Image.new(mode, (3, 2))):
        with pytest.raises(ValueError, match=f"found pixels of mode {mode}, so colours; .* `ldm data maps`"):
            read_map(source)


def test_files_that_are_no_index_map(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.png: no such file"):
        read_map(tmp_path / "none.png")
    (tmp_path / "words.png").write_text("words")
    with pytest.raises(ValueError, match="found no picture of an allowed format; allowed is PNG, TIFF"):
        read_map(tmp_path / "words.png")
    Image.new("L", (8, 8)).save(tmp_path / "lossy.jpg")
    with pytest.raises(ValueError, match="found no picture of an allowed format"):
        read_map(tmp_path / "lossy.jpg")
    Image.effect_noise((64, 64), 90).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    with pytest.raises(ValueError, match=r"cut.png: it cannot be decoded \(.*\); save it again") as caught:
        read_map(tmp_path / "cut.png")
    assert "\n" not in str(caught.value)

"""Files of textual inversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.errors import UserError
from ldm.interchange.embedding_file import Embedding, load_embedding, read_embedding, save_embedding

VECTORS = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "learned_embeds.safetensors"
    save_embedding(path, Embedding("<mine>", VECTORS))
    assert list(load_file(path)) == ["<mine>"]
    for place, token, wanted in ((path, None, "<mine>"), (tmp_path, None, "<mine>"), (path, "zorp", "zorp")):
        found = read_embedding(place, token)
        assert (found.token, found.vectors.dtype) == (wanted, torch.float32)
        assert torch.equal(found.vectors, VECTORS)


def test_a_file_of_a1111_is_called_as_its_word(tmp_path: Path) -> None:
    save_file({"emb_params": VECTORS.half()}, tmp_path / "EasyWord.safetensors")
    found = read_embedding(tmp_path / "EasyWord.safetensors")
    assert found.token == "EasyWord"
    assert torch.equal(found.vectors, VECTORS.half().float())


def test_a_single_vector_may_lack_its_dimension(tmp_path: Path) -> None:
    save_file({"<mine>": VECTORS[0].contiguous()}, tmp_path / "one.safetensors")
    assert torch.equal(read_embedding(tmp_path / "one.safetensors").vectors, VECTORS[:1])


def test_a_pickle_opens_only_when_it_is_allowed(tmp_path: Path) -> None:
    torch.save({"<mine>": VECTORS}, tmp_path / "learned_embeds.bin")
    with pytest.raises(UserError, match="found a pickle"):
        read_embedding(tmp_path / "learned_embeds.bin")
    found = read_embedding(tmp_path / "learned_embeds.bin", allow_pickle=True)
    assert found.token == "<mine>"
    assert torch.equal(found.vectors, VECTORS)


@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path: Path, start: bytes) -> None:
    path, wanted = tmp_path / "learned_embeds.safetensors", int.from_bytes(start, "little")
    for length in range(wanted - 160, wanted):
        save_file({"<mine>": VECTORS}, path, metadata={"note": "x" * max(0, length)})
        if path.read_bytes()[: len(start)] == start:
            break
    assert path.read_bytes()[: len(start)] == start
    assert torch.equal(read_embedding(path).vectors, VECTORS)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": VECTORS, "b": VECTORS + 1}, r"found a \[3, 8\], b \[3, 8\]; allowed is one tensor"),
        ({"a": VECTORS[None]}, r"found a \[1, 3, 8\]; allowed is one tensor \[vectors, width\]"),
        ({"a": torch.ones(3, 8, dtype=torch.int64)}, "allowed is one tensor"),
        ({}, "found nothing"),
        ({"a": torch.full((1, 8), torch.inf)}, "NaN or Inf"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message):
        read_embedding(tmp_path / "other.safetensors")


def test_a_model_without_text_takes_no_word(tmp_path: Path) -> None:
    save_embedding(tmp_path / "a.safetensors", Embedding("<mine>", VECTORS))
    with pytest.raises(UserError, match="a word for a model without text"):
        load_embedding(None, tmp_path / "a.safetensors")

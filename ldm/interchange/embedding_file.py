"""Textual inversion's files: the vectors of one word. diffusers' layout is written, A1111's is read too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from conditioning.embeddings import add_word
from conditioning.text import TextEncoder
from ldm.errors import UserError, user_input
from ldm.files import whole_file
from ldm.interchange.weight_file import open_weights

NAME = "learned_embeds.safetensors"
"""In a folder: what diffusers' `load_textual_inversion(folder)` looks for."""
A1111_KEY = "emb_params"
"""The one key of a file that A1111 writes; the word is then the file's name."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word and its vectors, [n, C]."""

    token: str
    vectors: Tensor


def save_embedding(path: str | Path, embedding: Embedding) -> None:
    """Write the file that diffusers' `load_textual_inversion` opens, whole or not at all. Raises UserError."""
    with whole_file(path) as partial:
        save_file({embedding.token: embedding.vectors.detach().cpu().contiguous()}, partial, metadata={"format": "pt"})


def read_embedding(path: str | Path, token: str | None = None, *, allow_pickle: bool = False) -> Embedding:
    """Read a word, in float32, from a file or a run; `token` is another name for it.

    A pickle of one tensor (`learned_embeds.bin`) opens with `allow_pickle` only. Raises UserError for a file of
    something else.
    """
    path = Path(path) / NAME if Path(path).is_dir() else Path(path)
    with open_weights(path, allow_pickle=allow_pickle) as file:
        keys = list(file.shapes)
        if len(keys) != 1 or keys[0] not in file.numbers or len(file.shapes[keys[0]]) not in (1, 2):
            named = [f"{key} {list(file.shapes[key])}" for key in keys[:2]] + ["more"] * (len(keys) > 2)
            raise UserError(
                f"{path}: found {', '.join(named) or 'nothing'}; allowed is one tensor [vectors, width], as textual "
                "inversion for Stable Diffusion 1 and 2 saves it; use another file"
            )
        vectors = file.read(keys[0]).float()
    if not vectors.isfinite().all():
        raise UserError(f"{path}: found vectors that are NaN or Inf; allowed are numbers; use another file")
    name = path.stem if keys[0] == A1111_KEY else keys[0]
    return Embedding(token or name, vectors if vectors.ndim == 2 else vectors[None])


def load_embedding(
    encoder: TextEncoder | None, path: str | Path, token: str | None = None, *, allow_pickle: bool = False
) -> None:
    """Give a model's text encoder the word in a file. Raises UserError for one that does not fit."""
    embedding = read_embedding(path, token, allow_pickle=allow_pickle)
    if encoder is None:
        raise UserError(f"{path}: found a word for a model without text; allowed is one with text; leave it out")
    with user_input(str(path)):
        add_word(encoder, embedding.token, embedding.vectors)

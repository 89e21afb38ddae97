"""CLIP's tokenizer from the vocabulary that open_clip ships, without a download and without importing open_clip."""

from __future__ import annotations

import gzip
import html
import importlib.util
from functools import lru_cache
from pathlib import Path

from transformers import CLIPTokenizer

VOCABULARY_SIZE = 49408
_MERGES = 49152 - 256 - 2  # the first of the file's 262,145 merges; the rest was never used by CLIP
END_OF_TEXT = "<|endoftext|>"


def clip_vocabulary_tokenizer(length: int = 77, pad_token: str = END_OF_TEXT) -> CLIPTokenizer:
    """A CLIP tokenizer that pads and cuts at `length` tokens; ids are those of OpenAI's CLIP and of open_clip.

    `pad_token` is `<|endoftext|>` (id 49407) for Stable Diffusion 1 and for towers trained here, `!` (id 0) for
    OpenCLIP and Stable Diffusion 2. Call `clean` on the text first: open_clip does, CLIPTokenizer does not.
    """
    vocabulary, merges = _clip_vocabulary()
    return CLIPTokenizer(
        vocab=dict(vocabulary),
        merges=list(merges),
        pad_token=pad_token,
        model_max_length=length,
        padding_side="right",
        # Else the pad token "!" would be cut out of "cat!!!" as padding. Saved with the tokenizer, so diffusers agrees.
        split_special_tokens=True,
    )


def clean(text: str) -> str:
    """Mend broken Unicode, resolve HTML entities, collapse white space, lower the case: what CLIP was trained on.

    As open_clip's `_clean_lower`, which cannot be had without importing all of open_clip.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=1)
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges in order of rank, as OpenAI's simple_tokenizer.py builds them."""
    with gzip.open(_vocabulary_file(), "rt", encoding="utf-8") as lines:
        next(lines)  # a version line
        merges = []
        for line in lines:
            first, second = line.split()
            merges.append((first, second))
            if len(merges) == _MERGES:
                break
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", END_OF_TEXT]
    return {token: index for index, token in enumerate(tokens)}, merges


def _vocabulary_file() -> Path:
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
        if path.is_file():
            return path
    raise FileNotFoundError(
        "CLIP's vocabulary bpe_simple_vocab_16e6.txt.gz: not found; it comes with open_clip_torch; "
        "pip install open_clip_torch"
    )


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte, in the order of CLIP's ids (GPT-2's byte-level BPE)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = len(set(range(256)) - set(printable))
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]

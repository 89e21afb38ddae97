"""New words for a text encoder: rows that are added to its token embedding, loaded or learned.

Learning nothing but such rows is textual inversion (Gal et al. 2022, arXiv 2208.01618). A word of several vectors is
several tokens, `<word> <word>_1 <word>_2 ...`, which stand wherever a prompt has the word; so diffusers has it too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import CLIPTokenizer

from conditioning.clip_tokenizer import clean
from conditioning.text import TextEncoder
from conditioning.words import new_words


@dataclass(frozen=True, kw_only=True)
class TextualInversionConfig:
    """The word that is learned.

    `token` is how captions and prompts write it, such as <mine>: no blanks, and no word yet. Its `vectors` start as the
    tokens of `initial`, a word or two that come near (a second time from the first when there are fewer of them).
    """

    token: str
    initial: str
    vectors: int = 1

    def __post_init__(self) -> None:
        check_writable(self.token, "token: ")
        if self.token != self.token.lower():  # captions are lower-cased, and diffusers writes out several vectors so
            raise ValueError(f"token: found {self.token!r}; allowed is lower case; write {self.token.lower()}")
        if not clean(self.initial):
            raise ValueError("initial: found nothing; allowed is a word that comes near to the new one; give one")
        if self.vectors < 1:
            raise ValueError(f"vectors: found {self.vectors}; allowed is 1 or more; 1 to 4 are usual")


class GrownEmbedding(nn.Embedding):
    """A token embedding [V, C] that stays as it is, and rows [n, C] for the tokens V, V + 1, ..., which are learned.

    Its state dict is that of one embedding [V + n, C].
    """

    def __init__(self, fixed: Tensor, rows: Tensor) -> None:
        super().__init__(fixed.shape[0], fixed.shape[1], _weight=fixed, _freeze=True)
        self.rows = nn.Parameter(rows)

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors [..., C] of token ids [...]."""
        new = tokens - self.num_embeddings
        fixed = embedding(tokens.clamp(max=self.num_embeddings - 1), self.weight)  # [..., C]
        learned = embedding(new.clamp(min=0), self.rows)  # [..., C]
        return torch.where((new >= 0)[..., None], learned, fixed)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = torch.cat([self.weight, self.rows]).detach()  # [V + n, C]


def add_word(encoder: TextEncoder, token: str, vectors: Tensor) -> None:
    """Give the encoder a word with these vectors [n, C], in its own type.

    Raises ValueError, and changes nothing, for a word that it has, another width, or more vectors than a text holds.
    """
    width = encoder.model.get_input_embeddings().weight.shape[1]
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise ValueError(
            f"found vectors of shape {list(vectors.shape)}; allowed is [n, {width}]; use a word made for this model"
        )
    _add_tokens(encoder, token, len(vectors))
    old = encoder.model.get_input_embeddings().weight.detach()
    weight = torch.cat([old, vectors.to(old.device, old.dtype)])  # [V + n, C]
    grown = nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight)
    _replace_embedding(encoder, grown.requires_grad_(encoder.model.get_input_embeddings().weight.requires_grad))


def learn_word(encoder: TextEncoder, config: TextualInversionConfig) -> None:
    """Freeze the encoder but for the vectors of a new word, which starts as `config.initial`. Raises ValueError."""
    start = encoder.tokenizer(clean(config.initial), add_special_tokens=False).input_ids
    if len(start) > config.vectors:
        raise ValueError(
            f"found initial {config.initial!r}, which is {len(start)} tokens; "
            f"allowed are as many as vectors ({config.vectors}) or fewer; take a simpler word, or more vectors"
        )
    _add_tokens(encoder, config.token, config.vectors)
    encoder.requires_grad_(False)
    old = encoder.model.get_input_embeddings().weight.detach()
    rows = old[[start[number % len(start)] for number in range(config.vectors)]].clone()  # [n, C]
    _replace_embedding(encoder, GrownEmbedding(old, rows))


@torch.no_grad()
def word_vectors(encoder: TextEncoder, token: str) -> Tensor:
    """The vectors [n, C] of an added word, a copy on the CPU. Raises ValueError when the encoder has it not."""
    words = new_words(encoder.tokenizer)
    if token not in words:
        raise ValueError(f"found no added word {token!r}; allowed is {', '.join(words) or 'none'}; check the spelling")
    ids = torch.tensor(encoder.tokenizer.convert_tokens_to_ids(list(words[token])))
    table = encoder.model.get_input_embeddings()
    return table(ids.to(table.weight.device)).cpu().clone()


def check_writable(token: str, what: str = "") -> None:
    """Raise ValueError for a word that would not be found again in a caption, which is cleaned before it is read."""
    if not token or token.split() != [token] or clean(token) != token.lower():
        raise ValueError(f"{what}found {token!r}; allowed is a word without blanks or HTML, such as <mine>; rename it")


def _add_tokens(encoder: TextEncoder, token: str, count: int) -> None:
    """Extend the tokenizer by `count` tokens, whose ids go on from the rows of the embedding."""
    tokenizer = encoder.tokenizer
    check_writable(token)
    most = encoder.length - 2  # the start and the end token take two places
    if not 1 <= count <= most:
        raise ValueError(f"found {count} vectors; allowed are 1 to {most}, which fill the text window; take fewer")
    rows = encoder.model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) != rows:
        raise ValueError(
            f"found a tokenizer of {len(tokenizer)} tokens for {rows} embeddings; allowed is a row for each token; "
            "mend the model"
        )
    tokens = [token, *(f"{token}_{number}" for number in range(1, count))]
    _check_new(tokenizer, tokens)
    tokenizer.add_tokens(tokens)


def _check_new(tokenizer: CLIPTokenizer, tokens: list[str]) -> None:
    vocabulary, word = tokenizer.get_vocab(), tokens[0]
    # One more, since an older `<word>_1` would be taken for a vector of this word.
    for token in (*tokens, f"{word}_{len(tokens)}"):
        if {token, token.lower(), f"{token.lower()}</w>"} & vocabulary.keys():
            raise ValueError(f"found {token!r}, which is a word already; allowed is a new one; give it another name")
    stem = re.fullmatch(r"(.+)_\d+", word)
    if stem is not None and stem[1] in new_words(tokenizer):
        raise ValueError(f"found {word!r}, which reads as a vector of {stem[1]!r}; allowed is another name; give one")


def _replace_embedding(encoder: TextEncoder, table: nn.Embedding) -> None:
    encoder.model.set_input_embeddings(table)
    encoder.model.config.vocab_size = len(encoder.tokenizer)

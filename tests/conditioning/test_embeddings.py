"""New words: in the tokenizer, in the embedding, in files, against diffusers where it has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from hypothesis import given, settings
from hypothesis import strategies as st

from conditioning.embeddings import GrownEmbedding, TextualInversionConfig, add_word, learn_word, word_vectors
from conditioning.text import TextConfig, TextEncoder, build_text_encoder
from conditioning.words import new_words

WIDTH, LENGTH, VOCABULARY = 8, 16, 49408
WORDS = {"<mine>": 3, "zorp": 1, "<blue-cat>": 2}


def build() -> TextEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_text_encoder(TextConfig(width=WIDTH, layers=1, heads=2, length=LENGTH))


def vectors(count: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


@pytest.fixture(scope="module")
def knowing() -> TextEncoder:
    """An encoder that knows `WORDS`. Shared: do not change it."""
    encoder = build()
    for word, count in WORDS.items():
        add_word(encoder, word, vectors(count))
    return encoder


def test_a_word_is_as_many_tokens_as_it_has_vectors(knowing: TextEncoder) -> None:
    assert new_words(knowing.tokenizer) == {
        "<mine>": ("<mine>", "<mine>_1", "<mine>_2"),
        "zorp": ("zorp",),
        "<blue-cat>": ("<blue-cat>", "<blue-cat>_1"),
    }
    plain = knowing.tokenize(["a cat"])[0, :4].tolist()
    first = VOCABULARY
    tokens = knowing.tokenize(["A <mine>  cat ZORP"])[0].tolist()
    assert tokens[:8] == [*plain[:2], first, first + 1, first + 2, plain[2], first + 3, plain[3]]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([*WORDS, "zorps", "a", "red", "<", ">", "!"]), st.text("abz<>_1 -", max_size=6)),
        max_size=8,
    )
)
def test_prompts_are_read_as_diffusers_reads_them(knowing: TextEncoder, parts: list[str]) -> None:
    if any("_" in part for part in parts):
        return  # diffusers replaces <mine> in a written <mine>_1 once more
    prompt = " ".join(" ".join(parts).split())
    written = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, knowing.tokenizer)
    theirs = knowing.tokenizer(
        written, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids
    assert torch.equal(knowing.tokenize([prompt]), theirs)


def test_a_long_prompt_counts_every_vector(knowing: TextEncoder) -> None:
    fits = "<mine> " * 4 + "a a"  # 12 + 2 of the 14 places between start and end
    assert knowing.truncated(fits) == ""
    assert knowing.truncated(f"{fits} red square") == "red square"


def test_the_vectors_are_looked_up_and_the_others_stay(knowing: TextEncoder) -> None:
    table, before = knowing.model.get_input_embeddings().weight, build().model.get_input_embeddings().weight
    assert table.shape == (VOCABULARY + 6, WIDTH)
    assert torch.equal(table[:VOCABULARY], before)
    for word, count in WORDS.items():
        assert torch.equal(word_vectors(knowing, word), vectors(count))
    with pytest.raises(ValueError, match="no added word 'cat'; allowed is <mine>, zorp, <blue-cat>"):
        word_vectors(knowing, "cat")


def test_the_saved_folder_knows_the_words(knowing: TextEncoder, tmp_path: Path) -> None:
    knowing.save_pretrained(tmp_path)
    again = TextEncoder.from_pretrained(tmp_path)
    prompts = ["a <mine> zorp", "red"]
    assert torch.equal(again.tokenize(prompts), knowing.tokenize(prompts))
    with torch.no_grad():
        assert torch.equal(again(again.tokenize(prompts)), knowing(knowing.tokenize(prompts)))


def test_an_embedding_that_grows_is_one_embedding() -> None:
    fixed, rows = vectors(5), vectors(2)
    grown, plain = GrownEmbedding(fixed, rows.clone()), torch.nn.Embedding.from_pretrained(torch.cat([fixed, rows]))
    tokens = torch.tensor([[0, 4, 5], [6, 6, 1]])
    assert torch.equal(grown(tokens), plain(tokens))
    assert torch.equal(grown.state_dict()["weight"], plain.weight)
    assert list(grown.state_dict()) == ["weight"]
    grown(tokens).sum().backward()
    assert grown.weight.grad is None
    assert torch.equal(grown.rows.grad, torch.tensor([1.0, 2.0])[:, None].expand(2, WIDTH))
    grown.rows.grad = None
    grown(torch.tensor([0, 1])).sum().backward()  # a batch without the word: a gradient all the same
    assert torch.equal(grown.rows.grad, torch.zeros(2, WIDTH))


def test_only_the_new_rows_learn_and_they_start_as_the_initial_words() -> None:
    encoder = build()
    learn_word(encoder, TextualInversionConfig(token="<mine>", initial="red cross", vectors=3))
    names = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert names == ["model.embeddings.token_embedding.rows"]
    red, cross = build().tokenizer("red cross", add_special_tokens=False).input_ids
    table = build().model.get_input_embeddings().weight
    assert torch.equal(word_vectors(encoder, "<mine>"), table[[red, cross, red]])
    # The word reads as the words it started from.
    with torch.no_grad():
        assert torch.equal(encoder(encoder.tokenize(["a <mine>"])), encoder(encoder.tokenize(["a red cross red"])))


def test_a_learned_word_is_saved_as_an_added_one(tmp_path: Path) -> None:
    encoder = build()
    learn_word(encoder, TextualInversionConfig(token="<mine>", initial="cross", vectors=2))
    with torch.no_grad():
        encoder.model.get_input_embeddings().rows.copy_(vectors(2))
    encoder.save_pretrained(tmp_path)
    again = TextEncoder.from_pretrained(tmp_path)
    assert torch.equal(word_vectors(again, "<mine>"), vectors(2))
    assert again.model.config.vocab_size == VOCABULARY + 2


@pytest.mark.parametrize(
    ("word", "given_vectors", "message"),
    [
        ("cat", vectors(1), "'cat', which is a word already"),
        ("Cat", vectors(1), "'Cat', which is a word already"),
        ("<mine>", vectors(1), "'<mine>', which is a word already"),
        ("zorp_1", vectors(1), "'zorp_1', which reads as a vector of 'zorp'"),
        ("a b", vectors(1), "'a b'; allowed is a word without blanks"),
        ("", vectors(1), "''; allowed is a word"),
        ("&lt;x", vectors(1), "'&lt;x'; allowed is a word without blanks or HTML"),
        ("<new>", vectors(1, 9), r"shape \[1, 9\]; allowed is \[n, 8\]"),
        ("<new>", vectors(15), "15 vectors; allowed are 1 to 14"),
    ],
)
def test_words_that_cannot_be_added_change_nothing(
    knowing: TextEncoder, word: str, given_vectors: torch.Tensor, message: str
) -> None:
    size = len(knowing.tokenizer)
    with pytest.raises(ValueError, match=message):
        add_word(knowing, word, given_vectors)
    assert (len(knowing.tokenizer), knowing.model.get_input_embeddings().weight.shape[0]) == (size, size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": "<Mine>"}, "token: found '<Mine>'; allowed is lower case; write <mine>"),
        ({"token": "my word"}, "token: found 'my word'"),
        ({"initial": " "}, "initial: found nothing"),
        ({"vectors": 0}, "vectors: found 0"),
    ],
)
def test_the_config_is_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextualInversionConfig(**{"token": "<mine>", "initial": "cross", **changes})


def test_an_initial_of_too_many_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="'red cross', which is 2 tokens; allowed are as many as vectors"):
        learn_word(build(), TextualInversionConfig(token="<mine>", initial="red cross"))

"""Words that were added to a tokenizer, and prompts in which those of several vectors are written out."""

from __future__ import annotations

import re

from transformers import CLIPTokenizer


def new_words(tokenizer: CLIPTokenizer) -> dict[str, tuple[str, ...]]:
    """Every added word with the tokens of its vectors: the word itself, `word_1`, `word_2`, ..."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    words: dict[str, tuple[str, ...]] = {}
    for word in added:
        tokens = [word]
        while f"{word}_{len(tokens)}" in added:
            tokens.append(f"{word}_{len(tokens)}")
        words[word] = tuple(tokens)
    further = {token for tokens in words.values() for token in tokens[1:]}
    return {word: tokens for word, tokens in words.items() if word not in further}


def written_out(text: str, words: dict[str, tuple[str, ...]]) -> str:
    """The cleaned `text` with all tokens of each word in its place, as diffusers' `maybe_convert_prompt` does."""
    if all(len(tokens) == 1 for tokens in words.values()):
        return text
    longer = {word.lower(): " ".join(tokens).lower() for word, tokens in words.items()}
    # The longest first, as the tokenizer looks for them.
    pattern = "|".join(re.escape(word) for word in sorted(longer, key=len, reverse=True))
    return re.sub(pattern, lambda match: longer[match[0]], text)

"""Token ids against open_clip's own tokenizer, odd prompts included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from conditioning.clip_tokenizer import END_OF_TEXT, clean, clip_vocabulary_tokenizer

PROMPTS = [
    "",
    "a photograph of an astronaut riding a horse",
    "UPPERCASE Straße İstanbul ΣΑΣ ẞ",
    "  double  spaces\tand\nlines \r\n",
    "don't they've I'LL it's we're you'd I'm 'tis",
    "émigré café naïve, schÃ¶n, ﬁne ﬃ ligatures",
    "“curly” ‘quotes’ – dashes — and…",
    "&lt;b&gt; &amp;amp; &eacute;&#233; &#39; a &lt; b",
    "a < b &amp;amp; caf&eacute;",  # ftfy leaves entities alone beside a bare <
    "中文字符的一只猫 日本語 한국어 ไทย हिन्दी עברית العربية",
    "🐱 👩‍👩‍👧 🇩🇪 ☀️ 👍🏽",
    " ".join(["word"] * 200),
    "supercalifragilisticexpialidocious" * 12,
    "1234567890 3.14 1,000 ½ ² Ⅷ ①",
    "hello_world!!! @#$%^&*()[]{}~`\\|",
    "cat! cat !! ! !a! a!!b",
    "<|startoftext|> and <|endoftext|> are text, (weights:1.3) [brackets]",
    "\u200bzero\u200dwidth\ufeff soft\u00adhyphen nbsp\u00a0nbsp \u3000wide",
    "\x00\x01control\x1f \x7f",
    "e\u0301 a\u030a combining",
    "𝕬𝖇𝖈 Ǆ ŉ ΐ",
]


def reference(prompts: list[str], length: int, pad: int) -> torch.Tensor:
    """open_clip pads with 0; Stable Diffusion 1 pads with the end token."""
    tokens = open_clip.SimpleTokenizer()(prompts, context_length=length)
    after_end = (tokens == 49407).long().cumsum(1) - (tokens == 49407).long() > 0
    return tokens.masked_fill(after_end, pad)


def ours(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    cleaned = [clean(prompt) for prompt in prompts]
    length = tokenizer.model_max_length
    return tokenizer(cleaned, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


@pytest.mark.parametrize("length", [77, 16])
@pytest.mark.parametrize(("token", "pad"), [(END_OF_TEXT, 49407), ("!", 0)])
def test_ids_are_open_clips(token: str, pad: int, length: int) -> None:
    found = ours(clip_vocabulary_tokenizer(length, token), PROMPTS)
    expected = reference(PROMPTS, length, pad)
    for prompt, row, target in zip(PROMPTS, found, expected, strict=True):
        assert row.tolist() == target.tolist(), prompt


def test_padding_with_0_is_open_clips_tokenize() -> None:
    assert torch.equal(ours(clip_vocabulary_tokenizer(77, "!"), PROMPTS), open_clip.tokenize(PROMPTS))


@settings(max_examples=150, deadline=None)
@given(prompt=st.text(st.characters(min_codepoint=32, max_codepoint=0x24F), max_size=60))
def test_ids_are_open_clips_for_any_latin_text(prompt: str) -> None:
    # "<start_of_text>" is open_clip's own spelling of the start token, and "ſ" its case-blind "s"; nobody types either.
    if "_of_text" not in prompt and "ſ" not in prompt:
        expected = open_clip.tokenize([prompt])
        assert torch.equal(ours(_shared(), [prompt]), expected)


def test_the_known_ids_of_a_known_prompt() -> None:
    """As in the model card of openai/clip-vit-base-patch32."""
    tokens = ours(clip_vocabulary_tokenizer(8), ["a photo of a cat"])
    assert tokens.tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407, 49407]]


@pytest.mark.parametrize("token", [END_OF_TEXT, "!"])
def test_the_saved_tokenizer_gives_the_same_ids(token: str, tmp_path: Path) -> None:
    tokenizer = clip_vocabulary_tokenizer(40, token)
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.model_max_length == 40 and loaded.pad_token == token
    assert torch.equal(ours(loaded, PROMPTS), ours(tokenizer, PROMPTS))


def test_tokenizers_do_not_share_state() -> None:
    first = clip_vocabulary_tokenizer(77)
    first.add_tokens(["<cat-toy>"])
    assert len(clip_vocabulary_tokenizer(77)) == 49408


def test_building_is_quick_and_does_not_import_open_clip() -> None:
    """Importing open_clip takes seconds; the file it ships is enough."""
    code = (
        "import sys, time, transformers, conditioning.clip_tokenizer as c; from transformers import CLIPTokenizer;"
        "start = time.process_time(); c.clip_vocabulary_tokenizer(); print(time.process_time() - start);"
        "c.clean('a'); assert 'open_clip' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1


def test_cleaning_is_open_clips() -> None:
    from open_clip.tokenizer import _clean_lower

    assert [clean(prompt) for prompt in PROMPTS] == [_clean_lower(prompt) for prompt in PROMPTS]


def test_a_missing_vocabulary_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from conditioning import clip_tokenizer

    monkeypatch.setattr(clip_tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install open_clip_torch"):
        clip_tokenizer._vocabulary_file()


_CACHE: list[CLIPTokenizer] = []


def _shared() -> CLIPTokenizer:
    if not _CACHE:
        _CACHE.append(clip_vocabulary_tokenizer(77, "!"))
    return _CACHE[0]

"""The text encoder against transformers and diffusers themselves, from the folder it saves."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from conditioning.clip_tokenizer import clip_vocabulary_tokenizer
from conditioning.text import TextConfig, TextEncoder, build_text_encoder, without_last_block

TRAINED = TextConfig(encoder="trained", width=32, layers=2, heads=4, length=20)
PROMPTS = ["a red circle on a blue background", "", "A Café!!!", "one two three " * 20]


def build(config: TextConfig = TRAINED, seed: int = 0) -> TextEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_text_encoder(config)


def write_clip(folder: Path, *, length: int = 20, blocks: int = 3, seed: int = 3) -> CLIPTextModel:
    """A small random CLIP text encoder in the layout of a Stable Diffusion folder, written by transformers alone."""
    torch.manual_seed(seed)
    model = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            max_position_embeddings=length,
        )
    ).eval()
    model.save_pretrained(folder / "text_encoder")
    clip_vocabulary_tokenizer(length).save_pretrained(folder / "tokenizer")
    return model


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    """Shared: do not change it."""
    return build()


@pytest.fixture(scope="module")
def saved(encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `encoder` wrote. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("saved")
    encoder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `write_clip` wrote. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


def test_shapes_and_types(encoder: TextEncoder) -> None:
    tokens = encoder.tokenize(PROMPTS)
    assert tokens.shape == (4, 20) and tokens.dtype == torch.int64
    assert (encoder.width, encoder.length) == (32, 20)
    assert encoder(tokens).shape == (4, 20, 32)
    assert (tokens[:, 0] == 49406).all()
    assert tokens[1].tolist() == [49406] + [49407] * 19


def test_the_context_is_normalised(encoder: TextEncoder) -> None:
    """It is taken after the final layer norm, so each token has mean 0 and variance 1 at the start."""
    context = encoder(encoder.tokenize(PROMPTS))
    torch.testing.assert_close(context.mean(-1), torch.zeros(4, 20), rtol=0, atol=1e-5)
    torch.testing.assert_close(context.var(-1, unbiased=False), torch.ones(4, 20), rtol=0, atol=1e-2)


def test_different_captions_give_different_contexts_and_later_words_do_not_reach_back(encoder: TextEncoder) -> None:
    first, second = encoder(encoder.tokenize(["a red circle", "a red square"]))
    torch.testing.assert_close(first[:3], second[:3])
    assert not torch.allclose(first[3:], second[3:], atol=1e-3)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_words_are_far_apart_before_training(layers: int) -> None:
    """Another word changes the context at that word by more than its own length, at CLIP's scale by a third of it;
    a word in another place differs too."""
    torch.manual_seed(0)
    tower = build_text_encoder(TextConfig(width=64, layers=layers, length=16)).eval()
    with torch.no_grad():
        key, rose, twice = tower(tower.tokenize(["a dog above a key", "a dog above a rose", "key key"]))
    differs = [float((one - other).norm() / one.norm()) for one, other in ((key[5], rose[5]), (twice[1], twice[2]))]
    assert differs[0] > 0.9
    assert differs[1] > 0.2


def test_a_trained_tower_learns_and_a_pretrained_one_is_frozen_unless_asked(clip_folder: Path) -> None:
    encoder = build()
    encoder(encoder.tokenize(["a red circle"])).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    config = TextConfig(encoder="clip", pretrained=str(clip_folder), length=20)
    pretrained = build(config)
    assert not pretrained.training
    assert not any(parameter.requires_grad for parameter in pretrained.parameters())
    finetuned = build(replace(config, finetune=True))
    assert finetuned.training and all(parameter.requires_grad for parameter in finetuned.parameters())
    with pytest.raises(ValueError, match="finetune: found true with encoder trained"):
        TextConfig(finetune=True)


def test_the_weights_follow_the_callers_seed() -> None:
    first, again, other = (build(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["model.embeddings.token_embedding.weight"], other["model.embeddings.token_embedding.weight"]
    )


def test_transformers_reads_what_is_saved(encoder: TextEncoder, saved: Path) -> None:
    model = CLIPTextModel.from_pretrained(saved / "text_encoder", local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(saved / "tokenizer", local_files_only=True)
    assert tokenizer.model_max_length == 20
    tokens = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    assert torch.equal(tokens, encoder.tokenize(PROMPTS))
    with torch.no_grad():
        assert torch.equal(model(tokens).last_hidden_state, encoder(tokens))


def test_the_files_have_the_names_that_every_reader_knows(saved: Path) -> None:
    names = load_file(saved / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    assert "text_model.encoder.layers.1.self_attn.q_proj.weight" in names


def test_diffusers_pipeline_computes_the_same_context(encoder: TextEncoder, saved: Path) -> None:
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=CLIPTextModel.from_pretrained(saved / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(saved / "tokenizer"),
        unet=UNet2DConditionModel(
            block_out_channels=(8,),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            cross_attention_dim=32,
            attention_head_dim=2,
        ),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with torch.no_grad():
        theirs, negative = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
        assert torch.equal(theirs, encoder(encoder.tokenize(PROMPTS)))
        assert torch.equal(negative, encoder(encoder.tokenize([""] * 4)))


def test_saving_and_loading_changes_nothing(encoder: TextEncoder, saved: Path, tmp_path: Path) -> None:
    loaded = TextEncoder.from_pretrained(saved)
    loaded.save_pretrained(tmp_path)
    again = TextEncoder.from_pretrained(tmp_path)
    tokens = encoder.tokenize(PROMPTS)
    for other in (loaded, again):
        assert other.length == 20 and torch.equal(other.tokenize(PROMPTS), tokens)
        assert torch.equal(other(tokens), encoder(tokens))


def test_prompts_are_cleaned_first(encoder: TextEncoder) -> None:
    odd, plain = encoder.tokenize(["  A  caf&eacute; ", "a café"])
    assert torch.equal(odd, plain)


@pytest.mark.parametrize(
    ("caption", "lost"),
    [
        ("a cat", ""),
        ("", ""),
        ("cat " * 18, ""),
        ("cat " * 18 + "Dog", "dog"),
        ("cat " * 17 + "on a  RED &amp; blue mat", "a red & blue mat"),
        ("cat " * 18 + "!", "!"),
    ],
)
def test_what_is_cut_off_is_told(caption: str, lost: str, encoder: TextEncoder) -> None:
    assert encoder.truncated(caption) == lost


def test_what_is_kept_and_what_is_cut_make_the_whole_caption(encoder: TextEncoder) -> None:
    caption = " ".join(f"word{index}" for index in range(12))
    lost = encoder.truncated(caption)
    kept = caption.removesuffix(lost)
    assert lost and kept != caption and encoder.truncated(kept) == ""
    assert torch.equal(encoder.tokenize([kept])[0], encoder.tokenize([caption])[0])


@pytest.mark.parametrize("whole_pipeline", [True, False])
def test_a_clip_folder_is_read_as_transformers_reads_it(whole_pipeline: bool, tmp_path: Path) -> None:
    model = write_clip(tmp_path)
    if not whole_pipeline:  # as openai/clip-vit-large-patch14 lies: one folder, and the image tower in the same file
        flat = tmp_path / "flat"
        config = CLIPConfig(
            text_config=model.config.to_dict(),
            vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        )
        whole = CLIPModel(config)
        whole.text_model.load_state_dict(model.state_dict())
        whole.save_pretrained(flat)
        clip_vocabulary_tokenizer(20).save_pretrained(flat)
    encoder = build(TextConfig(encoder="clip", pretrained=str(tmp_path if whole_pipeline else flat), length=20))
    tokens = encoder.tokenize(PROMPTS)
    assert torch.equal(encoder(tokens), model(tokens).last_hidden_state)


def test_a_shorter_window_is_kept_in_the_saved_folder(clip_folder: Path, tmp_path: Path) -> None:
    shorter = build(TextConfig(encoder="clip", pretrained=str(clip_folder), length=12))
    assert shorter.tokenize(PROMPTS).shape == (4, 12)
    shorter.save_pretrained(tmp_path)
    assert TextEncoder.from_pretrained(tmp_path).length == 12


def test_penultimate_is_the_state_before_the_last_block_after_the_final_norm(clip_folder: Path, tmp_path: Path) -> None:
    model = CLIPTextModel.from_pretrained(clip_folder / "text_encoder")
    cut = build(TextConfig(encoder="clip", pretrained=str(clip_folder), length=20, layer="penultimate"))
    tokens = cut.tokenize(PROMPTS)
    states = model(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(cut(tokens), model.final_layer_norm(states[-2]))
    cut.save_pretrained(tmp_path)
    assert torch.equal(TextEncoder.from_pretrained(tmp_path)(tokens), cut(tokens))


def test_one_block_has_no_penultimate_layer() -> None:
    with pytest.raises(ValueError, match=r"^layer: found penultimate"):
        without_last_block(CLIPTextModel(CLIPTextConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8)))


def test_a_window_longer_than_the_model_is_refused(clip_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^length: found 77; allowed is up to 20"):
        build(TextConfig(encoder="clip", pretrained=str(clip_folder)))


def test_a_folder_with_a_weight_missing_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^pretrained: found .* without 1 weights"):
        build(TextConfig(encoder="clip", pretrained=str(tmp_path), length=20))


@pytest.mark.parametrize("name", ["/no/such/folder", "word", "./owner/name", "a/b/c"])
def test_a_missing_folder_is_one_line_and_never_a_download(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="which does not exist; allowed is an existing folder or a hub id"):
        build(TextConfig(encoder="clip", pretrained=name))


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found no tokenizer_config\.json"):
        build(TextConfig(encoder="clip", pretrained=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="found no text_encoder folder"):
        TextEncoder.from_pretrained(tmp_path)


def test_none_builds_no_encoder() -> None:
    with pytest.raises(ValueError, match=r"^encoder: found none"):
        build(TextConfig(encoder="none"))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"encoder": "t5"}, "encoder"),
        ({"layer": "first"}, "layer"),
        ({"layer": "penultimate"}, "layer"),
        ({"length": 2}, "length"),
        ({"width": 30}, "heads"),
        ({"layers": 0}, "layers"),
        ({"dropout": 1.5}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"encoder": "clip"}, "pretrained"),
        ({"encoder": "openclip", "pretrained": "x.safetensors"}, "architecture"),
        ({"encoder": "clip", "pretrained": "x", "architecture": "ViT-H-14"}, "architecture"),
        ({"pretrained": "x"}, "pretrained"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: found .*; .*; "):
        TextConfig(**values)

"""OpenCLIP towers with random weights, before and after the conversion to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, _build_text_tower
from safetensors.torch import save_file
from torch import nn

from conditioning.openclip import openclip_to_transformers
from conditioning.text import TextConfig, TextEncoder, build_text_encoder

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}
VISION = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8}


def tower_of(quick_gelu: bool = False, **values: Any) -> nn.Module:
    """A tower whose every weight is random: biases and norms too, which start as zeros and ones."""
    torch.manual_seed(0)
    tower = _build_text_tower(24, CLIPTextCfg(**TEXT | {"vocab_size": 100} | values), quick_gelu).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower


def states_of(tower: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The states after each block, by open_clip's own modules."""
    state = tower.token_embedding(tokens) + tower.positional_embedding[: tokens.shape[1]]
    states = []
    for block in tower.transformer.resblocks:
        state = block(state, attn_mask=tower.attn_mask[: tokens.shape[1], : tokens.shape[1]])
        states.append(state)
    return states


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize(("layer", "index"), [("last", -1), ("penultimate", -2)])
def test_hidden_states_are_open_clips(layer: Any, index: int, quick_gelu: bool) -> None:
    tower = tower_of(quick_gelu)
    model = openclip_to_transformers(tower, layer)
    tokens = torch.randint(0, 100, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = tower.ln_final(states_of(tower, tokens)[index])
        found = model(tokens).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.config.hidden_act == ("quick_gelu" if quick_gelu else "gelu")
    assert model.config.pad_token_id == 0


def test_the_last_state_leads_to_open_clips_own_embedding() -> None:
    """The whole tower as open_clip runs it, pooled at the end token and projected."""
    tower = tower_of()
    tokens = torch.tensor([[98, 5, 6, 99, *[0] * 12], [98, 7, 99, *[0] * 13]])
    with torch.no_grad():
        state = openclip_to_transformers(tower, "last")(tokens).pooler_output
        torch.testing.assert_close(state @ tower.text_projection, tower(tokens), rtol=1e-5, atol=1e-5)


def test_the_two_activations_differ_enough_to_matter() -> None:
    tokens = torch.randint(0, 100, (1, 16))
    plain, quick = (
        openclip_to_transformers(tower_of(flag), "last")(tokens).last_hidden_state for flag in (False, True)
    )
    assert (plain - quick).abs().max() > 1e-3


@pytest.mark.parametrize(
    "values",
    [
        {"ls_init_value": 0.1},
        {"no_causal_mask": True},
        {"embed_cls": True},
        {"qk_norm": True},
        {"scale_fc": True},
    ],
)
def test_a_tower_that_clip_cannot_hold_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^openclip: found"):
        openclip_to_transformers(tower_of(**values))


def test_a_tower_of_one_block_has_no_penultimate_layer() -> None:
    with pytest.raises(ValueError, match=r"^layer: found penultimate"):
        openclip_to_transformers(tower_of(layers=1))


@pytest.fixture
def architecture(tmp_path: Path) -> str:
    """A small model that open_clip knows by name."""
    file = tmp_path / "ldm-test-tiny.json"
    file.write_text(json.dumps({"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(file)
    return "ldm-test-tiny"


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_local_checkpoint_becomes_a_text_encoder(
    architecture: str, custom_text: bool, in_folder: bool, tmp_path: Path
) -> None:
    """Whole models as open_clip saves them, with the text tower flat or under `text.`."""
    torch.manual_seed(0)
    model = open_clip.create_model(architecture, force_custom_text=custom_text).eval()
    file = tmp_path / "open_clip_model.safetensors"
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, file)
    encoder = build_text_encoder(
        TextConfig(
            encoder="openclip", architecture=architecture, pretrained=str(tmp_path if in_folder else file), length=16
        )
    )
    prompts = ["a red circle!!!", "", "word " * 30]
    tokens = encoder.tokenize(prompts)
    assert torch.equal(tokens, open_clip.tokenize(prompts, context_length=16))
    tower = model.text if custom_text else model
    with torch.no_grad():
        expected = tower.ln_final(states_of(tower, tokens)[-2])
        torch.testing.assert_close(encoder(tokens), expected, rtol=1e-5, atol=1e-5)
        encoder.save_pretrained(tmp_path / "saved")
        loaded = TextEncoder.from_pretrained(tmp_path / "saved")
        assert torch.equal(loaded.tokenize(prompts), tokens)
        assert torch.equal(loaded(tokens), encoder(tokens))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_weights_of_another_architecture_are_refused(architecture: str, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file(tower_of().state_dict(), file)
    with pytest.raises(ValueError, match=r"^pretrained: found .*other\.safetensors without .* token_embedding"):
        load(architecture, str(file))


def load(architecture: str, pretrained: str) -> TextEncoder:
    return build_text_encoder(
        TextConfig(encoder="openclip", architecture=architecture, pretrained=pretrained, length=16)
    )


def test_bad_names_and_files_are_one_line(architecture: str, tmp_path: Path) -> None:
    pickled, broken = tmp_path / "weights.pt", tmp_path / "broken.safetensors"
    pickled.write_bytes(b"")
    broken.write_bytes(b"not safetensors")
    cases = [
        ("ViT-nothing", "x.safetensors", ValueError, "^architecture: found 'ViT-nothing'"),
        ("roberta-ViT-B-32", "x.safetensors", ValueError, "^architecture: found roberta-ViT-B-32, whose text tower"),
        (architecture, str(tmp_path / "missing.safetensors"), FileNotFoundError, "^pretrained: found no file"),
        (architecture, str(tmp_path), FileNotFoundError, "^pretrained: found no open_clip_model.safetensors"),
        (architecture, str(pickled), ValueError, "allowed is a .safetensors file"),
        (architecture, str(broken), ValueError, "which is no safetensors file"),
        (architecture, "no_such_tag", ValueError, "^pretrained: found 'no_such_tag'"),
        ("ViT-L-14", "no_such_tag", ValueError, "laion2b_s32b_b82k"),
    ]
    for name, pretrained, error, message in cases:
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(error, match=message) as raised:
            load(name, str(tmp_path / "empty") if pretrained == str(tmp_path) else pretrained)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("architecture", "tag", "repository", "activation"),
    [
        ("ViT-H-14", "laion2b_s32b_b79k", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", False),
        ("ViT-L-14", "openai", "timm/vit_large_patch14_clip_224.openai", True),
    ],
)
def test_a_tag_names_the_hubs_repository_and_the_activation(
    architecture: str, tag: str, repository: str, activation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is fetched here: the download and the building are watched."""
    seen: dict[str, Any] = {}

    def stop(embed_dim: int, text: dict[str, Any], quick_gelu: bool) -> None:
        seen["quick_gelu"] = quick_gelu
        raise InterruptedError

    monkeypatch.setattr("conditioning.openclip._download", lambda name: seen.setdefault("repository", name))
    monkeypatch.setattr("open_clip.model._build_text_tower", stop)
    with pytest.raises(InterruptedError):
        load(architecture, tag)
    assert seen == {"repository": repository, "quick_gelu": activation}

"""LoRA against its formula W + weight (alpha / rank) B A, on tiny networks of the true architectures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.adapter_layers import (
    adapter_names,
    bake,
    lora_layers,
    merge,
    plain_layers,
    plain_networks,
    remove,
    set_weight,
    unmerge,
)
from ldm.adapters import LoraConfig, add_lora, attach_lora, lora_state
from ldm.attention import attention_kernel, set_attention
from ldm.errors import UserError
from ldm.lora_files import Lora
from ldm.training.learner import Learner, OptimiserConfig

STABLE_DIFFUSION: dict[str, Any] = {  # the config.json of 1.5 with fewer and narrower levels, one block each
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
VERSION_2 = {"attention_head_dim": (1, 2), "use_linear_projection": True, "upcast_attention": True}
ALL = LoraConfig(rank=4, alpha=2.0, target=("all-linear+conv",), text_encoder=True)


class Networks(nn.Module):
    """A U-Net and a text model, called as training calls them."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.unet = UNet2DConditionModel(**STABLE_DIFFUSION | changes)
            self.text = CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=64,
                    hidden_size=12,
                    intermediate_size=24,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    max_position_embeddings=8,
                    eos_token_id=63,
                )
            )
            nn.init.normal_(self.unet.conv_out.weight, std=0.1)
        self.both = self.unet, self.text
        # Frozen from the start: torch multiplies by another path, of another rounding, when a weight wants a gradient.
        self.eval().requires_grad_(False)

    def forward(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(2, 4, 8, 8, generator=generator).to(self.unet.conv_in.bias.dtype)
        context = self.text(torch.randint(64, (2, 8), generator=generator)).last_hidden_state
        return self.unet(latents, torch.tensor([20, 700]), encoder_hidden_states=context).sample

    @torch.no_grad()
    def drawn(self) -> Tensor:
        return self().float()

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in self.state_dict().items()}


@pytest.fixture(params=["sd1", "sd2"])
def networks(request: pytest.FixtureRequest) -> Networks:
    return Networks(**(VERSION_2 if request.param == "sd2" else {}))


@pytest.fixture
def sd1() -> Networks:
    return Networks()


def randomise(model: Networks, name: str = "default", seed: int = 0) -> None:
    """As after training: up matrices that are no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for network in model.both:
        for layer in lora_layers(network).values():
            if name in layer.lora_B:
                weight = layer.lora_B[name].weight
                weight.data = 0.3 * torch.randn(weight.shape, generator=generator)


@cache
def random_lora(config: LoraConfig, seed: int) -> Lora:
    """What a training of `config` could have made."""
    model = Networks()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_lora(*model.both, config)
    randomise(model, seed=seed)
    return lora_state(*model.both)


def change(lora: Lora) -> dict[str, Tensor]:
    """(alpha / rank) B A of each layer by name in `Networks`, in float64."""
    layers = {f"unet.{name}": x for name, x in lora.unet.items()}
    layers |= {f"text.{name}": x for name, x in lora.text_encoder.items()}
    return {
        f"{name}.weight": x.alpha / x.rank * torch.einsum("or,r...->o...", x.up.double().flatten(1), x.down.double())
        for name, x in layers.items()
    }


@pytest.mark.parametrize(
    ("target", "unet_layers", "text_layers"),
    # 1 + 1 + 2 transformers of 2 x 4 projections, 2 layers of feed-forward, one in and one out; 2 text blocks.
    [("attention", 32, 8), ("attention+feedforward", 48, 12), ("attn2.to_k", 4, 0), ("conv_in", 1, 0)],
)
def test_targets(sd1: Networks, target: str, unet_layers: int, text_layers: int) -> None:
    both = bool(text_layers)
    add_lora(*sd1.both, LoraConfig(target=(target,), text_encoder=both))
    assert [len(lora_layers(network)) for network in sd1.both] == [unet_layers, text_layers]


def test_the_largest_target_is_all_but_the_edges(sd1: Networks) -> None:
    add_lora(*sd1.both, ALL)
    edges = plain_layers(sd1.unet).keys() - lora_layers(sd1.unet).keys()
    assert edges == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    assert plain_layers(sd1.text).keys() == lora_layers(sd1.text).keys()
    assert {type(layer.get_base_layer()) for layer in lora_layers(sd1.unet).values()} >= {nn.Conv2d, nn.Linear}


def test_at_first_nothing_changes_and_only_the_lora_learns(networks: Networks) -> None:
    before, weights = networks.drawn(), networks.weights()
    networks.requires_grad_(True)
    names = add_lora(*networks.both, ALL)
    assert torch.equal(networks.drawn(), before)
    trained = {name: p for name, p in networks.named_parameters() if p.requires_grad}
    assert {name.replace("text.", "text_encoder.", 1) for name in trained} == set(names)
    assert all(".lora_" in name for name in names)
    optimiser = torch.optim.Adam(trained.values(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        networks().square().mean().backward()
        optimiser.step()
    assert {name for name, p in networks.named_parameters() if p.grad is not None} == trained.keys()
    # The first step moves B alone, as A's gradient is 0 while B is; by now all have moved.
    assert all(p.grad.abs().sum() > 0 for p in trained.values() if p.grad is not None)
    assert (networks.drawn() - before).abs().max() > 0.01
    remove(*networks.both)
    assert torch.equal(networks.drawn(), before)
    after = networks.weights()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_gradients_pass_checkpointing(sd1: Networks) -> None:
    names = add_lora(*sd1.both, ALL)
    randomise(sd1)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            sd1.unet.enable_gradient_checkpointing()
        sd1.train().zero_grad()
        sd1().square().mean().backward()
        gradients.append([p.grad.clone() for p in sd1.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(names)
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("config", [ALL, LoraConfig(rank=3, alpha=6.0, text_encoder=True)], ids=["conv", "attention"])
def test_the_change_is_alpha_over_rank_b_a(config: LoraConfig) -> None:
    lora = random_lora(config, 1)
    expected, found = Networks(), Networks()
    for name, delta in change(lora).items():
        weight = expected.get_parameter(name)
        weight.data = (weight.double() + 0.7 * delta).float()
    attach_lora(*found.both, lora, 0.7, name="one")
    assert (expected.drawn() - Networks().drawn()).abs().max() > 0.05
    torch.testing.assert_close(found.drawn(), expected.drawn(), rtol=0, atol=1e-5)


def test_several_with_weights_are_the_sum_of_their_changes(record_property: Callable[[str, object], None]) -> None:
    one, two = random_lora(ALL, 1), random_lora(LoraConfig(rank=2, text_encoder=True), 2)
    expected, found = Networks(), Networks()
    for lora, weight in ((one, 0.6), (two, -0.4)):
        for name, delta in change(lora).items():
            parameter = expected.get_parameter(name)
            parameter.data = (parameter.double() + weight * delta).float()
    attach_lora(*found.both, one, 0.6, name="one")
    only_one = found.drawn()
    attach_lora(*found.both, two, -0.4, name="two")
    assert adapter_names(*found.both) == ("one", "two")
    error = (found.drawn() - expected.drawn()).abs().max().item()
    record_property("error", error)
    assert error < 1e-5 < 0.01 < (found.drawn() - only_one).abs().max()
    set_weight(*found.both, name="two", weight=0.0)
    torch.testing.assert_close(found.drawn(), only_one, rtol=0, atol=0)
    set_weight(*found.both, name="two", weight=-0.4)
    remove(*found.both, name="two")
    torch.testing.assert_close(found.drawn(), only_one, rtol=0, atol=0)
    assert adapter_names(*found.both) == ("one",)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_merged_is_unmerged_and_back(
    layout: torch.memory_format, record_property: Callable[[str, object], None]
) -> None:
    model = Networks().to(memory_format=layout)
    weights, before = model.weights(), model.drawn()
    attach_lora(*model.both, random_lora(ALL, 1), 0.8, name="one")
    attach_lora(*model.both, random_lora(ALL, 2), 0.5, name="two")
    applied = model.drawn()
    merge(*model.both)
    merge(*model.both)  # twice is once
    merged = (model.drawn() - applied).abs().max().item()
    with pytest.raises(ValueError, match="unmerge first"):
        set_weight(*model.both, name="one", weight=0.1)
    unmerge(*model.both)
    remove(*model.both)
    after = model.weights()
    restored = max((after[name] - weights[name]).abs().max().item() for name in weights)
    record_property("merged", merged)
    record_property("restored", restored)
    print(f"merged {merged:.1e} restored {restored:.1e}")
    assert (applied - before).abs().max() > 0.05
    assert merged < 1e-5
    assert restored < 1e-6


def test_baked_networks_are_plain_and_draw_the_same(sd1: Networks) -> None:
    keys = sd1.state_dict().keys()
    attach_lora(*sd1.both, random_lora(ALL, 1), name="one")
    applied = sd1.drawn()
    bake(*sd1.both)
    torch.testing.assert_close(sd1.drawn(), applied, rtol=0, atol=1e-5)
    assert sd1.state_dict().keys() == keys
    assert adapter_names(*sd1.both) == ()
    attach_lora(*sd1.both, random_lora(ALL, 2), name="one")  # the name is free again


def test_plain_networks_are_lent_and_come_back_bit_for_bit(sd1: Networks, tmp_path: Any) -> None:
    plain = sd1.weights()
    names = add_lora(*sd1.both, ALL)
    randomise(sd1)
    full, applied = sd1.weights(), sd1.drawn()
    with plain_networks(*sd1.both, merged=False):
        assert all(torch.equal(weight, plain[name]) for name, weight in sd1.state_dict().items())
        assert sd1.state_dict().keys() == plain.keys()
    with plain_networks(*sd1.both, merged=True):
        torch.testing.assert_close(sd1.drawn(), applied, rtol=0, atol=1e-5)
        sd1.unet.save_pretrained(tmp_path)
    _, report = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(sd1.drawn(), applied)
    assert all(torch.equal(weight, full[name]) for name, weight in sd1.state_dict().items())
    assert len([p for p in sd1.parameters() if p.requires_grad]) == len(names)


def test_a_new_lora_learns_on_top_of_a_loaded_one(sd1: Networks) -> None:
    attach_lora(*sd1.both, random_lora(ALL, 1), name="style")
    before = sd1.drawn()
    names = add_lora(*sd1.both, LoraConfig(rank=2, text_encoder=True), name="subject")
    assert torch.equal(sd1.drawn(), before)
    assert all(".subject." in name for name in names)
    attach_lora(*sd1.both, random_lora(ALL, 2), name="late")
    remove(*sd1.both, name="style")
    found = {name for name, p in sd1.named_parameters() if p.requires_grad}
    assert {name.replace("text.", "text_encoder.", 1) for name in found} == set(names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    reference, half = Networks(), Networks().to(dtype)
    lora = random_lora(LoraConfig(rank=2, text_encoder=True), 1)
    attach_lora(*reference.both, lora, name="one")
    attach_lora(*half.both, lora, name="one")
    assert {p.dtype for p in half.parameters()} == {dtype}
    names = add_lora(*half.both, LoraConfig(rank=2))
    trained = [p for p in half.parameters() if p.requires_grad]
    assert len(trained) == len(names)
    assert {p.dtype for p in trained} == {torch.float32}  # updates of 1e-4 would be lost in bf16
    scale = reference.drawn().std()
    assert (half.drawn() - reference.drawn()).std() < scale * (0.01 if dtype == torch.float16 else 0.08)


def test_loading_draws_no_random_numbers_and_warns_of_nothing(sd1: Networks) -> None:
    lora = random_lora(ALL, 1)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_lora(*sd1.both, lora, name="lora_of_mine")
        attach_lora(*sd1.both, lora, 0.0, name="again")
    assert torch.equal(torch.get_rng_state(), state)
    sd1.drawn()
    assert not any(p.is_meta for p in sd1.parameters())
    again = lora_state(*sd1.both, name="lora_of_mine")
    assert all(torch.equal(change(again)[name], delta) for name, delta in change(lora).items())


def test_attention_kernels_run_the_lora(sd1: Networks) -> None:
    attach_lora(*sd1.both, random_lora(ALL, 1), name="one")
    sdpa = sd1.drawn()
    set_attention(sd1.unet, "math")
    assert attention_kernel(sd1.unet) == "math"
    torch.testing.assert_close(sd1.drawn(), sdpa, rtol=0, atol=1e-5)
    remove(*sd1.both)
    assert attention_kernel(sd1.unet) == "math"


def test_stable_diffusion_gets_as_many_layers_as_from_kohya_and_lycoris() -> None:
    """Their logs for 1.5: `LoRA for Text Encoder: 72`, `LoRA for U-Net: 192`, and LyCORIS' LoCon `U-Net: 278`."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    for target, count in (("attention+feedforward", 192), ("all-linear+conv", 278)):
        add_lora(unet, text, LoraConfig(rank=1, target=(target,), text_encoder=True))
        assert (len(lora_layers(unet)), len(lora_layers(text))) == (count, 72)
        remove(unet, text)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    yield Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(learner: Learner, steps: range) -> None:
    for step in steps:
        learner.wrapped().square().mean().backward()
        learner.clip_gradients()
        learner.update(step)


def test_the_learner_trains_averages_and_resumes_the_lora_alone(accelerator: Accelerator) -> None:
    """As stage 2 does: channels last before the learner, a checkpoint of what is trained, a resume in a new process."""
    learners = []
    for seed in (1, 2):
        model = Networks()
        torch.manual_seed(seed)
        add_lora(*model.both, ALL)
        model.unet.to(memory_format=torch.channels_last)
        learners.append(Learner("unet", model, OptimiserConfig(lr=0.01), accelerator, steps=6, ema_decay=0.9))
    one, two = learners
    train(one, range(3))
    saved = {file: {key: x.clone() for key, x in named.items()} for file, named in one.tensors().items()}
    assert all(".lora_" in name for name in saved["unet"])
    train(one, range(3, 6))
    two.load_tensors(saved)
    train(two, range(3, 6))
    assert all(torch.equal(x, two.tensors()["unet"][key]) for key, x in one.tensors()["unet"].items())
    now = lora_state(*one.module.both)
    with one.averaged_weights(), plain_networks(*one.module.both, merged=True):
        averaged = one.module.drawn()
    with one.averaged_weights():
        lora = lora_state(*one.module.both)
    assert any(not torch.equal(lora.unet[name].up, layer.up) for name, layer in now.unet.items())
    other = Networks()
    attach_lora(*other.both, lora, name="averaged")
    torch.testing.assert_close(other.drawn(), averaged, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"target": ()}, "target"),
        ({"target": ("",)}, "target"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_config_checks_itself(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: found"):
        LoraConfig(**values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target=("attention", "to_x")), "lora.target: found to_x"),
        (LoraConfig(target=("conv_in",), text_encoder=True), "lora.target: found no layer of the text_encoder"),
    ],
)
def test_a_target_that_fits_nothing_is_refused_and_changes_nothing(
    sd1: Networks, config: LoraConfig, message: str
) -> None:
    sd1.requires_grad_(True)
    with pytest.raises(UserError, match=message):
        add_lora(*sd1.both, config)
    assert adapter_names(*sd1.both) == ()
    assert all(p.requires_grad for p in sd1.parameters())


def test_a_text_lora_needs_text_and_names_are_new(sd1: Networks) -> None:
    with pytest.raises(UserError, match="text_encoder: found true"):
        add_lora(sd1.unet, None, ALL)
    add_lora(*sd1.both, ALL, name="one")
    for name in ("one", "a.b", ""):
        with pytest.raises(UserError, match="LoRA name"):
            add_lora(*sd1.both, ALL, name=name)
    for ask in (lambda: lora_state(*sd1.both, name="two"), lambda: remove(*sd1.both, name="two")):
        with pytest.raises(UserError, match="there are: one"):
            ask()

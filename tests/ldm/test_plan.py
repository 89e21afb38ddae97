"""`ldm plan`: what is counted is what torch allocates, what is measured is near it, and its advice helps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from conditioning.conditions import Conditions
from ldm.attention import _Executed
from ldm.cli.main import main
from ldm.cli.plan import as_lines, load_either
from ldm.config import build, dump, load
from ldm.data.sources import open_source
from ldm.errors import UserError
from ldm.training.plan import Machine, Plan, make_plan
from ldm.training.plan_advice import advise
from ldm.training.plan_count import Count, count
from ldm.training.plan_ledger import Ledger, WithoutData, _Calls
from ldm.training.plan_measure import Here, Measured
from ldm.training.plan_networks import Sketch
from ldm.training.plan_stage1 import AutoencoderMaker
from ldm.training.plan_stage2 import DiffusionMaker
from ldm.training.stage1 import Stage1Config
from ldm.training.stage2_config import Stage2Config
from ldm.unet import UNetConfig, build_unet, denoise

ROOT = Path(__file__).parents[2]
SCENES = {"source": "scenes", "resolution": 16, "scenes": {"count": 24, "held_out": 0.0}}
VAE: dict[str, Any] = {
    "out": "run",
    "data": SCENES,
    "autoencoder": {"channels": [8, 16], "layers_per_block": 1, "norm_groups": 4},
    "loss": {"perceptual": "features"},
    "discriminator": {"layers": 2, "channels": 8, "start_step": 0},
    "training": {"steps": 10, "batch_size": 8},
}
LDM: dict[str, Any] = {
    "out": "run",
    "autoencoder": "nowhere/autoencoder",
    "data": SCENES,
    "conditions": {"text": {"encoder": "none"}},
    "unet": {
        "channels": [16, 32],
        "layers_per_block": 1,
        "attention": [True, False],
        "heads": 2,
        "norm_groups": 8,
    },
    "training": {"steps": 10, "batch_size": 8},
    "preview": {"count": 2, "loss_images": 4},
    "runtime": {"precision": "fp32"},
}
NO_LOSS = {"count": 2, "loss_images": 0}
"""One phase less to count."""
CONDITIONS = {
    "text": {"encoder": "trained", "width": 16, "layers": 1, "heads": 2, "length": 8},
    "semantic": {"channels": 3},
    "inpainting": {},
}
MACHINE = Machine(kind="cpu", here=True, devices=1, memory=2**30, low=None, overhead=0)


def stage1(**changes: Any) -> Stage1Config:
    return build(Stage1Config, VAE | changes)


def stage2(**changes: Any) -> Stage2Config:
    return build(Stage2Config, LDM | changes)


def maker(config: Any) -> Any:
    size = config.training.batch_size // config.training.accumulation
    if isinstance(config, Stage1Config):
        return AutoencoderMaker(config, Sketch(), size)
    return DiffusionMaker(config, open_source(config.data), Sketch(stage1().autoencoder), size)


def counted(config: Any, low: torch.dtype | None = None) -> Count:
    return count(maker(config), low, config.training.accumulation, 24)


@pytest.fixture(scope="module")
def plain() -> Count:
    return counted(stage2())


# --- The ledger ------------------------------------------------------------------------------------------------------


def test_bytes_and_operations_of_a_product_by_hand() -> None:
    ledger = Ledger()
    weight = nn.Parameter(torch.empty(8, 16, device="meta"))
    with ledger:
        ledger.add(weight)
        inputs = torch.empty(4, 8, device="meta")
        product = inputs @ weight  # saves both
        output = torch.relu(product)  # saves its result
        del product
        assert ledger.now == 4 * (8 * 16 + 4 * 8 + 4 * 16)
        assert ledger.peak == 4 * (8 * 16 + 4 * 8 + 2 * 4 * 16)
        assert ledger.flops == 2 * 4 * 8 * 16
        output.sum().backward()
        assert ledger.flops == 2 * (2 * 4 * 8 * 16)  # the inputs need no gradient
        del output
        assert ledger.now == 4 * (8 * 16 + 4 * 8 + 8 * 16)  # weight, inputs, gradient


def test_a_checkpointed_block_keeps_its_input_and_is_computed_again() -> None:
    with torch.device("meta"):
        blocks = [nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(3)]

    def forward(through: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> tuple[int, int, int]:
        ledger = Ledger()
        with ledger:
            for block in blocks:
                for parameter in block.parameters():
                    parameter.grad = None
                    ledger.add(parameter)
            before = ledger.now
            hidden = torch.empty(64, 32, device="meta", requires_grad=True)
            for block in blocks:
                hidden = through(block, hidden)
            saved, operations = ledger.now - before, ledger.flops
            hidden.sum().backward()
            return saved // (4 * 64 * 32), operations, ledger.flops

    plain = forward(lambda block, hidden: block(hidden))
    again = forward(lambda block, hidden: checkpoint(block, hidden, use_reentrant=False))
    assert (plain[0], again[0]) == (7, 4)  # the input, then two a block; with checkpointing one
    # Of each block the first product is done again; what the second one saves is there before it is.
    assert (plain[2], again[2]) == (3 * plain[1], 3.5 * plain[1])


@pytest.mark.parametrize("text", [True, False])
def test_mixed_precision_is_that_of_cuda(text: bool) -> None:
    """torch's own autocast, on tensors that say they are on a GPU and have no data: the same bytes are left."""
    config = UNetConfig(channels=(16, 32), layers_per_block=1, attention=(True, True), heads=2, norm_groups=8)
    sizes: dict[str, Any] = {"latent_channels": 4, "context_width": 16 if text else None, "sample_size": 16}

    def forward(device: str) -> torch.Tensor:
        told = Conditions(context=torch.empty(2, 5, 16, device=device) if text else None)
        return denoise(unet, torch.empty(2, 4, 16, 16, device=device), torch.zeros(2, device=device).long(), told)

    place = WithoutData(torch.bfloat16)
    with torch.device("meta"):
        unet = build_unet(config, **sizes)
    with place.entered() as ledger:
        for parameter in unet.parameters():
            ledger.add(parameter)
        before = ledger.now
        with place.autocast():
            output = forward("meta")
        ours, kind = ledger.now - before, output.dtype

    theirs = Ledger()
    with FakeTensorMode():
        try:
            with torch.device("cuda"):
                unet = build_unet(config, **sizes)
        except RuntimeError as error:
            pytest.skip(f"this torch knows no CUDA: {error}")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            with theirs, _Calls(None):  # fused attention; torch would ask the GPU which one
                for parameter in unet.parameters():
                    theirs.add(parameter)
                before = theirs.now
                torch.autocast_increment_nesting()
                output = forward("cuda")
                torch.autocast_decrement_nesting()
                torch.clear_autocast_cache()
                assert output.dtype == kind
                assert theirs.now - before == pytest.approx(ours, rel=0.02)
        finally:
            torch.set_autocast_enabled("cuda", False)


# --- Counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        stage1(),
        stage2(conditions=CONDITIONS, unet=LDM["unet"] | {"attention_backend": "math"}, ema_decay=0.0),
        stage2(unet=LDM["unet"] | {"gradient_checkpointing": True}, cache={"enabled": False}),
    ],
    ids=["stage1", "conditions", "checkpointing"],
)
def test_the_count_is_what_torch_allocates(config: Any) -> None:
    """The same step with real tensors, every storage of which is counted."""
    expected = counted(config)
    ledger = Ledger()
    with ledger:
        bench = maker(config).bench(maker(config).networks(), Here(torch.device("cpu"), None))
        for part in bench.parts.values():
            for tensor in (*part.parameters(), *part.buffers()):
                ledger.add(tensor)
        for update in bench.updates:
            for parameter in update.parameters:
                parameter.grad = torch.zeros_like(parameter)
            update()
        ledger.start()
        resting = ledger.now
        bench.micro_batch()
        assert ledger.forward_peak - resting == pytest.approx(expected.activations, rel=0.1)
        assert ledger.flops == pytest.approx(expected.flops, rel=0.01)
        for update in bench.updates:
            update()
        assert ledger.peak == pytest.approx(expected.step, rel=0.05)


def test_the_parts_of_the_memory_by_hand(plain: Count) -> None:
    found = plain
    trained = sum(trained for _, trained in found.parameters.values())
    everything = sum(every for every, _ in found.parameters.values())
    assert found.parameters["autoencoder"][1] == 0
    assert found.gradients == found.average == 4 * trained
    assert found.optimiser == 8 * trained
    assert found.weights == pytest.approx(4 * everything, rel=0.01)  # buffers too
    assert found.checkpoint == 16 * trained
    assert found.cached_image == 2 * 2 * 4 * 8 * 8  # fp16; mean and log-variance; 4 channels of 8 x 8
    assert found.step > found.weights + found.optimiser + found.average + found.activations
    assert set(found.phases) == {"latent cache", "validation loss", "previews: U-Net", "previews: decoding"}
    assert found.phases["latent cache"].calls == pytest.approx(24 / 32)


def test_the_state_of_8_bit_adam_by_hand() -> None:
    """Two bytes a number and two scales a block of 256; weights under 4096 numbers stay in float32."""
    found = counted(stage2(optimiser={"kind": "adamw8bit"}, preview=NO_LOSS))
    with torch.device("meta"):
        networks = maker(stage2()).networks()
    sizes = [parameter.numel() for parameter in networks.unet.parameters()]
    small, large = [s for s in sizes if s < 4096], [s for s in sizes if s >= 4096]
    assert small and large
    assert found.optimiser == 8 * sum(small) + 2 * sum(large) + 8 * sum(-(-s // 256) for s in large)


def test_what_saves_memory_saves_it(plain: Count) -> None:
    smaller = counted(stage2(training={"steps": 10, "batch_size": 8, "accumulation": 4}, preview=NO_LOSS))
    again = counted(stage2(unet=LDM["unet"] | {"gradient_checkpointing": True}, preview=NO_LOSS))
    low = counted(stage2(preview=NO_LOSS), torch.bfloat16)
    assert smaller.activations == pytest.approx(plain.activations / 4, rel=0.1)
    assert smaller.flops == pytest.approx(plain.flops / 4, rel=0.01)
    assert again.activations < 0.6 * plain.activations
    assert 1.1 < again.flops / plain.flops < 4 / 3
    assert low.activations < 0.95 * plain.activations
    assert low.flops == plain.flops


def test_gradient_checkpointing_reaches_a_trained_text_encoder_and_changes_no_gradient() -> None:
    gradients, kept = [], []
    for checkpointing in (False, True):
        unet = LDM["unet"] | {"gradient_checkpointing": checkpointing}
        config = stage2(unet=unet, conditions={"text": CONDITIONS["text"] | {"layers": 3}}, cache={"enabled": True})
        torch.manual_seed(0)
        networks, ledger = maker(config).networks(), Ledger()
        text = networks.encoders.text
        with ledger:
            text(torch.zeros(32, 8, dtype=torch.long)).square().mean().backward()
        kept.append(ledger.forward_peak)
        gradients.append({name: parameter.grad for name, parameter in text.named_parameters()})
    assert kept[1] < 0.7 * kept[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_explicit_products_reach_the_text_encoder_and_change_no_gradient() -> None:
    """In bf16 on a CPU its fused backward takes longer than all the rest of a small text encoder's."""
    gradients, executed = [], []
    for backend in ("auto", "math"):
        unet = LDM["unet"] | {"attention_backend": backend}
        config = stage2(unet=unet, conditions={"text": CONDITIONS["text"]}, cache={"enabled": True})
        torch.manual_seed(0)
        text = maker(config).networks().encoders.text
        with _Executed() as recorded:
            text(torch.arange(64).reshape(8, 8)).square().mean().backward()
        executed.append({name for name in recorded.names if "attention" in name or "softmax" in name})
        gradients.append({name: parameter.grad for name, parameter in text.named_parameters()})
    assert any("flash" in name for name in executed[0])
    assert executed[1] and not any("flash" in name for name in executed[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("finetune", [False, True])
def test_a_pretrained_text_encoder_is_trained_only_if_asked_for(finetune: bool) -> None:
    text = {"encoder": "clip", "pretrained": "openai/clip-vit-base-patch32", "finetune": finetune}
    with torch.device("meta"):
        networks = maker(stage2(conditions={"text": text})).networks()
    assert {parameter.requires_grad for parameter in networks.encoders.text.parameters()} == {finetune}


@pytest.fixture(scope="session")
def lora_config(tiny_folder: Path) -> Stage2Config:
    text = {"encoder": "model"}
    data = SCENES | {"resolution": 32}
    values = {"model": str(tiny_folder), "autoencoder": None, "conditions": {"text": text}, "data": data, "unet": {}}
    return build(Stage2Config, LDM | values | {"lora": {"rank": 2, "text_encoder": True}})


def test_a_lora_on_a_models_folder_without_reading_its_weights(lora_config: Stage2Config, tiny_folder: Path) -> None:
    from ldm.training.networks import build_networks

    found = counted(lora_config)
    real = build_networks(lora_config, open_source(lora_config.data))
    for name, part in (("U-Net", real.unet), ("text encoder", real.encoders.text)):
        parameters = list(part.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        assert found.parameters[name] == (sum(p.numel() for p in parameters), trained)
    assert found.parameters["autoencoder"] == (sum(p.numel() for p in real.autoencoder.parameters()), 0)
    assert 0 < found.gradients < 0.2 * found.weights


@pytest.mark.slow
def test_stable_diffusion_at_512_px() -> None:
    """859.5 M parameters; 0.80 TFLOP forward for an image (FACTS: measured), three times that forward and backward."""
    path = ROOT / "configs/full/ldm-sd15-512.yaml"
    config = load(Stage2Config, path, ["training.batch_size=2", "training.accumulation=1"])
    found = count(DiffusionMaker(config, open_source(stage2().data), Sketch(), 2), torch.bfloat16, 1, 0)
    assert found.parameters["U-Net"] == (859_520_964, 859_520_964)
    assert found.flops / 2 == pytest.approx(3 * 0.80e12, rel=0.05)
    assert found.cached_image == 64 * 1024


# --- The plan --------------------------------------------------------------------------------------------------------


def test_times_and_what_is_needed_follow_from_the_count() -> None:
    config = stage2(training={"steps": 100, "batch_size": 16, "accumulation": 2, "validate_every": 50})
    machine = Machine(kind="cuda", here=False, devices=4, memory=2**30, low=None, overhead=1000)
    plan = make_plan(config, machine, autoencoder=stage1().autoencoder, flops=1e9)
    assert plan.micro_batch == 2
    assert plan.step_seconds == pytest.approx(2 * plan.count.flops / 1e9)
    assert plan.images_per_second == pytest.approx(16 / plan.step_seconds)
    seconds = plan.seconds()
    assert seconds["steps"] == pytest.approx(100 * plan.step_seconds)
    cache, previews = plan.count.phases["latent cache"], plan.count.phases["previews: U-Net"]
    assert seconds["latent cache"] == pytest.approx(24 / 32 * cache.flops / 1e9 / 4)  # shared out
    assert previews.calls == 2 * 25  # two previews of 25 steps each
    assert plan.peak == 1000 + plan.count.worst[1] + plan.count.gradients  # and DDP's buckets
    with pytest.raises(UserError, match="found 16 for 3 devices x accumulation 2; allowed is a multiple of 6; set 18"):
        make_plan(config, Machine(kind="cpu", here=True, devices=3, memory=1, low=None, overhead=0))


def written(tmp_path: Path, values: dict[str, Any]) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


def test_advice_that_is_followed_makes_it_fit(tmp_path: Path, lora_config: Stage2Config) -> None:
    values = LDM | {"model": lora_config.model, "autoencoder": None, "unet": {"gradient_checkpointing": True}}
    values |= {"conditions": {"text": {"encoder": "model"}}, "data": SCENES | {"resolution": 32}}
    values |= {"cache": {"batch_size": 2}, "preview": NO_LOSS}
    path = written(tmp_path, values)
    whole = make_plan(load(Stage2Config, path), MACHINE, flops=1e9)
    machine = replace(MACHINE, memory=int(0.5 * whole.peak))
    changes = advise(replace(whole, machine=machine))
    assert [change.fits for change in changes] == [False] * (len(changes) - 1) + [True]
    assert all(change.saves > 0 for change in changes)
    followed = load(Stage2Config, path, [change.override for change in changes])
    plan = make_plan(followed, machine, flops=1e9)
    assert plan.fits
    assert plan.peak == changes[-1].peak
    assert changes[0].override.startswith("training.accumulation=")  # what costs nothing comes first


def test_changes_that_save_nothing_are_not_told(plain: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(kind="cuda", here=False, devices=1, memory=1000, low=None, overhead=0)
    monkeypatch.setattr("ldm.training.plan_advice.recount", lambda *_: plain)
    plan = Plan(stage2(), machine, micro_batch=8, count=plain, measured=None, flops=None, images=24)
    assert not plan.fits
    assert advise(plan) == []
    assert as_lines(plan, [], Path("x"))[-1] == "  this is not enough: a larger machine, or a smaller network"
    assert "time: nothing is known of that machine's speed; --tflops X says what a device reaches" in as_lines(
        plan, [], Path("x")
    )


def test_what_was_measured_to_need_more_than_was_counted_is_advised_on_too(plain: Count) -> None:
    needed = plain.worst[1]
    machine = replace(MACHINE, memory=int(1.15 * needed))
    plan = Plan(stage2(), machine, 8, plain, Measured(1.0, 1.0, peak=int(1.5 * needed)), None, 24)
    assert plan.counted_peak < 0.9 * machine.memory
    assert not plan.fits
    changes = advise(plan, stage1().autoencoder)
    assert changes[-1].fits
    assert changes[-1].peak < needed / 1.3


# --- The command -----------------------------------------------------------------------------------------------------


def test_the_stage_is_told_by_the_keys(tmp_path: Path) -> None:
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        first = path.name.startswith("vae") or "train_vae.py" in path.read_text(encoding="utf-8").splitlines()[0]
        expected = Stage1Config if first else Stage2Config
        assert type(load_either(path, [])) is expected, path
    with pytest.raises(UserError, match=r"unet\.chanels: unknown key; did you mean unet\.channels"):
        load_either(written(tmp_path, LDM), ["unet.chanels=[8]"])


def test_the_command_counts_a_config_whose_files_are_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"root": "no/such/folder", "resolution": 16}
    conditions = {"text": {"encoder": "none"}, "label": {}}
    path = written(tmp_path, {**LDM, "data": data, "conditions": conditions, "cache": {"batch_size": 512}})
    words = ["plan", str(path), "--dry", "--device", "cuda", "--memory", "1.2", "--devices", "2", "--tflops", "0.001"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: 2 x cuda, 1.2 GiB each, fp32"
    assert "assumed: data no/such/folder is not here, so how many images there are is not known" in lines
    assert "assumed: labels: taken to be 1000" in lines
    standard = "taken to be Stable Diffusion's (KL-f8, 4 channels)"
    assert f"assumed: autoencoder nowhere/autoencoder is not here: {standard}" in lines
    assert any("DOES NOT FIT into 93% of 1.2" in line for line in lines)
    assert lines[-1].startswith("  cache.batch_size=")
    assert lines[-1].endswith("nothing; against the latent cache")
    assert any(line.startswith("time, at best, at 0.001 TFLOP/s") for line in lines)
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_an_autoencoder_that_is_still_to_be_made_has_the_sizes_of_its_own_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vae.yaml").write_text(dump(stage1(out="made")), encoding="utf-8")
    path = written(tmp_path, {**LDM, "autoencoder": "made/autoencoder"})
    assert main(["plan", str(path), "--json", "--tflops", "1"]) == 0
    told = capsys.readouterr()
    assert "measuring 3 micro-batches of 8 images" in told.err
    values = json.loads(told.out)
    assert values["bytes"]["step_measured"] >= values["bytes"]["process"]
    assert values["flops_a_second"] * values["step_seconds"] >= values["flops_of_a_micro_batch"] > 0
    assert values["assumed"] == []
    assert values["bytes"]["cached_image"] == 2 * 2 * 4 * 8 * 8
    assert values["fits"] and values["changes"] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--memory", "0"], "--memory: found 0.0; allowed is a number above 0"),
        (["--device", "cuda"], "--memory: found none, and this machine has no cuda; allowed is its GiB, such as 80"),
    ],
)
def test_options_that_cannot_be_are_one_line(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", str(written(tmp_path, LDM)), *words]) == 2
    assert capsys.readouterr().err == f"ldm plan: {says}\n"


@pytest.mark.slow
def test_what_is_counted_is_near_what_a_process_needs(tmp_path: Path) -> None:
    """A process of its own measures a few steps, which take what was counted and at most a quarter more.

    That is scratch space of kernels. glibc gives tensors above 32 MiB back at once, as those of real trainings are, but
    of the small ones here it would keep another half, so it is told to give back these too.
    """
    unet = {**LDM["unet"], "channels": [32, 32]}
    values = {**LDM, "unet": unet, "data": SCENES | {"resolution": 64}}
    values |= {"training": {"steps": 10, "batch_size": 24}}
    (tmp_path / "vae.yaml").write_text(dump(stage1(out="nowhere")), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "-m", "ldm.cli.main", "plan", str(written(tmp_path, values)), "--json", "--tflops", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "measuring 3 micro-batches of 24 images" in done.stderr
    sizes = json.loads(done.stdout)["bytes"]
    resting = sizes["process"] + sizes["weights"] + sizes["optimiser"] + sizes["average"]
    assert sizes["activations"] > 150 * 2**20  # else libraries that are loaded meanwhile would count for more
    assert sizes["step_measured"] - resting == pytest.approx(sizes["step"] - resting, rel=0.25)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.yaml", "vae.yaml"]

"""Models of every form by their path: folders as they are published, variants, runs, LoRAs, other autoencoders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from autoencoder.model import load_autoencoder
from conditioning.clip_tokenizer import clean, clip_vocabulary_tokenizer
from conditioning.text import TextEncoder
from ldm.adapter_layers import lora_layers, remove
from ldm.adapters import LoraConfig, add_lora, attach_lora, lora_state
from ldm.errors import UserError
from ldm.interchange.export import export
from ldm.interchange.fingerprint import base_model_hash, check_base_model
from ldm.interchange.hints import Hints
from ldm.interchange.model_card import write_model_card
from ldm.interchange.opening import open_pipeline, read_model
from ldm.interchange.single_file import read_autoencoder_file
from ldm.interchange.single_file_writer import write_single_file
from ldm.lora_files import Lora, save_lora
from ldm.lora_reading import lora_file, lora_name
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_folder import Components, read_components

MakePipeline = Callable[..., LatentDiffusionPipeline]
CPU: dict[str, Any] = {"dtype": "fp32", "device": "cpu"}
PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module")
def folder(tiny_pipeline: LatentDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny_pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def wordless(make_pipeline: MakePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without text, whose tokenizer would take most of the time."""
    path = tmp_path_factory.mktemp("wordless") / "model"
    make_pipeline(NoiseConfig(), text=False).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def networks(components: Components | LatentDiffusionPipeline) -> dict[str, nn.Module]:
    found = {"unet": components.unet, "vae": components.vae}
    return found | ({} if components.text_encoder is None else {"text": components.text_encoder.model})


def assert_same_model(found: Any, expected: Any) -> None:
    for (name, ours), theirs in zip(networks(found).items(), networks(expected).values(), strict=True):
        weights = theirs.state_dict()
        assert ours.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[key]) for key, value in ours.state_dict().items()), name


def draw(pipeline: LatentDiffusionPipeline) -> Tensor:
    return pipeline("a cat", num_inference_steps=2, guidance_scale=3.0, seed=1, output_type="pt").images


# Folders as others publish them


def old_attention(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's names of 2022, which Stable Diffusion 1.5's repository still has."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found = {}
    for key, value in weights.items():
        for new, old in names.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        found[key] = value
    return found


def publish(folder: Path) -> None:
    """Rewrite a folder as Stable Diffusion 1.5's is: old names and configs, a slow tokenizer, a safety checker."""
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(old_attention(load_file(vae)), vae)
    text = folder / "text_encoder" / "model.safetensors"
    positions = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    save_file(load_file(text) | positions, text)
    for part in ("unet", "vae"):
        path = folder / part / "config.json"
        config = json.loads(path.read_text())
        kept = ("_class_name", "act_fn", "attention_head_dim", "block_out_channels", "cross_attention_dim")
        kept += ("down_block_types", "up_block_types", "layers_per_block", "norm_num_groups", "sample_size")
        kept += ("in_channels", "out_channels", "latent_channels", "num_attention_heads", "scaling_factor")
        path.write_text(json.dumps({key: config[key] for key in kept if key in config}))
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    tokenizer = clip_vocabulary_tokenizer(16)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    special = {name: f"<|{name}oftext|>" for name in ("start", "end")}
    tokens = {"bos_token": special["start"], "eos_token": special["end"], "unk_token": special["end"]}
    (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({**tokens, "pad_token": special["end"]}))
    settings = {**tokens, "pad_token": special["end"], "do_lower_case": True, "model_max_length": 16}
    settings |= {"tokenizer_class": "CLIPTokenizer", "add_prefix_space": False, "errors": "replace"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def test_a_folder_as_stable_diffusion_1_is_published(copy: Path, tiny_pipeline: LatentDiffusionPipeline) -> None:
    publish(copy)
    again = read_components(copy)
    assert_same_model(again, tiny_pipeline)
    assert again.text_encoder is not None and tiny_pipeline.text_encoder is not None
    prompts = ["a cat!!", "", "Émigré 🐱 &amp; <b>", "word " * 40]
    assert torch.equal(again.text_encoder.tokenize(prompts), tiny_pipeline.text_encoder.tokenize(prompts))


def test_a_tokenizer_as_stable_diffusion_2_is_published_is_transformers_own(copy: Path) -> None:
    """With "!" as padding it takes every "!" of a prompt for padding: so does diffusers, and such models know no other.

    A single file holds no tokenizer, so there ids are open_clip's, as the model was trained with.
    """
    publish(copy)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = copy / "tokenizer" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))
    theirs = CLIPTokenizer.from_pretrained(copy / "tokenizer", local_files_only=True)
    ours = TextEncoder.from_pretrained(copy)
    prompts = ["a cat", "a dog on grass"]
    call: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": 16, "return_tensors": "pt"}
    assert torch.equal(ours.tokenize(prompts), theirs([clean(one) for one in prompts], **call).input_ids)
    assert ours.tokenize(["a cat"])[0, -1] == 0
    opened = clip_vocabulary_tokenizer(16, pad_token="!")
    assert torch.equal(ours.tokenize(prompts), opened(prompts, **call).input_ids)


def test_a_folder_that_diffusers_saved_by_another_pipeline(folder: Path, tmp_path: Path) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    StableDiffusionImg2ImgPipeline(**theirs.components, requires_safety_checker=False).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionImg2ImgPipeline"
    assert_same_model(read_components(tmp_path), theirs_as_ours(theirs))


def theirs_as_ours(theirs: StableDiffusionPipeline) -> Components:
    return Components(theirs.vae, theirs.unet, theirs.scheduler, TextEncoder(theirs.tokenizer, theirs.text_encoder))


def halved(folder: Path, variant: str, *, shards: bool = False) -> None:
    """Save every part again as a variant in half precision, as published folders hold it."""
    theirs = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    size = "60KB" if shards else "10GB"
    for part in PARTS:
        network = getattr(theirs, part).half()
        network.save_pretrained(folder / part, variant=variant, max_shard_size=size)


@pytest.mark.parametrize("shards", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_variant_is_chosen_by_name(folder: Path, copy: Path, shards: bool, tiny_pipeline: Any) -> None:
    halved(copy, "fp16", shards=shards)
    if shards:
        for part, name in PARTS.items():
            assert len(list((copy / part).glob(f"{name}.fp16-*-of-*.safetensors"))) > 1
    else:
        assert_same_model(read_components(copy), tiny_pipeline)
        with pytest.raises(UserError, match="found no variant 'fp32'; allowed is fp16; leave it out"):
            read_components(copy, variant="fp32")
    half = LatentDiffusionPipeline.from_pretrained(copy, variant="fp16", **CPU)
    for ours, theirs in zip(networks(half).values(), networks(tiny_pipeline).values(), strict=True):
        for name, weight in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], weight.half().float())


def test_variants_alone(wordless: Path, tmp_path: Path) -> None:
    """The only one is read unasked; of two one must be named; a part without it gives its plain weights."""
    copy = Path(shutil.copytree(wordless, tmp_path / "model"))
    for part in ("unet", "vae"):
        path = copy / part / f"{PARTS[part]}.safetensors"
        save_file({key: value.half() for key, value in load_file(path).items()}, path.with_suffix(".fp16.safetensors"))
    (copy / "unet" / f"{PARTS['unet']}.safetensors").unlink()
    half = read_components(copy)
    assert_same_model(read_components(copy, variant="fp16"), replace(half, vae=read_half_vae(copy)))
    (copy / "vae" / f"{PARTS['vae']}.fp16.safetensors").unlink()
    assert_same_model(read_components(copy, variant="fp16"), half)
    weights = load_file(copy / "unet" / f"{PARTS['unet']}.fp16.safetensors")
    save_file(weights, copy / "unet" / f"{PARTS['unet']}.other.safetensors")
    with pytest.raises(UserError, match=r"unet: found the variants fp16, other; allowed is one; name it \(variant\)"):
        read_components(copy)


def read_half_vae(folder: Path) -> Any:
    return AutoencoderKL.from_pretrained(folder / "vae", variant="fp16", torch_dtype=torch.float32)


# Hub ids: offline it can be shown that the right call is made


def test_a_hub_id_is_asked_for_the_variant_alone(wordless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(wordless)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    read_model("someone/their-model")
    with pytest.raises(UserError, match="found no variant 'fp16'"):
        read_model("someone/their-model", variant="fp16")
    (plain, variant) = asked
    assert plain[0] == variant[0] == "someone/their-model"

    def fetched(options: dict[str, Any]) -> list[str]:
        from huggingface_hub.utils import filter_repo_objects

        patterns = {"allow_patterns": options["allow_patterns"], "ignore_patterns": options["ignore_patterns"]}
        return sorted(filter_repo_objects(REPOSITORY, **patterns))

    shared = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer/vocab.json"]
    shared += ["unet/config.json"]
    assert fetched(plain[1]) == sorted([*shared, "unet/diffusion_pytorch_model.safetensors"])
    assert fetched(variant[1]) == sorted([*shared, "unet/diffusion_pytorch_model.fp16.safetensors"])


REPOSITORY = [
    *(
        "model_index.json",
        "README.md",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "scheduler/scheduler_config.json",
    ),
    *("unet/config.json", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors"),
    *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"),
    *("unet/diffusion_pytorch_model.fp16.bin", "tokenizer/vocab.json", "tokenizer/merges.txt"),
    *("safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"),
]
"""Of Stable Diffusion 1.5's."""


# Runs, files, and other autoencoders


def components_of(pipeline: LatentDiffusionPipeline) -> Components:
    return Components(pipeline.vae, pipeline.unet, pipeline.noise_scheduler, pipeline.text_encoder)


def test_a_run_and_any_file_name(wordless: Path, tiny_pipeline: LatentDiffusionPipeline, tmp_path: Path) -> None:
    shutil.copytree(wordless, tmp_path / "run" / "pipeline")
    assert_same_model(read_model(tmp_path / "run"), read_components(wordless))
    file = tmp_path / "model.pth"  # torch's zip, whatever its name
    write_single_file(components_of(tiny_pipeline), tmp_path / "model.safetensors")
    torch.save(load_file(tmp_path / "model.safetensors"), file)
    with pytest.raises(UserError, match="--allow-pickle"):
        read_model(file)
    hints = Hints(heads=(2, 2), norm_groups=8, vae_norm_groups=4, text_heads=2)
    assert_same_model(read_model(file, allow_pickle=True, hints=hints), tiny_pipeline)
    with pytest.raises(UserError, match="variant: found 'fp16' with the single file"):
        read_model(tmp_path / "model.safetensors", variant="fp16")


def test_another_autoencoder(wordless: Path, make_pipeline: MakePipeline, tmp_path: Path) -> None:
    other = make_pipeline(NoiseConfig())
    with torch.no_grad():
        for parameter in other.vae.parameters():
            parameter += 0.1
    other.save_pretrained(tmp_path / "run" / "pipeline")
    write_single_file(components_of(other), tmp_path / "whole.safetensors")
    tensors = load_file(tmp_path / "whole.safetensors")
    inside = "first_stage_model."
    alone = {key.removeprefix(inside): value for key, value in tensors.items() if key.startswith(inside)}
    save_file(alone | {"loss.logvar": torch.zeros(())}, tmp_path / "alone.safetensors")  # as vae-ft-mse is published
    hints = Hints(vae_norm_groups=4, scaling_factor=1.0)
    wanted, own = other.vae.state_dict(), read_components(wordless)
    for path in (tmp_path / "run", tmp_path / "run/pipeline", tmp_path / "run/pipeline/vae"):
        found = read_model(wordless, vae=path)
        assert all(torch.equal(found.vae.state_dict()[key], value) for key, value in wanted.items())
        assert_same_model(replace(found, vae=own.vae), own)
    for file in ("alone.safetensors", "whole.safetensors"):
        vae = read_autoencoder_file(tmp_path / file, hints=hints)
        assert all(torch.equal(vae.state_dict()[key], value) for key, value in wanted.items())
        assert vae.config.scaling_factor == 1.0
    del alone["decoder.conv_out.bias"]
    save_file(alone, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match=r"missing are 1 tensors \(first_stage_model.decoder.conv_out.bias\)"):
        read_autoencoder_file(tmp_path / "alone.safetensors", hints=hints)
    with pytest.raises(UserError, match=r"config\.json"):
        read_model(wordless, vae=tmp_path)


def test_an_autoencoder_of_other_latents_is_refused(wordless: Path, tmp_path: Path) -> None:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=r"with 3 latent channels; allowed with .* is 4"):
        read_model(wordless, vae=tmp_path / "vae")


# LoRAs by their run


@pytest.fixture(scope="module")
def loras(make_pipeline: MakePipeline) -> tuple[Lora, Lora]:
    """Two that change text encoder and U-Net."""
    pipeline = make_pipeline(NoiseConfig())
    assert pipeline.text_encoder is not None
    both, found = (pipeline.unet, pipeline.text_encoder.model), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for config in (LoraConfig(rank=4, text_encoder=True), LoraConfig(rank=2, target=("all-linear+conv",))):
            add_lora(*both, config)
            for network in both:
                for layer in lora_layers(network).values():
                    layer.lora_B["default"].weight.data.normal_(std=0.2)
            found.append(lora_state(*both))
            remove(*both)
    return found[0], found[1]


def test_loras_by_file_run_and_folder(
    folder: Path, make_pipeline: MakePipeline, loras: tuple[Lora, Lora], tmp_path: Path
) -> None:
    """Merged as the command merges them, they draw what the applied ones draw."""
    run = tmp_path / "mine"
    run.mkdir()
    save_lora(run / "lora.safetensors", loras[0])
    save_lora(tmp_path / "other.safetensors", loras[1], kind="kohya")
    applied = make_pipeline(NoiseConfig())
    assert applied.text_encoder is not None
    plain = draw(applied)
    for number, (lora, weight) in enumerate(zip(loras, (0.7, -0.4), strict=True)):
        attach_lora(applied.unet, applied.text_encoder.model, lora, weight, name=str(number))
    expected = draw(applied)
    merged = open_pipeline(folder, loras=[(run, 0.7), (tmp_path / "other.safetensors", -0.4)], **CPU)
    assert merged.name == "model + mine:0.7 + other:-0.4"
    assert (expected - plain).abs().max() > 0.1
    error = (draw(merged) - expected).abs().max()
    print(f"merged {error:.1e}")
    assert error < 1e-5
    (run / "lora.safetensors").rename(run / "pytorch_lora_weights.safetensors")  # as diffusers saves it
    assert lora_file(run).name == "pytorch_lora_weights.safetensors"
    assert lora_name(lora_file(run)) == "mine"
    with pytest.raises(UserError, match=r"found no lora\.safetensors in it"):
        open_pipeline(folder, loras=[(folder, 1.0)], **CPU)


# Whether a base model is still the same


def test_the_hash_of_a_model_is_that_of_its_weights_wherever_it_lies(wordless: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(wordless, tmp_path / "copy"))
    known = base_model_hash(wordless)
    assert len(known) == 16 and known == base_model_hash(copy)
    (copy / "README.md").write_text("changed")
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_diffusers_version": "9.9"}, indent=7))
    assert base_model_hash(copy) == known
    shutil.copytree(copy, tmp_path / "run" / "pipeline")
    assert base_model_hash(tmp_path / "run") == known
    check_base_model(tmp_path / "run", known)
    with pytest.raises(UserError, match=r"model: found another model at .* than the one this run began from"):
        check_base_model(wordless, "0" * 16)
    with pytest.raises(UserError, match="no such folder"):
        base_model_hash(tmp_path / "nothing")


def test_any_change_of_a_part_changes_the_hash(copy: Path) -> None:
    known = base_model_hash(copy)
    for part, name in PARTS.items():
        of_part, file = base_model_hash(copy / part), copy / part / f"{name}.safetensors"
        former, tensors = file.read_bytes(), load_file(file)
        for key in (min(tensors), max(tensors)):
            save_file({**tensors, key: tensors[key] + 1e-3}, file, metadata={"format": "pt"})
            assert base_model_hash(copy / part) != of_part
            assert base_model_hash(copy) != known
        file.write_bytes(former)
    for setting in ("unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        path = copy / setting
        former = path.read_bytes()
        path.write_text(json.dumps(json.loads(path.read_text()) | {"something": "else"}))
        assert base_model_hash(copy) != known
        path.write_bytes(former)
    assert base_model_hash(copy) == known


def test_large_files_are_sampled_in_every_tensor(tmp_path: Path) -> None:
    """Also what is no safetensors file, such as a pickle that may be opened."""
    generator = torch.Generator().manual_seed(0)
    tensors = {str(number): torch.randn(200, 300, generator=generator) for number in range(8)}
    file, pickled = tmp_path / "model.safetensors", tmp_path / "model.ckpt"
    for name in tensors:
        save_file(tensors, file)
        torch.save(tensors, pickled)
        known = base_model_hash(file), base_model_hash(pickled)
        changed = tensors | {name: tensors[name] * 1.001}
        save_file(changed, file)
        torch.save(changed, pickled)
        assert base_model_hash(file) != known[0]
        assert base_model_hash(pickled) != known[1]
    file.write_bytes(file.read_bytes()[:-5000])
    assert base_model_hash(file)  # a damaged one is another one


# What is written


def test_nothing_is_overwritten_unasked(folder: Path, wordless: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(wordless, tmp_path / "out", "diffusers")
    with pytest.raises(UserError, match=r"found something there already.*--overwrite"):
        export(wordless, tmp_path / "out", "diffusers")
    export(wordless, tmp_path / "out", "diffusers", overwrite=True)
    file = tmp_path / "model.safetensors"
    file.write_text("mine")
    with pytest.raises(UserError, match="found something there already"):
        export(folder, file, "single-file")
    assert file.read_text() == "mine"
    export(folder, file, "single-file", overwrite=True)
    assert len(load_file(file)) > 100


@pytest.mark.slow  # test_cli_export has a part of it
def test_loras_and_an_autoencoder_are_put_into_the_export(
    folder: Path, loras: tuple[Lora, Lora], tmp_path: Path
) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    save_lora(run / "lora.safetensors", loras[0])
    vae = load_autoencoder(folder / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.1
    vae.save_pretrained(tmp_path / "vae")
    for kind, out in (("diffusers", tmp_path / "out"), ("single-file", tmp_path / "out.safetensors")):
        export(folder, out, kind, loras=[(run, 0.5)], vae=tmp_path / "vae")  # type: ignore[arg-type]
    merged = open_pipeline(folder, loras=[(run, 0.5)], vae=tmp_path / "vae", **CPU)
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        assert_same_model(read_model(out), merged)
    assert "- mine, times 0.5" in (tmp_path / "out" / "README.md").read_text()
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["modelspec.merged_from"] == "model, mine (0.5)"


def test_the_card_names_the_model_that_a_run_began_from(wordless: Path, tmp_path: Path) -> None:
    shutil.copytree(wordless, tmp_path / "run" / "pipeline")
    config: dict[str, Any] = {"training": {"steps": 2}, "lora": {"rank": 4}, "data": {}}
    for model, line in (("owner/name", "base_model: owner/name"), ("/home/me/sd15", "- Began from: `sd15`")):
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config | {"model": model}))
        lines = write_model_card(tmp_path / "run" / "pipeline").read_text().splitlines()
        assert line in lines
        assert "- A LoRA of rank 4, merged into the weights" in lines
        assert not any("/home" in one for one in lines)

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file

from autoencoder import (
    AutoencoderConfig,
    build_autoencoder,
    decode,
    decoder_parameters,
    downsampling_factor,
    encode,
    encoder_parameters,
    freeze_encoder,
    last_decoder_layer,
    latent_channels,
    load_autoencoder,
    weights_hash,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "vae"}, "kind: found 'vae'; allowed is kl or vq"),
        ({"channels": (100,), "norm_groups": 32}, "channels: found 100; allowed is a positive multiple of norm_groups"),
        ({"channels": ()}, "channels: found none"),
        ({"latent_channels": 0}, "latent_channels: found 0; allowed is 1 or more"),
        ({"codebook_size": 1}, "codebook_size: found 1; allowed is 2 or more"),
        ({"initial_logvar": -31.0}, "initial_logvar: found -31.0; allowed is -30 to 20"),
        ({"kind": "vq", "gradient_checkpointing": True}, "gradient_checkpointing: found true with kind vq"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError) as raised:
        AutoencoderConfig(**fields)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("kind", "expected"), [("kl", AutoencoderKL), ("vq", VQModel)])
@pytest.mark.parametrize(("channels", "factor"), [((8,), 1), ((8, 16), 2), ((8, 8, 16), 4)])
def test_shapes(make, images, kind, expected, channels, factor):
    autoencoder = make(kind, channels=channels, latent_channels=3)
    moments = encode(autoencoder, images[:2])
    assert isinstance(autoencoder, expected)
    assert downsampling_factor(autoencoder) == factor
    assert latent_channels(autoencoder) == 3
    assert moments.mean.shape == moments.logvar.shape == (2, 3, 32 // factor, 32 // factor)
    assert decode(autoencoder, moments.mean).shape == (2, 3, 32, 32)
    assert autoencoder.config.scaling_factor == 1.0


@pytest.mark.parametrize("value", [-6.0, 0.0])
def test_initial_logvar_is_where_the_posterior_starts(make, images, value):
    logvar = encode(make("kl", initial_logvar=value), images).logvar
    assert logvar.mean().item() == pytest.approx(value, abs=0.5)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_fresh_convolutions_have_the_variance_of_he(kind):
    torch.manual_seed(0)
    config = AutoencoderConfig(kind=kind, channels=(32, 64), norm_groups=8, layers_per_block=1)
    autoencoder = build_autoencoder(config)
    checked = 0
    for name, weight in autoencoder.named_parameters():
        if weight.ndim == 4 and weight.numel() > 5000:
            expected = (0.1 if ".conv2." in name else 1) * (2 / weight[0].numel()) ** 0.5
            assert weight.std().item() == pytest.approx(expected, rel=0.05), name
            checked += 1
    assert checked > 10


def mean_error_after_learning_plain_colours(autoencoder, steps=80):
    """Of the last ten steps; 0.5 is what grey has."""
    optimiser = torch.optim.AdamW(autoencoder.parameters(), lr=1e-3, betas=(0.9, 0.99))
    errors = []
    for _ in range(steps):
        colours = (torch.rand(16, 3, 1, 1) * 2 - 1).expand(-1, -1, 16, 16)
        error = (decode(autoencoder, encode(autoencoder, colours).mean) - colours).abs().mean()
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        errors.append(error.item())
    return sum(errors[-10:]) / 10


def test_a_narrow_autoencoder_learns_plain_colours_sooner_than_from_torchs_weights(make):
    fields = {"channels": (8, 16, 32), "mid_attention": False}
    ours, torchs = make("kl", **fields), make("kl", **fields)
    for module in torchs.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
    ours, torchs = mean_error_after_learning_plain_colours(ours), mean_error_after_learning_plain_colours(torchs)
    assert ours < 0.25 < torchs, (ours, torchs)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_encoder_and_decoder_parameters_are_a_partition(make, kind):
    autoencoder = make(kind)
    parts = encoder_parameters(autoencoder) + decoder_parameters(autoencoder)
    assert sorted(map(id, parts)) == sorted(map(id, autoencoder.parameters()))


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_decoder_only_fine_tuning_keeps_the_latents(make, images, kind):
    autoencoder = make(kind)
    freeze_encoder(autoencoder)
    before = encode(autoencoder, images)
    codes = autoencoder.quantize.embedding.weight.clone() if kind == "vq" else None
    optimiser = torch.optim.SGD([p for p in autoencoder.parameters() if p.requires_grad], lr=0.1)
    reconstruction = decode(autoencoder, before.mean)
    (reconstruction - images).square().mean().backward()
    assert all(parameter.grad is None for parameter in encoder_parameters(autoencoder))
    assert all(parameter.grad is not None for parameter in decoder_parameters(autoencoder))
    optimiser.step()
    after = encode(autoencoder, images)
    assert torch.equal(after.mean, before.mean)
    assert torch.equal(after.logvar, before.logvar)
    assert codes is None or torch.equal(autoencoder.quantize.embedding.weight, codes)
    assert not torch.equal(decode(autoencoder, after.mean), reconstruction)


def test_last_decoder_layer_makes_the_image(make, images):
    autoencoder = make("kl")
    latents = encode(autoencoder, images[:1]).mean
    with torch.no_grad():
        last_decoder_layer(autoencoder).zero_()
        image = decode(autoencoder, latents)
    assert torch.equal(image, autoencoder.decoder.conv_out.bias.view(1, 3, 1, 1).expand_as(image))


def test_gradient_checkpointing_changes_no_gradient(make, images):
    gradients = []
    for checkpointing in (False, True):
        autoencoder = make("kl", gradient_checkpointing=checkpointing).train()
        assert autoencoder.is_gradient_checkpointing == checkpointing
        decode(autoencoder, encode(autoencoder, images[:2]).mean).square().mean().backward()
        gradients.append(autoencoder.encoder.conv_in.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_builds_at_full_size_on_the_meta_device(kind):
    with torch.device("meta"):
        autoencoder = build_autoencoder(AutoencoderConfig(kind=kind))
    assert {parameter.device.type for parameter in autoencoder.parameters()} == {"meta"}
    assert downsampling_factor(autoencoder) == 8


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_save_and_load(make, images, tmp_path, kind):
    autoencoder = make(kind).eval()
    autoencoder.save_pretrained(tmp_path / "vae")
    assert {file.name for file in (tmp_path / "vae").iterdir()} == {"config.json", WEIGHTS}
    for loaded in (load_autoencoder(str(tmp_path / "vae")), load_autoencoder(str(tmp_path), subfolder="vae")):
        assert type(loaded) is type(autoencoder)
        assert weights_hash(loaded) == weights_hash(autoencoder)
        assert torch.equal(encode(loaded, images[:1]).mean, encode(autoencoder, images[:1]).mean)


def test_pretrained_continues(make, tmp_path):
    autoencoder = make("kl")
    autoencoder.half().save_pretrained(tmp_path)
    loaded = build_autoencoder(AutoencoderConfig(pretrained=str(tmp_path), gradient_checkpointing=True))
    assert loaded.is_gradient_checkpointing
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.decoder.conv_in.weight, autoencoder.decoder.conv_in.weight.float())


def saved(autoencoder, folder: Path) -> Path:
    autoencoder.save_pretrained(folder)
    return folder


def no_folder(make, root):
    return root / "nothing" / "here" / "at all"


def empty(make, root):
    return root


def a_file(make, root):
    (root / "file").write_text("x")
    return root / "file"


def pipeline_folder(make, root):
    saved(make("kl"), root / "vae")
    return root


def broken_json(make, root):
    (saved(make("kl"), root) / "config.json").write_text("{")
    return root


def another_class(make, root):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return saved(UNet2DModel(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks), root)


def truncated(make, root):
    file = saved(make("kl"), root) / WEIGHTS
    file.write_bytes(file.read_bytes()[:1000])
    return root


def pickle_only(make, root):
    file = saved(make("kl"), root) / WEIGHTS
    torch.save(load_file(file), root / "diffusion_pytorch_model.bin")
    file.unlink()
    return root


def missing_weight(make, root):
    file = saved(make("kl"), root) / WEIGHTS
    weights = load_file(file)
    del weights["decoder.conv_out.bias"]
    save_file(weights, file)
    return root


def wrong_shape(make, root):
    config = saved(make("kl"), root) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "latent_channels": 5}))
    return root


@pytest.mark.parametrize(
    ("prepare", "error", "part"),
    [
        (no_folder, FileNotFoundError, "no such folder, and not a hub id"),
        (empty, FileNotFoundError, "found no config.json"),
        (a_file, FileNotFoundError, "give the folder that holds config.json"),
        (pipeline_folder, FileNotFoundError, "this is a pipeline, so give"),
        (broken_json, ValueError, "its config.json cannot be read"),
        (another_class, ValueError, "found 'UNet2DModel' in config.json; allowed is AutoencoderKL or VQModel"),
        (truncated, ValueError, "its weights do not load as AutoencoderKL"),
        (pickle_only, ValueError, "its weights do not load as AutoencoderKL"),
        (missing_weight, ValueError, "1 weights are missing from the file, decoder.conv_out.bias among them"),
        (wrong_shape, ValueError, "its weights do not load as AutoencoderKL"),
    ],
)
def test_load_errors_are_one_line(make, tmp_path, prepare, error, part):
    path = prepare(make, tmp_path)
    with pytest.raises(error) as raised:
        load_autoencoder(str(path))
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_hub_id_that_cannot_be_read_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^nobody/nothing/vae: no such folder, and the hub") as raised:
        load_autoencoder("nobody/nothing/vae")
    assert "\n" not in str(raised.value)


def test_pretrained_of_the_other_kind_is_refused(make, tmp_path):
    make("vq").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pretrained: found VQModel in .*; allowed is AutoencoderKL with kind kl"):
        build_autoencoder(AutoencoderConfig(pretrained=str(tmp_path)))


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_hash_changes_with_every_weight_and_the_config(make, kind):
    autoencoder = make(kind)
    seen = {weights_hash(autoencoder)}
    assert weights_hash(make(kind)) in seen
    state = autoencoder.state_dict()
    for tensor in state.values():
        tensor.view(-1)[-1] += 1e-3
        seen.add(weights_hash(autoencoder))
    autoencoder.register_to_config(scaling_factor=0.5)
    seen.add(weights_hash(autoencoder))
    assert len(seen) == len(state) + 2
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in seen)

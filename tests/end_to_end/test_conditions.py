"""One network for text, maps and masks, trained by the real commands: it obeys each, alone and together."""

from __future__ import annotations

import json

import pytest
from small import Commands

SCENES = {
    "source": "scenes",
    "resolution": 24,
    "scenes": {
        "count": 4000,
        "objects": ["circle", "cross", "triangle"],
        "colours": ["red", "green", "blue"],
        "backgrounds": ["white", "black"],
        "sizes": ["large"],
        "held_out": 0.2,
    },
}
VAE = {
    "out": "vae",
    "data": SCENES,
    "autoencoder": {
        "latent_channels": 4,
        "channels": [16, 32, 48],
        "layers_per_block": 1,
        "mid_attention": False,
        "norm_groups": 8,
    },
    "loss": {"l2_weight": 1.0, "gradient_weight": 0.5, "kl_weight": 1.0e-4},
    "discriminator": {"weight": 0},
    "optimiser": {"lr": 3.0e-3, "schedule": "cosine", "warmup_steps": 20, "betas": [0.9, 0.99]},
    "ema_decay": 0.98,
    "training": {"steps": 500, "batch_size": 16, "workers": 0, "validate_every": 10_000, "checkpoint_every": 10_000},
}
LDM = {
    "out": "ldm",
    "autoencoder": "vae/autoencoder",
    "data": SCENES,
    "conditions": {
        "text": {"length": 12, "width": 32, "layers": 1, "heads": 2, "dropout": 0.2},
        "semantic": {"channels": 4, "dropout": 0.4},
        "inpainting": {"masks": "large", "full_mask": 0.2, "dropout": 0.3},
        "label": {"width": 32, "dropout": 0.5},
    },
    "unet": {"channels": [48, 96], "layers_per_block": 1, "attention": [True, False], "heads": 4, "norm_groups": 16},
    "noise": {"schedule": "cosine", "prediction": "v_prediction", "zero_terminal_snr": True},
    "optimiser": {"lr": 2.0e-3, "schedule": "cosine", "warmup_steps": 50, "betas": [0.9, 0.99]},
    "ema_decay": 0.99,
    "preview": {"count": 8, "num_inference_steps": 15, "guidance_scale": 3.0},
    "training": {"steps": 1200, "batch_size": 32, "workers": 0, "validate_every": 10_000, "checkpoint_every": 10_000},
}

OBEYED = {
    "text": ("everything", "text_followed"),
    "label": ("object", "label_followed"),
    "semantic": ("map_iou", "semantic_followed"),
    "semantic+text": ("map_iou", "semantic_followed", "text_followed"),
    "inpainting": ("inpainting_followed",),
    "inpainting+text": ("colour", "whole"),
}
"""What beats its baseline after these few minutes. Not yet: the object that a prompt names inside a hole."""


@pytest.mark.slow
def test_one_network_obeys_text_maps_and_masks_alone_and_together(commands: Commands) -> None:
    commands.train("vae", commands.write_config("vae.yaml", VAE))
    commands.train("ldm", commands.write_config("ldm.yaml", LDM))
    words = ("evaluate", "ldm", "--conditions", "--count", 64, "--steps", 15, "--guidance", 3, "--out", "score")
    commands.ldm(*words)
    found = json.loads((commands.folder / "score" / "conditions.json").read_text(encoding="utf-8"))["measurements"]
    assert set(found) == {"text", "label", "semantic", "inpainting", "semantic+text", "inpainting+text"}
    for name, statements in OBEYED.items():
        for statement in statements:
            rate = found[name]["rates"][statement]
            assert rate["value"] - rate["baseline"] > 2 * rate["error"], (name, statement, rate)
    assert found["inpainting"]["rates"]["outside_identical"]["value"] == 1
    assert found["inpainting+text"]["rates"]["outside_identical"]["value"] == 1

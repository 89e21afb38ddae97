"""What stage 2 leaves behind: a pipeline, or a LoRA beside the model that it changes."""

from __future__ import annotations

from pathlib import Path

from ldm.adapter_layers import plain_networks
from ldm.adapters import lora_state
from ldm.lora_files import LoraInfo, save_lora
from ldm.training.stage2 import DiffusionStage


def save_result(stage: DiffusionStage, folder: Path) -> str:
    """Save the averaged weights to `folder`/pipeline and return a line that says where they are.

    A LoRA is saved as `folder`/lora.safetensors, which diffusers opens; the pipeline beside it has it merged. Raises
    `UserError` if the disk refuses.
    """
    pipeline = folder / "pipeline"
    say = f"model: {pipeline}   (ldm generate --model {pipeline} --prompt '...')"
    with stage.learner.averaged_weights():
        if stage.config.lora is None:
            stage.pipeline().save_pretrained(pipeline)
            return say
        text = stage.encoders.text.model if stage.encoders.text is not None else None
        path = folder / "lora.safetensors"
        info = LoraInfo(title=folder.name, base_model=str(stage.config.model))
        save_lora(path, lora_state(stage.unet, text, info=info))
        with plain_networks(stage.unet, text, merged=True):
            stage.pipeline().save_pretrained(pipeline)
    return f"LoRA: {path}   (ldm generate --model {stage.config.model} --lora {path} --prompt '...')\n{say}, merged"

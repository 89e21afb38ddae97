"""What stage 2 leaves behind: a pipeline, and of small changes to a model a file that holds them alone."""

from __future__ import annotations

from pathlib import Path

from conditioning.embeddings import word_vectors
from ldm.adapter_layers import plain_networks
from ldm.adapters import lora_state
from ldm.interchange.embedding_file import NAME, Embedding, save_embedding
from ldm.lora_files import LoraInfo, save_lora
from ldm.training.stage2 import DiffusionStage


def save_result(stage: DiffusionStage, folder: Path) -> str:
    """Save the averaged weights to `folder`/pipeline and return a line that says where they are.

    A LoRA is saved as `folder`/lora.safetensors, a word as `folder`/learned_embeds.safetensors, both of which diffusers
    opens; the pipeline beside it has it merged. Raises `UserError` if the disk refuses.
    """
    pipeline = folder / "pipeline"
    say = f"model: {pipeline}   (ldm generate --model {pipeline} --prompt '...')"
    with stage.learner.averaged_weights():
        if stage.config.lora is None:
            stage.pipeline().save_pretrained(pipeline)
            return f"{_save_word(stage, folder)}{say}"
        text = stage.encoders.text.model if stage.encoders.text is not None else None
        path = folder / "lora.safetensors"
        info = LoraInfo(title=folder.name, base_model=str(stage.config.model))
        save_lora(path, lora_state(stage.unet, text, info=info))
        with plain_networks(stage.unet, text, merged=True):
            stage.pipeline().save_pretrained(pipeline)
    return f"LoRA: {path}   (ldm generate --model {stage.config.model} --lora {path} --prompt '...')\n{say}, merged"


def _save_word(stage: DiffusionStage, folder: Path) -> str:
    """Save the word that was learned, if any, and return a line about it."""
    config, text = stage.config.textual_inversion, stage.encoders.text
    if config is None or text is None:
        return ""
    path = folder / NAME
    save_embedding(path, Embedding(config.token, word_vectors(text, config.token)))
    model, prompt = stage.config.model, f"a picture of {config.token}"
    return f"word: {path}   (ldm generate --model {model} --embedding {path} --prompt '{prompt}')\n"

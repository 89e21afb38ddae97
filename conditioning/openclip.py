"""OpenCLIP text towers as transformers' CLIPTextModel, so that the saved folder needs no open_clip to be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from conditioning.clip_tokenizer import VOCABULARY_SIZE
from conditioning.folders import looks_like_hub_id

_WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")


def load_openclip(architecture: str, pretrained: str, layer: Literal["last", "penultimate"]) -> CLIPTextModel:
    """The text tower of open_clip's model `architecture` with the weights `pretrained`, converted.

    `pretrained` is a local .safetensors file or a folder with one, which never touches the network, or one of
    open_clip's pretrained tags for this architecture, or a hub id: the last two are downloaded. Only the tower's own
    weights are read into memory. Raises ValueError or OSError for what does not exist or does not fit.
    """
    import open_clip
    from open_clip.model import _build_text_tower

    settings = open_clip.get_model_config(architecture)
    if settings is None:
        raise ValueError(
            f"architecture: found {architecture!r}; allowed is one of open_clip's model names, such as ViT-H-14; "
            "open_clip.list_models() lists them"
        )
    if settings["text_cfg"].get("hf_model_name"):
        raise ValueError(
            f"architecture: found {architecture}, whose text tower is not CLIP's; "
            "allowed is one with CLIP's, such as ViT-H-14; choose another"
        )
    tag = open_clip.pretrained.get_pretrained_cfg(architecture, pretrained)
    path = _weights_file(architecture, pretrained, tag)
    # A tag knows which activation its weights were trained with; open_clip's architecture may say otherwise.
    quick_gelu = bool(tag.get("quick_gelu", False) if tag else settings.get("quick_gelu", False))
    with torch.device("meta"):
        tower = _build_text_tower(settings["embed_dim"], settings["text_cfg"], quick_gelu)
    if tower.vocab_size != VOCABULARY_SIZE:
        raise ValueError(
            f"architecture: found {architecture} with {tower.vocab_size} tokens; allowed is CLIP's vocabulary of "
            f"{VOCABULARY_SIZE}; choose another"
        )
    tower.load_state_dict(_tower_weights(path, tower, architecture), assign=True)
    return openclip_to_transformers(tower, layer)


def openclip_to_transformers(tower: Any, layer: Literal["last", "penultimate"] = "penultimate") -> CLIPTextModel:
    """An open_clip text tower (TextTransformer, or a CLIP that holds one flat) as a CLIPTextModel in float32.

    Its last hidden state is the tower's, after the final norm. With `penultimate` the last block is left out, as in
    Stable Diffusion 2's folders, so that it is the penultimate state after the final norm. Raises ValueError for a
    tower that CLIPTextModel cannot hold.
    """
    blocks = list(tower.transformer.resblocks)
    if layer == "penultimate":
        if len(blocks) < 2:
            raise ValueError("layer: found penultimate for a tower of one block; allowed is last; use it")
        blocks = blocks[:-1]
    for block in blocks:
        _check_block(block)
    if getattr(tower, "cls_emb", None) is not None or tower.attn_mask is None:
        raise ValueError("openclip: found a tower with a class token or without a causal mask; allowed is CLIP's own")
    vocabulary, width = tower.token_embedding.weight.shape
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=blocks[0].mlp.c_fc.out_features,
            num_hidden_layers=len(blocks),
            num_attention_heads=blocks[0].attn.num_heads,
            max_position_embeddings=tower.positional_embedding.shape[0],
            projection_dim=width,
            hidden_act=_activation(blocks[0].mlp.gelu),
            layer_norm_eps=tower.ln_final.eps,
            pad_token_id=0,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
        )
    )
    weights = {
        "embeddings.token_embedding.weight": tower.token_embedding.weight,
        "embeddings.position_embedding.weight": tower.positional_embedding,
        **_renamed("final_layer_norm", tower.ln_final),
    }
    for index, block in enumerate(blocks):
        weights |= {f"encoder.layers.{index}.{name}": weight for name, weight in _block_weights(block).items()}
    model.load_state_dict({name: weight.detach().float() for name, weight in weights.items()})
    return model.eval()


def _block_weights(block: Any) -> dict[str, Tensor]:
    """One residual block's weights under transformers' names; open_clip stacks query, key and value in one matrix."""
    weights = {
        **_renamed("layer_norm1", block.ln_1),
        **_renamed("layer_norm2", block.ln_2),
        **_renamed("mlp.fc1", block.mlp.c_fc),
        **_renamed("mlp.fc2", block.mlp.c_proj),
        **_renamed("self_attn.out_proj", block.attn.out_proj),
    }
    for kind, stacked in (("weight", block.attn.in_proj_weight), ("bias", block.attn.in_proj_bias)):
        for letter, part in zip("qkv", stacked.chunk(3), strict=True):
            weights[f"self_attn.{letter}_proj.{kind}"] = part
    return weights


def _renamed(name: str, layer: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{kind}": weight for kind, weight in layer.named_parameters()}


def _check_block(block: Any) -> None:
    plain = type(block).__name__ == "ResidualAttentionBlock"  # not the custom one, with its further norms and scales
    if not (plain and isinstance(block.ls_1, nn.Identity) and isinstance(block.ls_2, nn.Identity)):
        raise ValueError(
            f"openclip: found a block {type(block).__name__} with parts that CLIPTextModel does not have; "
            "allowed is CLIP's plain residual block; choose another architecture"
        )


def _activation(layer: nn.Module) -> str:
    """transformers' name of the activation."""
    if type(layer).__name__ == "QuickGELU":
        return "quick_gelu"
    if isinstance(layer, nn.GELU):
        return "gelu" if layer.approximate == "none" else "gelu_pytorch_tanh"
    raise ValueError(f"openclip: found activation {type(layer).__name__}; allowed is GELU or QuickGELU; choose another")


def _weights_file(architecture: str, pretrained: str, tag: dict[str, Any]) -> Path:
    path = Path(pretrained).expanduser()
    if path.is_dir():
        files = [path / name for name in _WEIGHT_FILES if (path / name).is_file()]
        if not files:
            raise FileNotFoundError(f"pretrained: found no {' or '.join(_WEIGHT_FILES)} in {path}; name the file")
        return files[0]
    if path.exists() or path.suffix == ".safetensors":
        if path.suffix != ".safetensors":
            raise ValueError(f"pretrained: found {path}; allowed is a .safetensors file; convert it first")
        if not path.is_file():
            raise FileNotFoundError(f"pretrained: found no file {path}; check the path")
        return path
    if tag.get("hf_hub"):
        return _download(tag["hf_hub"].rpartition("/")[0])
    if not tag and looks_like_hub_id(pretrained):
        return _download(pretrained)
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    raise ValueError(
        f"pretrained: found {pretrained!r}; allowed is a .safetensors file, a hub id, or a tag of {architecture} "
        f"that the hub has as safetensors ({', '.join(tags) or 'none'}); check the name"
    )


def _download(repository: str) -> Path:
    """The weights from the hub, which the user named; safetensors only, since anything else is a pickle."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in _WEIGHT_FILES:
        try:
            return Path(hf_hub_download(repository, name))
        except EntryNotFoundError:
            continue
    raise FileNotFoundError(f"pretrained: found no {' or '.join(_WEIGHT_FILES)} at {repository}; name another one")


def _tower_weights(path: Path, tower: nn.Module, architecture: str) -> dict[str, Tensor]:
    """The tower's weights out of a checkpoint of the whole model, where they lie flat or under `text.`."""
    from safetensors import SafetensorError, safe_open

    expected = tower.state_dict()
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            prefix = "text." if "text.positional_embedding" in names else ""
            lost = sorted(name for name in expected if prefix + name not in names)
            weights = {name: file.get_tensor(prefix + name) for name in expected if name not in lost}
    except SafetensorError as error:
        raise ValueError(
            f"pretrained: found {path}, which is no safetensors file ({error}); download it again"
        ) from error
    lost += sorted(name for name, weight in weights.items() if weight.shape != expected[name].shape)
    if lost:
        raise ValueError(
            f"pretrained: found {path} without {len(lost)} of the weights of {architecture}'s text tower, "
            f"such as {lost[0]} {tuple(expected[lost[0]].shape)}; name the architecture it was trained with"
        )
    return weights

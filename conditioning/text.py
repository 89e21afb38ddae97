"""Captions to cross-attention context: CLIP, OpenCLIP, or a CLIP tower that is trained with the U-Net."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from conditioning.clip_tokenizer import VOCABULARY_SIZE, clean, clip_vocabulary_tokenizer
from conditioning.folders import pretrained_location
from conditioning.words import new_words, written_out

logger = logging.getLogger(__name__)
EncoderKind = Literal["clip", "openclip", "trained", "model", "none"]
Layer = Literal["last", "penultimate"]


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which text encoder, and how often captions are dropped in training.

    `clip`: `pretrained` is a folder or hub id in transformers' form, alone or inside a Stable Diffusion folder.
    `openclip`: `pretrained` is a local .safetensors file, or one of open_clip's pretrained tags, which is downloaded;
    `architecture` is open_clip's model name, such as ViT-H-14. `trained`: a new CLIP tower of `width`, `layers`,
    `heads` and `length`, trained with the U-Net. `model`: that of the model which is trained further. `none`: no text.

    `layer` None is the usual one: penultimate for openclip (as Stable Diffusion 2), last for the others. `length` is
    the tokens a caption is padded or cut to, at most 77 for pretrained encoders. `dropout` is the share of captions
    replaced by the empty one in training. `finetune` trains a pretrained encoder with the U-Net, too: a new word for a
    new thing is learned sooner, and old ones are forgotten sooner.
    """

    encoder: EncoderKind = "trained"
    pretrained: str | None = None
    architecture: str | None = None
    layer: Layer | None = None
    length: int = 77
    width: int = 256
    layers: int = 4
    heads: int = 4
    dropout: float = 0.1
    finetune: bool = False

    def __post_init__(self) -> None:
        for field, allowed in (("encoder", get_args(EncoderKind)), ("layer", (None, *get_args(Layer)))):
            found = getattr(self, field)
            if found not in allowed:
                names = ", ".join(str(name) for name in allowed if name is not None)
                raise ValueError(f"{field}: found {found!r}; allowed is {names}; choose one of these")
        for field in ("width", "layers", "heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: found {getattr(self, field)}; allowed is 1 or more; raise it")
        if self.length < 3:
            raise ValueError(
                f"length: found {self.length}; allowed is 3 or more, as two tokens mark the ends; 77 is CLIP's"
            )
        if self.width % self.heads:
            raise ValueError(f"heads: found {self.heads}; allowed is a divisor of width {self.width}; change either")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout: found {self.dropout}; allowed is 0 to 1; 0.1 is usual")
        self._check_source()

    def _check_source(self) -> None:
        needed = {"clip": ("pretrained",), "openclip": ("pretrained", "architecture")}.get(self.encoder, ())
        for field in ("pretrained", "architecture"):
            found = getattr(self, field)
            if field in needed and found is None:
                raise ValueError(f"{field}: found nothing; encoder {self.encoder} needs one; name it, or use trained")
            if field not in needed and found is not None:
                raise ValueError(f"{field}: found {found!r}; encoder {self.encoder} takes none; leave it out")
        if self.encoder == "trained" and self.layer == "penultimate":
            raise ValueError(
                "layer: found penultimate with encoder trained; allowed is last; lower layers by one instead"
            )
        if self.finetune and self.encoder in ("trained", "none"):
            raise ValueError(
                f"finetune: found true with encoder {self.encoder}; allowed is clip, openclip or model; leave it out"
            )


class TextEncoder(nn.Module):
    """A tokenizer and a CLIP text model: captions -> tokens [B, L] -> context [B, L, C].

    The context is the model's last hidden state after the final layer norm, which is what diffusers'
    StableDiffusionPipeline computes from the saved folder. diffusers does not `clean` prompts as CLIP's training did,
    so a prompt with broken Unicode or HTML entities differs there; plain text does not.
    """

    def __init__(self, tokenizer: CLIPTokenizer, model: CLIPTextModel) -> None:
        super().__init__()
        length, positions = tokenizer.model_max_length, model.config.max_position_embeddings
        if length > positions:
            raise ValueError(f"length: found {length}; allowed is up to {positions}, the text model's; lower it")
        self.tokenizer = tokenizer
        self.model = model

    @property
    def width(self) -> int:
        """Channels C of the context."""
        return self.model.config.hidden_size

    @property
    def length(self) -> int:
        """Tokens L that a caption is padded or cut to."""
        return self.tokenizer.model_max_length

    @property
    def blocks(self) -> int:
        """Transformer blocks of the model."""
        return self.model.config.num_hidden_layers

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids, int64 [B, L]: start, the caption cut to L - 2, end, padding. Words with n vectors are n tokens."""
        words = new_words(self.tokenizer)
        encoded = self.tokenizer(
            [written_out(clean(caption), words) for caption in captions],
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return encoded.input_ids  # [B, L]

    def truncated(self, caption: str) -> str:
        """The end of the (cleaned) caption that does not fit into the text window; empty when all of it does."""
        text = written_out(clean(caption), new_words(self.tokenizer))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        kept = self.length - 2  # the start and the end token take two places
        if len(encoded.input_ids) <= kept:
            return ""
        first_lost, _ = encoded.offset_mapping[kept]
        return text[first_lost:].strip()

    def forward(self, tokens: Tensor, clip_skip: int = 0) -> Tensor:
        """Context [B, L, C] of token ids [B, L], without the last `clip_skip` blocks: 0 to `blocks` - 1."""
        if clip_skip == 0:
            return self.model(input_ids=tokens).last_hidden_state  # [B, L, C]
        states = self.model(input_ids=tokens, output_hidden_states=True).hidden_states  # before and after each block
        return self.model.final_layer_norm(states[-1 - clip_skip])  # [B, L, C]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder`/text_encoder and `folder`/tokenizer in diffusers' layout (safetensors)."""
        target = Path(folder) / "text_encoder"
        self.model.config.architectures = ["CLIPTextModel"]
        self.model.config.save_pretrained(target)
        # The names that every transformers and every other reader knows; 5.6 dropped the prefix in memory only.
        weights = {f"text_model.{name}": weight.contiguous() for name, weight in self.model.state_dict().items()}
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        # It notes how its last text was cut and padded: the same model would be other files before and after a call.
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, variant: str | None = None) -> TextEncoder:
        """Read what `save_pretrained` wrote, or those two folders of a Stable Diffusion folder; never the network.

        `variant` is `fp16` for a file called `model.fp16.safetensors`.

        Raises FileNotFoundError when one is missing.
        """
        for part in ("text_encoder", "tokenizer"):
            if not (Path(folder) / part).is_dir():
                raise FileNotFoundError(
                    f"{folder}: found no {part} folder; a saved text encoder has one; check the path"
                )
        return load_clip(str(folder), variant=variant)


def build_text_encoder(config: TextConfig) -> TextEncoder:
    """The text encoder that `config` names; a new one takes its weights from torch's global seed.

    Raises ValueError for encoder `none`, and ValueError or OSError when a pretrained one is missing or does not fit.
    """
    if config.encoder in ("none", "model"):
        raise ValueError(f"encoder: found {config.encoder}; there is no text encoder to build; leave it None")
    if config.encoder == "trained":
        return TextEncoder(clip_vocabulary_tokenizer(config.length), _new_tower(config))
    if config.encoder == "openclip":
        from conditioning.openclip import load_openclip

        model = load_openclip(str(config.architecture), str(config.pretrained), config.layer or "penultimate")
        encoder = TextEncoder(clip_vocabulary_tokenizer(config.length, pad_token="!"), model)
    else:
        encoder = load_clip(str(config.pretrained), length=config.length, layer=config.layer or "last")
    return encoder.requires_grad_(config.finetune).train(config.finetune)


class _WholeTokenizer:
    """Makes a ValueError of what the tokenizers library raises for a broken file: a bare Exception, and none else."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is Exception:
            raise ValueError(f"pretrained: found a broken tokenizer ({error}); fetch it again") from error


def load_clip(
    name: str, *, length: int | None = None, layer: Layer = "last", variant: str | None = None
) -> TextEncoder:
    """A CLIP text model and tokenizer in transformers' form from a folder or hub id, cut at `length` and `layer`."""
    with _WholeTokenizer():
        tokenizer = CLIPTokenizer.from_pretrained(**pretrained_location(name, "tokenizer", "tokenizer_config.json"))
    model, report = CLIPTextModel.from_pretrained(
        **pretrained_location(name, "text_encoder", "config.json"),
        use_safetensors=True,
        output_loading_info=True,
        variant=variant,
        dtype=torch.float32,  # else that of the file
        ignore_mismatched_sizes=True,  # so that they are in the report
    )
    if lost := sorted(report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]}):
        raise ValueError(
            f"pretrained: found {name} without {len(lost)} weights of its CLIP text model, or with them in another "
            f"shape: {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}; allowed is a whole one; check the folder"
        )
    if left := sorted(report["unexpected_keys"]):
        logger.warning("%s: not read are %d weights that no text model has, such as %s", name, len(left), left[0])
    tokenizer.model_max_length = length or min(tokenizer.model_max_length, model.config.max_position_embeddings)
    return TextEncoder(tokenizer, without_last_block(model) if layer == "penultimate" else model)


def without_last_block(model: CLIPTextModel) -> CLIPTextModel:
    """The model without its last block, so that its last hidden state is the penultimate one after the final norm."""
    if len(model.encoder.layers) < 2:
        raise ValueError("layer: found penultimate for a text model of one block; allowed is last; use it")
    del model.encoder.layers[-1]
    model.config.num_hidden_layers -= 1
    return model


# At CLIP's 0.02 and 0.01 the contexts of two captions with another noun differ by a third at that noun: too little for
# a U-Net to notice soon that words matter (docs/reference.md).
_WORD_STD, _PLACE_STD = 0.5, 0.2


def _new_tower(config: TextConfig) -> CLIPTextModel:
    """A CLIP tower with CLIP's own initialisation (arXiv 2103.00020, section 2.4), but stronger embeddings."""
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.length,
            projection_dim=config.width,
            hidden_act="quick_gelu",
            pad_token_id=VOCABULARY_SIZE - 1,
        )
    )
    nn.init.normal_(model.embeddings.token_embedding.weight, std=_WORD_STD)
    nn.init.normal_(model.embeddings.position_embedding.weight, std=_PLACE_STD)
    return model

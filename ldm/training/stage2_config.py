"""What `train_ldm.py` reads, and which of its parts exclude each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from conditioning.embeddings import TextualInversionConfig
from ldm.adapters import LoraConfig
from ldm.data.latent_cache import CacheConfig
from ldm.data.sources import DataConfig
from ldm.noise import NoiseConfig
from ldm.objective import ObjectiveConfig
from ldm.training.conditions import ConditionsConfig
from ldm.training.learner import OptimiserConfig
from ldm.training.loop import FREE_TO_CHANGE, TrainingConfig
from ldm.training.preview import PreviewConfig
from ldm.training.prior import PriorConfig
from ldm.training.run import RuntimeConfig
from ldm.training.watch import SCENE_METRICS, WatchConfig
from ldm.unet import UNetConfig


@dataclass(frozen=True, kw_only=True)
class Stage2Config:
    """Everything that `train_ldm.py` reads."""

    out: str
    data: DataConfig
    training: TrainingConfig
    model: str | None = None  # a pipeline (a folder of ours or Stable Diffusion's, or a hub id) to train further
    autoencoder: str | None = None  # the folder that stage 1 saved, or the `vae` of another; null: the model's
    seed: int = 0
    validation_data: DataConfig | None = None  # null: previews and validation loss are of training data
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    lora: LoraConfig | None = None  # train small matrices beside the model's frozen layers instead of the layers
    prior: PriorConfig | None = None  # class images beside the data, so that the model keeps what it knew
    textual_inversion: TextualInversionConfig | None = None  # learn a word for the frozen model, and nothing else
    noise: NoiseConfig | None = None  # null: the model's, or for a new one the defaults
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    ema_decay: float = 0.9999  # after a warm-up of min(decay, (1 + n) / (10 + n)); 0 = none
    cache: CacheConfig = field(default_factory=CacheConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    watch: WatchConfig | None = None  # measure pictures every N steps and keep the best checkpoint; null: not
    compile: bool = False  # torch.compile of the U-Net: minutes at the start, a faster step afterwards
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    free_to_change: ClassVar[tuple[str, ...]] = (
        *FREE_TO_CHANGE,
        "validation_",
        "preview",
        "watch",
        "prior.batch_size",
        "cache.batch",
        "cache.workers",
    )

    def __post_init__(self) -> None:
        if self.model is None and self.autoencoder is None:
            raise ValueError(
                "autoencoder: found nothing; a new model needs the folder that stage 1 saved; name it, "
                "or name a model to train further"
            )
        if self.model is not None and self.unet.pretrained is not None:
            raise ValueError("unet.pretrained: found beside model, which has a U-Net; allowed is one; leave it out")
        if self.watch is not None and self.watch.metric in SCENE_METRICS and self.data.source != "scenes":
            raise ValueError(
                f"watch.metric: found {self.watch.metric} with data.source {self.data.source}; allowed there is fid "
                "and its like; the exact scorer knows built-in scenes only"
            )
        self._check_finetuning()
        text = self.conditions.text.encoder
        if (self.model is None) == (text == "model") and text != "none":
            allowed = (
                "clip, openclip, trained or none without a model" if self.model is None else "model or none with it"
            )
            raise ValueError(f"conditions.text.encoder: found {text}; allowed is {allowed}; set it, or model")
        if self.cache.enabled and self.data.crop == "random":
            raise ValueError(
                "data.crop: found random with cache.enabled true; cached latents are of one fixed crop; "
                "set data.crop=center or cache.enabled=false"
            )

    def bases(self) -> dict[str, str | None]:
        """The models that the run begins from, by key."""
        return {
            "model": self.model,
            "autoencoder": self.autoencoder,
            "unet.pretrained": self.unet.pretrained,
        }

    def _check_finetuning(self) -> None:
        for name in ("lora", "prior", "textual_inversion"):
            if getattr(self, name) is not None and self.model is None:
                raise ValueError(f"{name}: found without model; it belongs to a trained model; name the model")
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout: found {self.lora.dropout}; allowed is 0: its random numbers could not be repeated by a "
                "run that goes on; leave it out"
            )
        if self.conditions.text.finetune and self.lora is not None:
            raise ValueError(
                "conditions.text.finetune: found true beside lora, which leaves the model's weights as they are; "
                "set lora.text_encoder=true instead"
            )
        if self.conditions.text.finetune and self.textual_inversion is not None:
            raise ValueError(
                "conditions.text.finetune: found true beside textual_inversion, which leaves the model as it is; "
                "leave one of them out"
            )
        if self.prior is not None and self.conditions.text.encoder == "none":
            raise ValueError("prior: found for a model without text; its images are drawn from prompts; leave it out")
        if self.textual_inversion is None:
            return
        if self.conditions.text.encoder == "none":
            raise ValueError("textual_inversion: found with conditions.text.encoder none; allowed is model; set it")
        if self.lora is not None or self.prior is not None:
            other = "lora" if self.lora is not None else "prior"
            raise ValueError(
                f"{other}: found beside textual_inversion, which leaves the model as it is; allowed is one of them"
            )

"""What the shapes of a checkpoint's tensors do not tell; its header may, or the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from ldm.errors import UserError
from ldm.noise import NoiseConfig, PredictionType
from ldm.sampling import SCHEDULERS

HEADER_KEY = "ldm.hints"
Activation = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What a single file leaves open; None follows the rule, which is right for every published Stable Diffusion.

    Attributes:
        prediction: what the U-Net predicts. Else the header says it (`modelspec.prediction_type`), else ComfyUI's rule
            (`ldm.interchange.single_file`), else epsilon.
        noise: the noise schedule; else scaled_linear, 0.00085 to 0.012, in 1000 steps.
        scheduler: the scheduler that the model is saved with, a name in `ldm.sampling.SCHEDULERS`; else dpm++.
        heads: the U-Net's attention heads on each level, the finest first. Else 8 where the attention's projections are
            1x1 convolutions (Stable Diffusion 1), one for every 64 channels where they are linear (2).
        norm_groups, vae_norm_groups: groups of the group norms; else 32.
        text_heads: attention heads of the text tower; else one for every 64 channels.
        text_activation: else quick_gelu in transformers' layout (Stable Diffusion 1), gelu in open_clip's (2).
        text_blocks: how many blocks of an open_clip text tower make the context; else all but the last, and all where
            that last one is left out of the file (23 blocks of width 1024, as diffusers' own script writes them).
        text_length: tokens that a prompt is padded or cut to; else as many as the tower has positions.
        scaling_factor: of the latents; else the file's own `scale_factor`, else 0.18215.
        sample_size: side of the latents drawn unasked, or (height, width). Else by `modelspec.resolution`, else 512
            pixels, 768 for a Stable Diffusion 2 that predicts v.
    """

    prediction: PredictionType | None = None
    noise: NoiseConfig | None = None
    scheduler: str | None = None
    heads: tuple[int, ...] | None = None
    norm_groups: int | None = None
    vae_norm_groups: int | None = None
    text_heads: int | None = None
    text_activation: Activation | None = None
    text_blocks: int | None = None
    text_length: int | None = None
    scaling_factor: float | None = None
    sample_size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("norm_groups", "vae_norm_groups", "text_heads", "text_blocks", "text_length"):
            self._check(name, _is_count(getattr(self, name)), "a whole number from 1")
        self._check("heads", isinstance(self.heads, tuple) and all(map(_is_count, self.heads)), "one number a level")
        size = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,) * 2
        self._check("sample_size", len(size) == 2 and all(map(_is_count, size)), "a side, or height and width")
        factor = self.scaling_factor
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        self._check("scaling_factor", number and 0 < float(factor or 0) < 1e6, "a number above 0")
        self._check("noise", isinstance(self.noise, NoiseConfig), "a NoiseConfig")
        for name, allowed in (
            ("prediction", get_args(PredictionType)),
            ("text_activation", get_args(Activation)),
            ("scheduler", tuple(SCHEDULERS)),
        ):
            self._check(name, getattr(self, name) in allowed, ", ".join(allowed))

    def _check(self, name: str, fine: bool, allowed: str) -> None:
        found = getattr(self, name)
        if found is not None and not fine:
            raise ValueError(f"{name}: found {found!r}; allowed is {allowed}; leave it out to follow the rule")

    def over(self, other: Hints) -> Hints:
        """These hints, and where they say nothing the other's. A prediction overrules that of the other's noise."""
        said = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}
        return replace(other, **said)

    def to_header(self) -> str:
        """The value of HEADER_KEY."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None})


def hints_of_header(metadata: Mapping[str, str]) -> Hints:
    """The hints that we or a ModelSpec writer left in the header of a file. Raises UserError for what is none."""
    predictions = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
    prediction: Any = predictions.get(metadata.get("modelspec.prediction_type", ""))
    if prediction is None and metadata.get("modelspec.architecture", "").startswith("stable-diffusion-v2-768-v"):
        prediction = "v_prediction"
    try:
        said = _from_json(metadata[HEADER_KEY]) if HEADER_KEY in metadata else {}
        # The value under the public key is the one that other tools know and people edit.
        return Hints(**(said | ({"prediction": prediction} if prediction else {})))
    except (ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the header's {HEADER_KEY} cannot be used ({reason}); remove it and give hints") from error


def _from_json(text: str) -> dict[str, Any]:
    said = json.loads(text)
    if not isinstance(said, dict):
        raise ValueError("found no table")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    if values.get("noise") is not None:
        values["noise"] = NoiseConfig(**dict(said["noise"]))
    return values


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 20


NO_HINTS = Hints()

"""The frames of an interpolation: where each lies on its way, and what it is drawn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.drawing import Picture, noise_of
from ldm.cli.options import DrawingOptions, printable
from ldm.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.pipeline import LatentDiffusionPipeline

REFINEMENTS = 2
"""Of each step of the inversion, see `ldm.interpolation.invert`."""
STOCHASTIC = "ddpm"


@dataclass(frozen=True)
class Frame:
    """A place on the way: `share` of the leg from point number `leg` to the next."""

    leg: int
    share: float

    def on(self, points: Sequence[Tensor] | Tensor, mix: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
        """This place between `points`; `mix` is `slerp` or `lerp`."""
        return mix(points[self.leg], points[self.leg + 1], self.share)


@dataclass(frozen=True)
class Way:
    """What the frames have in common; `frames` lead from one point to the next, both included."""

    pipeline: LatentDiffusionPipeline
    options: DrawingOptions
    conditions: Mapping[str, Any]
    prompts: Sequence[str]
    seeds: Sequence[int]
    frames: int

    def along(self, points: int) -> list[Frame]:
        """The frames of a way through so many points; a point between two legs is there once."""
        from ldm.interpolation import fractions

        shares = fractions(self.frames)
        return [Frame(0, 0.0)] + [Frame(leg, share) for leg in range(points - 1) for share in shares[1:]]

    def picture(
        self, frame: Frame, inputs: Callable[[], Mapping[str, Any]], seed: int, points: str | None = None
    ) -> Picture:
        """The picture of a frame; `points` names those of the way for its file, if the prompts do not."""
        facts: dict[str, object] = {} if points is None else {"Points": points}
        return Picture(
            prompt=" -> ".join(self.prompts),
            seed=seed,
            inputs=lambda: {**self.conditions, **inputs()},
            facts=facts | {"Frame": frame.leg + frame.share},
        )


def between_prompts(way: Way) -> list[Picture]:
    """The encoded prompts are mixed; the noise is that of one seed."""
    from ldm.interpolation import lerp
    from ldm.pipeline_inputs import check_prompts

    check_prompts(way.pipeline.text_encoder, way.prompts, None, 1)
    context = way.pipeline.encode_prompts(way.prompts, way.options.clip_skip or 0).context  # [K, L, C]
    if context is None:
        raise UserError("--prompt: found several for a model without text; allowed is --seeds or --images")

    def picture(frame: Frame) -> Picture:
        return way.picture(frame, lambda: {"prompt_embeds": frame.on(context, lerp)}, way.seeds[0])

    return [picture(frame) for frame in way.along(len(way.prompts))]


def between_seeds(way: Way) -> list[Picture]:
    """The noise goes along the arc from each seed's to the next one's. Raises UserError for a stochastic scheduler."""
    from ldm.interpolation import slerp
    from ldm.sampling import scheduler_name

    if scheduler_name(way.pipeline.make_scheduler(way.options.scheduler)) == STOCHASTIC:
        raise UserError(
            f"scheduler: found {STOCHASTIC}, whose own noise makes neighbouring frames differ; "
            "allowed with --seeds is any other; take --scheduler ddim"
        )
    noises = [noise_of(way.pipeline, seed, way.options)[0] for seed in way.seeds]
    names = " ".join(map(str, way.seeds))

    def picture(frame: Frame) -> Picture:
        seed = way.seeds[frame.leg + round(frame.share)]
        return way.picture(frame, lambda: {"latents": frame.on(noises, slerp)}, seed, names)

    return [picture(frame) for frame in way.along(len(way.seeds))]


def between_images(way: Way, sources: Sequence[Image.Image], paths: Sequence[Path]) -> list[Picture]:
    """Along the arc between the noises that the steps of DDIM, taken backwards, make of the pictures."""
    from ldm.interpolation import slerp

    noises = inverted(way, sources)
    names = " -> ".join(printable(path.name) for path in paths)

    def picture(frame: Frame) -> Picture:
        return way.picture(frame, lambda: {"latents": frame.on(noises, slerp)}, way.seeds[0], names)

    return [picture(frame) for frame in way.along(len(sources))]


def inverted(way: Way, sources: Sequence[Image.Image]) -> Tensor:
    """The noise [K, C, h, w] that each picture is drawn from with guidance 1, resized as the options say."""
    import torch
    from tqdm import tqdm

    from conditioning.conditions import CONDITIONS, Conditions
    from ldm.canvas import InpaintingOptions
    from ldm.data.images import to_tensor
    from ldm.interpolation import invert
    from ldm.noise import NoiseSchedule
    from ldm.pipeline_conditions import tell
    from ldm.pipeline_request import make_request
    from ldm.sampling import noise_config_of, set_timesteps

    pipeline, options = way.pipeline, way.options
    request = make_request(
        pipeline,
        prompt=way.prompts[0] if way.prompts else "",
        negative_prompt=None,
        prompt_embeds=None,
        image=list(sources),
        mask_image=None,
        semantic_map=way.conditions.get("semantic_map"),
        label=way.conditions.get("label"),
        inpainting=InpaintingOptions(),
        height=options.height,
        width=options.width,
        repeats=1,
    )
    told = tell(pipeline, request, [name for name in CONDITIONS if name in request.given()])[-1]
    images = torch.stack([to_tensor(image) for image in request.images or ()])  # [K, 3, H, W]
    timesteps = set_timesteps(pipeline.make_scheduler(options.scheduler), options.num_inference_steps)
    config = noise_config_of(pipeline.noise_scheduler)
    schedule = NoiseSchedule.from_config(config).to(pipeline.device)
    with tqdm(total=len(timesteps) * (1 + REFINEMENTS), unit="step", desc="inverting") as bar:

        def denoiser(latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
            bar.update()
            return pipeline.predict(latents, t, conditions)

        latents = pipeline.encode_images(images)  # [K, C, h, w]
        return invert(denoiser, schedule, config.prediction, latents, told, timesteps, REFINEMENTS).cpu()

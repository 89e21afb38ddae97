"""By how much a model's error grows when its caption is wrong: what it uses of the words, long before pictures show it.

    python benchmarks/text_use.py configs/reference/ldm.yaml models/emoji-scenes runs/reference/ldm/checkpoints/step-500
    python benchmarks/text_use.py configs/reference/ldm.yaml models/emoji-scenes --equal-sizes --phrasing 4

Fresh scenes of two objects in a relation, of the vocabulary of the config, at several timesteps: the mean square error
of the clean latents with the true caption, and by how much it grows when the caption says the opposite relation, or
names another object in place of the first. 0 is a word that changes nothing. Takes pipelines and checkpoints of runs
(their averaged weights); one table for each, on standard output.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from learning_curve import open_checkpoint
from torch import Tensor

from ldm.config import load
from ldm.data.images import to_tensor
from ldm.data.scene_rendering import PHRASINGS, PLACED_PHRASINGS, RELATIONS, Scene, caption, render_image
from ldm.data.scenes import ScenesConfig, scene_at
from ldm.data.sources import DataConfig
from ldm.errors import UserError
from ldm.noise import NoiseSchedule, add_noise, to_x0
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_conditions import tell
from ldm.pipeline_request import Request
from ldm.randomness import derive_seed, normal_for_each
from ldm.sampling import noise_config_of
from ldm.training.stage2_config import Stage2Config
from ldm.unet import denoise

TIMESTEPS = (700, 850, 930, 970, 990)
FIRST_SCENE = 10_000_000  # beyond what any config trains on
BATCH = 64


def turned(scene: Scene, _config: ScenesConfig) -> Scene:
    """The opposite relation."""
    return dataclasses.replace(scene, relation=RELATIONS[str(scene.relation)])


def renamed(scene: Scene, config: ScenesConfig) -> Scene:
    """Another object in place of the first."""
    first, second = scene.objects
    others = [name for name in config.object_names if name not in (first.name, second.name)]
    other = others[derive_seed("another object", first.name, second.name, scene.background) % len(others)]
    return dataclasses.replace(scene, objects=(dataclasses.replace(first, name=other), second))


WRONG: dict[str, Callable[[Scene, ScenesConfig], Scene]] = {"opposite relation": turned, "another object": renamed}


def open_model(folder: Path) -> LatentDiffusionPipeline:
    """A pipeline's folder, or a checkpoint of a run."""
    if (folder / "model_index.json").is_file():
        return LatentDiffusionPipeline.from_pretrained(folder, dtype="fp32")
    return open_checkpoint(load(Stage2Config, folder.parent.parent / "config.yaml"), folder)


@torch.no_grad()
def errors(
    model: LatentDiffusionPipeline, latents: Tensor, prompts: Sequence[str], resolution: int, timestep: int
) -> Tensor:
    """Mean square error of the clean latents, [N]; the noise depends on the scene and the timestep alone."""
    noise_config = noise_config_of(model.noise_scheduler)
    schedule, found = NoiseSchedule.from_config(noise_config), []
    noise = normal_for_each(range(len(latents)), latents.shape[1:], "text use", timestep)
    for start in range(0, len(latents), BATCH):
        part = slice(start, start + BATCH)
        told = list(prompts[part])
        request = Request(told, [""] * len(told), resolution, resolution)
        timesteps = torch.full((len(told),), timestep)
        levels = schedule.levels(timesteps)
        noisy_latents = add_noise(latents[part], noise[part], levels)
        output = denoise(model.unet, noisy_latents, timesteps, tell(model, request, ("text",))[-1])
        clean = to_x0(noise_config.prediction, output, noisy_latents, levels)
        found.append((clean - latents[part]).square().flatten(1).mean(1))
    return torch.cat(found)


def measure(
    model: LatentDiffusionPipeline, scenes: ScenesConfig, resolution: int, count: int, phrasing: int
) -> dict[str, list[float]]:
    """At each of `TIMESTEPS`: the error with the true captions, and its growth with each kind of wrong one.

    `phrasing` is as in `caption`; `count` fresh scenes of `resolution` pixels.
    """
    shown = [scene_at(scenes, FIRST_SCENE + index) for index in range(count)]
    pictures = torch.stack([to_tensor(render_image(scene, resolution)) for scene in shown])  # [N, 3, H, W]
    latents = torch.cat([model.encode_images(part) for part in pictures.split(BATCH)])  # [N, C, h, w]

    def told(prompts: Sequence[str]) -> Tensor:
        return torch.stack([errors(model, latents, prompts, resolution, timestep).mean() for timestep in TIMESTEPS])

    true = told([caption(scene, phrasing) for scene in shown])  # [T]
    found = {"true captions": true.tolist()}
    for name, change in WRONG.items():
        found[name] = (told([caption(change(scene, scenes), phrasing) for scene in shown]) - true).tolist()
    return found


def vocabulary(text: str) -> DataConfig:
    """The data of a config of train_ldm.py. Raises what argparse tells in one line."""
    try:
        data = load(Stage2Config, Path(text)).data
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if len(data.scenes.object_names) < 3:
        raise argparse.ArgumentTypeError(f"found {text} with two objects or fewer; a third is needed to name another")
    return data


def model_folder(text: str) -> Path:
    """A folder that `open_model` opens. Raises what argparse tells in one line."""
    folder = Path(text)
    run = folder.parent.parent / "config.yaml"
    if (folder / "model_index.json").is_file() or ((folder / "manifest.json").is_file() and run.is_file()):
        return folder
    raise argparse.ArgumentTypeError(f"found {text!r}; allowed is a pipeline's folder or RUN/checkpoints/step-N")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=vocabulary, help="a config of train_ldm.py with the vocabulary")
    parser.add_argument("models", nargs="+", type=model_folder, help="folders of pipelines or of checkpoints")
    parser.add_argument("--count", type=int, default=192, metavar="N", help="scenes")
    parser.add_argument("--equal-sizes", action="store_true", help="scenes whose two objects have one size")
    parser.add_argument(
        "--phrasing", type=int, default=0, choices=PHRASINGS + PLACED_PHRASINGS, metavar="0..5", help="of the captions"
    )
    arguments = parser.parse_args()
    data: DataConfig = arguments.config
    scenes = dataclasses.replace(
        data.scenes, min_objects=2, max_objects=2, relations=True, equal_sizes=arguments.equal_sizes
    )
    for folder in arguments.models:
        print(f"{folder}\n| | " + " | ".join(f"t = {timestep}" for timestep in TIMESTEPS) + " |")
        print("|---" * (len(TIMESTEPS) + 1) + "|")
        for name, row in measure(
            open_model(folder), scenes, data.resolution, arguments.count, arguments.phrasing
        ).items():
            print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in row) + " |", flush=True)


if __name__ == "__main__":
    main()

"""The files in a pipeline's folder before and after the libraries read them: all that can be refused is named."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from conditioning.folders import check_stays_inside
from ldm.errors import UserError, user_input

logger = logging.getLogger(__name__)
BROKEN = (
    *(ValueError, OSError, SafetensorError, RuntimeError, KeyError, TypeError, AttributeError, IndexError),
    *(ArithmeticError, StrictDataclassError),
)
"""What the libraries raise for configurations and files that are wrong in ways that they do not look for."""
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.([A-Za-z]\w*))?(?:-\d{5}-of-\d{5})?\.safetensors")
"""A weight file's name as diffusers and transformers write it; the group is its variant."""
_LFS_POINTER = b"version https://git-lfs"
_LARGEST, _MOST_BLOCKS = 1 << 20, 256
_NUMBERS = ("scaling_factor", "beta_start", "beta_end", "num_train_timesteps")
_BLOCKS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers")
_CHOICES = {
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, diffusers and transformers print no bars and no reports of many lines: what matters we say ourselves."""
    levels = [(one, one.get_verbosity()) for one in (diffusers_logging, transformers_logging)]
    bars = transformers_logging.is_progress_bar_enabled()
    try:
        for one, _ in levels:
            one.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()
        yield
    finally:
        for one, level in levels:
            one.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def check_files(folder: Path, parts: Sequence[str]) -> None:
    """Raise UserError, naming the file, unless the parts' configs and weights are whole and no larger than a model's.

    Of weights only the headers are read.
    """
    for part in parts:
        check_config(folder / part / "config.json")
        with user_input(part or folder.name, ValueError):
            check_stays_inside(folder / part)
        for path in sorted((folder / part).glob("*.safetensors")):
            refuse_pointer(path)
            with (
                user_input(f"{path}: found no whole safetensors file", SafetensorError, OSError),
                safe_open(path, "pt"),
            ):
                pass


def refuse_pointer(path: Path) -> None:
    """Raise UserError for what a clone without Git LFS holds in place of a large file, or one that cannot be read."""
    with user_input(str(path), OSError), path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise UserError(f"{path}: found Git LFS's note of a file, not the file; run git lfs pull, or download it")


def check_config(path: Path) -> dict[str, Any]:
    """The table in a JSON file. Raises UserError for one that libraries trip over later, or have no end with."""
    with user_input(str(path), ValueError, OSError, RecursionError):
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise UserError(f"{path}: found no table of settings; allowed is what diffusers or transformers saved; mend it")
    wrong = next((f"{key} {config[key]!r}" for key in config if not _is_usable(key, config[key])), None)
    if wrong is not None:
        raise UserError(f"{path}: found {wrong}, which no such model has; save or fetch it again")
    return config


def _is_usable(key: str, value: Any) -> bool:
    """Whether a setting can be one of a model in float32; most are left to the libraries."""
    if key == "quantization_config":
        return value is None
    if key in _CHOICES:
        return value in _CHOICES[key]
    if key in _NUMBERS:
        return isinstance(value, int | float) and 0 < value < _LARGEST
    if key == "sample_size":
        sides = value if isinstance(value, list) else [value, value]
        return value is None or (len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides))
    most = _MOST_BLOCKS if key in _BLOCKS else _LARGEST
    return not any(isinstance(one, int) and abs(one) > most for one in (value if isinstance(value, list) else [value]))


def choose_variant(folder: Path, parts: Sequence[str], wanted: str | None) -> dict[str, str | None]:
    """The variant to read of each of the `parts` of a pipeline; None is the plain files.

    Those that are `wanted`, plain ones where a part has no others; without a wish plain ones, or the only variant.
    Raises UserError, with what there is, for a wish that no part fulfils, and when the choice is open.
    """
    there = {part: _variants(folder / part) for part in parts}
    everywhere = sorted({name for names in there.values() for name in names if name is not None})
    if wanted is not None and wanted not in everywhere:
        raise UserError(
            f"{folder}: found no variant {wanted!r}; allowed is {' or '.join(everywhere) or 'none'}; leave it out"
        )
    return {part: _choose(folder / part, names, wanted) for part, names in there.items()}


def _variants(part: Path) -> set[str | None]:
    """Those whose weights lie in the folder of a part. Raises UserError when there are none at all."""
    files = [path.name for path in part.iterdir()] if part.is_dir() else []
    found = {match[1] for match in map(_WEIGHTS.fullmatch, files) if match}
    if not found:
        pickled = [name for name in files if name.endswith((".bin", ".pt", ".ckpt"))]
        seen = f"{pickled[0]}, a pickle" if pickled else "no weights"
        raise UserError(
            f"{part}: found {seen}; allowed is model.safetensors or diffusion_pytorch_model.safetensors; save the "
            "model again, or, if the hub has a variant of it alone, name that (variant)"
        )
    return found


def _choose(part: Path, there: set[str | None], wanted: str | None) -> str | None:
    if wanted in there:
        return wanted
    if None in there:
        return None
    names = sorted(str(name) for name in there)
    if len(names) > 1:
        raise UserError(f"{part}: found the variants {', '.join(names)}; allowed is one; name it (variant)")
    return names[0]


def read_unet(folder: Path, variant: str | None) -> UNet2DConditionModel:
    """The U-Net in `folder`, float32. Raises ValueError, naming them, for weights that are missing."""
    unet, report = UNet2DConditionModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True, variant=variant
    )
    check_report(folder, report)
    return unet


def check_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Raise ValueError for weights that a library did not find, which it leaves random; name left over ones."""
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{folder.name}: missing are {some(missing)}; allowed is a whole model; save or fetch it again"
        )
    if left := sorted(report["unexpected_keys"]):
        logger.warning("%s: not read are %s, unexpected there", folder, some(left))


def some(names: Sequence[str]) -> str:
    """How many weights, and the first three."""
    return f"{len(names)} weights ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"

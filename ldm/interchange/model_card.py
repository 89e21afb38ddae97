"""README.md of a saved model: what it is, what it was trained on, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from conditioning.folders import looks_like_hub_id
from ldm.errors import user_input
from ldm.files import write_text
from ldm.pipeline_folder import OUR_CLASS

_PARTS = ("vae", "unet", "text_encoder", "scheduler", "semantic_encoder", "label_encoder")
_SIZES = {
    "unet": ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim"),
    "vae": ("latent_channels", "block_out_channels", "layers_per_block", "scaling_factor"),
    "text_encoder": ("hidden_size", "num_hidden_layers", "max_position_embeddings"),
    "scheduler": ("beta_schedule", "beta_start", "beta_end", "prediction_type", "rescale_betas_zero_snr"),
}
_SETTINGS = ("steps", "batch_size", "accumulation")


def write_model_card(
    folder: str | Path,
    *,
    name: str | None = None,
    title: str | None = None,
    run: str | Path | None = None,
    license: str | None = None,
    merged: Sequence[tuple[str, float]] = (),
) -> Path:
    """Write `folder`/README.md for the pipeline there, and return its path; `name` is the folder's, if not yet its own.

    `run` is the folder of the training run, by default the one that `folder` lies in; its config.yaml, report.json and
    metrics.jsonl are told as far as they are there, and so is the report of the autoencoder that it names. Absolute
    paths are shortened to their last name. `merged` are the LoRAs, name and weight, in the weights. Raises UserError
    when the folder is no pipeline or cannot be written.
    """
    folder = Path(folder)
    index = _read_json(folder / "model_index.json")
    name = name or folder.resolve().name
    run = folder.resolve().parent if run is None else Path(run)
    config = _read_config(run / "config.yaml")
    config = config if "training" in config else {}  # some other program's file of the same name
    title = title or (run.resolve().name if config else name)
    ours = index.get("_class_name") == OUR_CLASS
    parts = [
        _front_matter(index, license, config),
        f"# {title}",
        _about(folder, index),
        _usage(name, index, ours),
        _training(config) if config else "",
        _merged(merged) if merged else "",
        _measured(run, config),
        _whole_config(config) if config else "",
    ]
    text = "\n\n".join(part.strip() for part in parts if part) + "\n"
    path = folder / "README.md"
    write_text(path, text)
    return path


def _front_matter(index: Mapping[str, Any], license: str | None, config: Mapping[str, Any]) -> str:
    ours, inpainting = index.get("_class_name") == OUR_CLASS, "Inpaint" in str(index.get("_class_name"))
    task = "image-to-image" if inpainting else "text-to-image"
    tags = ["latent-diffusion", *([] if ours else ["diffusers"]), *(["inpainting"] if inpainting else [])]
    matter = {"library_name": "ldm" if ours else "diffusers", "pipeline_tag": task, "tags": tags}
    if license:
        matter["license"] = license
    if looks_like_hub_id(str(config.get("model"))):
        matter["base_model"] = str(config["model"])
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---"


def _about(folder: Path, index: Mapping[str, Any]) -> str:
    lines = ["| part | class | sizes |", "| --- | --- | --- |"]
    for part in _PARTS:
        name = (index.get(part) or [None, None])[1]
        if name is None:
            continue
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        config = _read_json(path) if path.is_file() else {}
        sizes = [f"{key} {config[key]}" for key in _SIZES.get(part, ()) if config.get(key) is not None]
        lines.append(f"| {part} | {name} | {'; '.join(sizes)} |")
    return "\n".join(["A latent diffusion model that draws pictures from text.", "", *lines])


def _usage(name: str, index: Mapping[str, Any], ours: bool) -> str:
    package, kind = ("ldm", OUR_CLASS) if ours else ("diffusers", index.get("_class_name"))
    code = f'from {package} import {kind}\n\npipe = {kind}.from_pretrained("{name}")'
    return f"## Use\n\n```python\n{code}\n```"


def _training(config: Mapping[str, Any]) -> str:
    data, training = _table(config.get("data")), _table(config.get("training"))
    source = data.get("source", "unknown")
    place = f", `{Path(str(data['root'])).name}`" if data.get("root") else ""
    lines = [f"- Data: {source}{place}, at {data.get('resolution', '?')} pixels"]
    lines += [f"- {key.replace('_', ' ').capitalize()}: {training[key]}" for key in _SETTINGS if key in training]
    lines += [f"- Seed: {config['seed']}"] if "seed" in config else []
    if config.get("model"):
        lines.insert(0, f"- Began from: `{_without_places(config['model'])}`")
    if lora := _table(config.get("lora")):
        lines.append(f"- A LoRA of rank {lora.get('rank', '?')}, merged into the weights")
    return "\n".join(["## Training", "", *lines])


def _merged(loras: Sequence[tuple[str, float]]) -> str:
    return "\n".join(["## LoRAs in the weights", "", *(f"- {name}, times {weight:g}" for name, weight in loras)])


def _measured(run: Path, config: Mapping[str, Any]) -> str:
    found = _numbers(_last_metrics(run / "metrics.jsonl"))
    reports = {"": run / "report.json"}
    if isinstance(config.get("autoencoder"), str):
        reports["autoencoder/"] = Path(str(config["autoencoder"])).parent / "report.json"
    for prefix, path in reports.items():
        if path.is_file():
            found |= {prefix + name: value for name, value in _numbers(_read_json(path)).items()}
    if not found:
        return ""
    rows = [f"| {name} | {value:.6g} |" for name, value in found.items()]
    return "\n".join(["## Measured", "", "| measure | value |", "| --- | --- |", *rows])


def _last_metrics(path: Path) -> dict[str, Any]:
    """The last value of each name; a line that a kill cut short is passed over."""
    last: dict[str, Any] = {}
    if not path.is_file():
        return last
    with user_input(str(path)):
        lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            last |= _table(json.loads(line))
        except ValueError:
            if number + 1 < len(lines):
                raise
    return last


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _whole_config(config: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(_without_places(config), sort_keys=False)
    return f"<details><summary>Configuration</summary>\n\n```yaml\n{text}```\n\n</details>"


def _without_places(value: Any) -> Any:
    """Absolute paths tell strangers about the machine, and nothing about the model."""
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    with user_input(str(path)):
        return _table(json.loads(path.read_text(encoding="utf-8")))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with user_input(str(path), ValueError, OSError, yaml.YAMLError):
        return _table(yaml.safe_load(path.read_text(encoding="utf-8")))

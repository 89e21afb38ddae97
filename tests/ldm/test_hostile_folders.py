"""A model's folder from a stranger runs no program and reads no file elsewhere; and nothing of ours would let it."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.errors import UserError
from ldm.noise import NoiseConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.pipeline_folder import read_components

ROOT = Path(__file__).parents[2]
OUTSIDE = "outside-of-every-model"
UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
ELSEWHERE = "which is not in that folder"
_opened: list[str] | None = None


def _note_opened(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None and OUTSIDE in str(arguments[0]):
        _opened.append(str(arguments[0]))


sys.addaudithook(_note_opened)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder with whole weights and a program, none of which may be opened; Python's own opens are seen."""
    global _opened  # an audit hook cannot be taken away, so it is switched
    folder = tmp_path / OUTSIDE
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w')")
    _opened = []
    yield folder
    assert _opened == []
    _opened = None
    assert not (tmp_path / "witness").exists()


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    for part in ("", "unet", "text_encoder", "tokenizer", "vae", "scheduler"):
        for name in ("evil.py", "pipeline.py", "modeling_evil.py"):
            (folder / part / name).write_text(f"open({str(tmp_path / 'witness')!r}, 'w')")
    return folder


def settings(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def moved(folder: Path, weights: str, to: Path, name: str) -> None:
    """The weights go elsewhere; what stays is an index that says they are in the file `name`, and a decoy."""
    shutil.move(folder / weights, to / "weights.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(load_file(to / "weights.safetensors"), name)})
    (folder / f"{weights}.index.json").write_text(index)
    decoy = (folder / weights).with_name(Path(weights).name.replace(".", "-00002-of-00002."))
    save_file({"x": torch.ones(1)}, decoy)


def linked(folder: Path, weights: str, to: Path) -> None:
    name = Path(weights).name.replace(".safetensors", "-00001-of-00001.safetensors")
    moved(folder, weights, to, name)
    (folder / weights).with_name(name).symlink_to(to / "weights.safetensors")


def adapter(folder: Path, to: Path) -> None:
    shutil.copytree(folder / "text_encoder", to / "text_encoder")
    told = {"base_model_name_or_path": str(to / "text_encoder"), "peft_type": "LORA"}
    (folder / "text_encoder" / "adapter_config.json").write_text(json.dumps(told))


Attack = Callable[[Path, Path], object]


def setting(name: str, **changes: object) -> Attack:
    return lambda folder, _: settings(folder / name, **changes)


REFUSED: dict[str, tuple[Attack, str]] = {
    "pipeline of its own": (setting("model_index.json", _class_name=["pipeline", "Evil"]), "allowed is"),
    "pipeline by name": (setting("model_index.json", _class_name="evil.Evil"), "found a evil.Evil"),
    "other text encoder": (setting("model_index.json", text_encoder=["evil", "Evil"]), "found text encoder Evil"),
    "autoencoder class": (setting("vae/config.json", _class_name="evil.Evil"), "found 'evil.Evil'"),
    "no autoencoder": (setting("vae/config.json", _class_name="DiffusionPipeline"), "found 'DiffusionPipeline'"),
    "scheduler path": (setting("scheduler/scheduler_config.json", _class_name="os.system"), "scheduler os.system"),
    "no scheduler": (setting("scheduler/scheduler_config.json", _class_name="DiffusionPipeline"), "scheduler Diff"),
    "a function": (setting("scheduler/scheduler_config.json", _class_name="__getattr__"), "scheduler __getattr__"),
    "a module": (setting("scheduler/scheduler_config.json", _class_name="utils"), "scheduler utils"),
    "U-Net's blocks": (setting("unet/config.json", down_block_types=["evil.Evil", "DownBlock2D"]), "evil.Evil"),
    "U-Net's function": (setting("unet/config.json", act_fn="evil.evil"), "evil.evil"),
    "text's function": (setting("text_encoder/config.json", hidden_act="evil.evil"), "evil.evil"),
    "code in text": (setting("text_encoder/config.json", auto_map={"AutoModel": "modeling_evil.Evil"}), "auto_map"),
    "code in tokenizer": (
        setting("tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]}),
        "auto_map",
    ),
    "code in U-Net": (setting("unet/config.json", auto_map={"AutoModel": "evil.Evil"}), "auto_map"),
    "kernel": (setting("text_encoder/config.json", attn_implementation="evil/kernel"), "attn_implementation"),
    "kernel in private": (
        setting("text_encoder/config.json", _attn_implementation_internal="evil/kernel"),
        "_attn_implementation_internal",
    ),
    "another model by adapter": (adapter, "adapter_config.json"),
    "U-Net above": (lambda folder, to: moved(folder, UNET, to, f"../../{OUTSIDE}/weights.safetensors"), ELSEWHERE),
    "U-Net absolute": (lambda folder, to: moved(folder, UNET, to, str(to / "weights.safetensors")), ELSEWHERE),
    "U-Net linked": (lambda folder, to: linked(folder, UNET, to), ELSEWHERE),
    "text above": (lambda folder, to: moved(folder, TEXT, to, f"../../{OUTSIDE}/weights.safetensors"), ELSEWHERE),
    "text absolute": (lambda folder, to: moved(folder, TEXT, to, str(to / "weights.safetensors")), ELSEWHERE),
    "text linked": (lambda folder, to: linked(folder, TEXT, to), ELSEWHERE),
    "tokenizer above": (
        setting("tokenizer/tokenizer_config.json", fast_tokenizer_files=[f"../{OUTSIDE}/tokenizer.4.0.json"]),
        ELSEWHERE,
    ),
}


@pytest.mark.parametrize(("attack", "says"), REFUSED.values(), ids=REFUSED)
def test_what_would_run_or_reach_elsewhere_is_refused(attack: Attack, says: str, model: Path, elsewhere: Path) -> None:
    attack(model, elsewhere)
    if _opened is not None:
        _opened.clear()  # what the attack itself opened
    with pytest.raises(UserError, match=says) as error:
        read_components(model)
    assert "\n" not in str(error.value)


HARMLESS: dict[str, Attack] = {
    "names": lambda folder, to: [
        settings(folder / name, _name_or_path=str(to), name_or_path=str(to), _commit_hash="../../x")
        for name in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "model_index.json")
    ],
    "tokenizer's files": lambda folder, to: [
        (to / "evil.json").write_text("{}"),
        settings(
            folder / "tokenizer/tokenizer_config.json",
            **dict.fromkeys(("tokenizer_file", "vocab_file", "merges_file", "name_or_path"), str(to / "evil.json")),
        ),
    ],
    "modules": setting(
        "model_index.json", text_encoder=["evil", "CLIPTextModel"], vae=["evil", "AutoencoderKL"], custom="evil.py"
    ),
}


def test_what_is_not_needed_is_not_followed(model: Path, elsewhere: Path, tiny_folder: Path) -> None:
    for attack in HARMLESS.values():
        attack(model, elsewhere)
    if _opened is not None:
        _opened.clear()
    found, wanted = read_components(model), read_components(tiny_folder)
    assert found.text_encoder is not None and wanted.text_encoder is not None
    for one, other in ((found.unet, wanted.unet), (found.text_encoder, wanted.text_encoder)):
        assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in one.state_dict().items())
    assert (
        found.text_encoder.tokenizer("a red circle").input_ids
        == wanted.text_encoder.tokenizer("a red circle").input_ids
    )


def test_shards_in_the_folder_and_the_hubs_cache_are_read(
    make_pipeline: Callable[..., LatentDiffusionPipeline], tmp_path: Path
) -> None:
    """What `check_stays_inside` must let through."""
    folder = tmp_path / "models--owner--name" / "snapshots" / "abc"
    pipeline = make_pipeline(NoiseConfig(schedule="scaled_linear"), "ddim", text=False)
    pipeline.save_pretrained(folder)
    (folder / UNET).unlink()
    pipeline.unet.save_pretrained(folder / "unet", max_shard_size="20KB")
    shards = list((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    (tmp_path / "models--owner--name" / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = tmp_path / "models--owner--name" / "blobs" / f"{number}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    found = read_components(folder).unet.state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in pipeline.unet.state_dict().items())


# --- Our own code ----------------------------------------------------------------------------------------------------

SOURCES = [
    path
    for folder in ("ldm", "autoencoder", "conditioning", "benchmarks", ".")
    for path in sorted((ROOT / folder).glob("*.py" if folder == "." else "**/*.py"))
]


def calls(path: Path) -> Iterator[tuple[ast.Call, str, dict[str, object]]]:
    """Every call with its name as it is written and its arguments that are constants."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            constants = {
                word.arg: word.value.value if isinstance(word.value, ast.Constant) else ...
                for word in node.keywords
                if word.arg is not None
            }
            yield node, ast.unparse(node.func), constants


def faults(path: Path) -> Iterator[str]:
    for node, name, words in calls(path):
        wrong = (
            name.split(".")[0] in ("pickle", "dill", "cloudpickle", "marshal", "shelve")
            or name in ("eval", "exec", "compile", "yaml.unsafe_load", "yaml.full_load", "os.system")
            or (name == "yaml.load" and not ast.unparse(node).endswith("Loader=_StrictLoader)"))  # a SafeLoader
            or (name in ("torch.load", "torch.hub.load") and words.get("weights_only") is not True)
            or words.get("weights_only", True) is not True
            or words.get("trust_remote_code", False) is not False
            or (name in ("np.load", "numpy.load") and words.get("allow_pickle", False) is not False)
            or words.get("shell", False) is not False
            or words.get("custom_pipeline") is not None
        )
        if wrong:
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"


def test_no_file_of_ours_opens_a_pickle_or_runs_a_model_program(tmp_path: Path) -> None:
    assert len(SOURCES) > 150
    assert [fault for path in SOURCES for fault in faults(path)] == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "torch.load(x, weights_only=flag)",
        "read(weights_only=False)",
        "pickle.load(f)",
        "A.from_pretrained(p, trust_remote_code=True)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(text)",
        "eval(text)",
    ],
)
def test_that_test_finds_what_it_looks_for(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text(line)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert len(list(faults(tmp_path / "a.py"))) == 1


def test_a_safe_save_is_what_it_takes(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text("torch.load(p, map_location='cpu', weights_only=True, mmap=True)\nyaml.safe_load(x)")
    assert list(faults(tmp_path / "b.py")) == []

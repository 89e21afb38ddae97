"""Bad input to any command: one line that says what is wrong, exit code 2, and nothing half-written.

Most commands run inside this process, since a new one spends its first seconds importing torch.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from small import LDM, ROOT, VAE

import train_ldm
import train_vae
from autoencoder.model import AutoencoderConfig, build_autoencoder
from ldm.cli.main import main
from ldm.training.checkpoint import CheckpointFolder

IN_PROCESS = {"runtime": {"precision": "fp32", "trackers": []}}


@pytest.fixture(autouse=True)
def _one_machine(monkeypatch, tmp_path):
    """On the CPU, in an empty folder, with no network to fall back on."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ldm(capsys):
    """`ldm WORDS`, which must be refused: returns the one line."""

    def refused(*words: object) -> str:
        try:
            code = main([str(word) for word in words])
        except SystemExit as stopped:  # argparse
            code = stopped.code
        return one_line(code, capsys.readouterr().err)

    return refused


@pytest.fixture
def train(capsys, monkeypatch, tmp_path):
    """`train_X.py CONFIG OVERRIDES`: returns exit code and the lines on stderr."""

    def run(stage: str, values: dict | Path, *overrides: str) -> tuple[int, list[str]]:
        config = values
        if isinstance(values, dict):
            config = tmp_path / "config.yaml"
            config.write_text(yaml.safe_dump({"out": "run", **IN_PROCESS, **values}), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", [f"train_{stage}.py", str(config), *overrides])
        try:
            code = {"vae": train_vae, "ldm": train_ldm}[stage].main()
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr().err.splitlines()

    return run


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own that can be filled up."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk needs root: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def latents(tmp_path):
    """A fresh autoencoder, saved as stage 1 would."""
    folder = tmp_path / "autoencoder"
    build_autoencoder(
        AutoencoderConfig(channels=(4, 4), latent_channels=2, layers_per_block=1, norm_groups=2)
    ).save_pretrained(folder)
    return folder


def one_line(code: object, err: str) -> str:
    """The one line on stderr; a progress bar that had begun before does not count."""
    assert code == 2, err
    lines = [line for line in err.splitlines() if line and "/s]" not in line]
    assert len(lines) == 1, err
    return lines[0]


def fill(folder: Path, leave: int = 0) -> Path:
    """Take all the room of a disk but `leave` bytes."""
    filler = folder / "filler"
    size = shutil.disk_usage(folder).free - leave
    try:
        with filler.open("wb") as file:
            file.write(b"x" * max(size, 0))
            if not leave:
                while True:
                    file.write(b"x" * 512)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    return filler


def files(folder: Path) -> list[str]:
    """What lies in the folder, but for what fills the disk and the lock of a run, which says nothing of it."""
    passed_over = ("filler", ".lock")
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name not in passed_over)


def images(folder: Path, good: int, bad: int = 0) -> Path:
    folder.mkdir()
    for i in range(good):
        Image.new("RGB", (20, 20), (9 * i, 0, 0)).save(folder / f"{i:03d}.png")
    for i in range(bad):
        (folder / f"bad{i:03d}.png").write_bytes(b"no image at all")
    return folder


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["genrate"], "did you mean generate?"),
        (["generate", "--modle", "m"], "--model"),
        (
            ["generate", "--model", "m", "--prompt", "a", "--steps", "many"],
            "argument --steps: invalid int value: 'many'",
        ),
        (["generate", "--model", "/none/at/all", "--prompt", "a"], "/none/at/all: no such folder"),
        (["generate", "--model", "m", "--prompts", "none.txt"], "--prompts none.txt"),
        (["generate", "--model", "m", "--prompts", "empty.txt"], "found no prompt"),
        (["generate", "--model", "m"], "m: no such folder"),  # a model without text needs no prompt
        (["generate", "--model", "m", "--prompt", "a", "--size", "big"], "--size: found 'big'"),
        (["generate", "--model", "m", "--prompt", "a", "--scheduler", "dmp++"], "did you mean dpm++?"),
        (["generate", "--model", "m", "--prompt", "a", "--guidance", "-1"], "guidance_scale: found -1.0"),
        (["generate", "--model", "m", "--prompt", "a", "--out", "file.txt"], "--out file.txt"),
        (["generate", "--model", "m", "--prompt", "a", "--out", "file.txt/below"], "--out file.txt/below"),
        (["generate", "--model", "folder", "--prompt", "a"], "found no model_index.json"),
        (["data", "check", "none"], "none: no such folder"),
        (["data", "check", "file.txt"], "file.txt: no such folder"),
        (["data", "check", "folder"], "holds no images"),
        (["data", "check", "folder", "--json", "none/report.json"], "--json: no folder none"),
        (["data", "scenes", "folder"], "not an empty folder"),
        (["data", "scenes", "new", "--count", "0"], "found 0"),
        (["data", "scenes", "new", "--kind", "emojis"], "invalid choice: 'emojis'"),
        (["data"], "check|scenes"),
        (["evaluate", "none", "--out", "new"], "no such config"),
        (["evaluate", "folder", "--out", "new"], "no such config"),
        (["evaluate", "folder", "--data", "photos.yaml", "--out", "new"], "found no model_index.json"),
        (["evaluate", "folder", "--data", "photos.yaml", "--conditions", "--out", "new"], "found data.source folder"),
        (["evaluate", "folder", "--data", "scenes.yaml", "--sweep", "1,x", "--out", "new"], "--sweep: found '1,x'"),
        (["evaluate", "folder", "--data", "scenes.yaml", "--extractor", "eyes", "--out", "new"], "kind: found 'eyes'"),
        (["compare", "folder", "--data", "scenes.yaml", "--out", "new"], "found 1 model"),
        (["evaluate", "folder", "--data", "wrong.yaml", "--out", "new"], "did you mean data.resolution?"),
        (["evaluate", "folder", "--data", "scenes.yaml", "--out", "new"], "found no model_index.json"),
        (["evaluate", "folder", "--data", "scenes.yaml", "--out", "file.txt"], "--out file.txt"),
        (["evaluate", "folder", "--data", "scenes.yaml", "--out", "new", "--scheduler", "dim"], "did you mean ddim?"),
        (["evaluate", "folder", "--data", "scenes.yaml", "--out", "new", "--batch", "0"], "--batch: found 0"),
        (["evaluate", "folder", "--data", "scenes.yaml", "--out", "new", "--device", "tpu9"], "device: found 'tpu9'"),
        (["reconstruct", "none", "--data", "photos", "--out", "new"], "none: no such folder"),
        (["reconstruct", "folder", "--data", "photos", "--out", "new"], "folder"),
        (["reconstruct", "none", "--data", "none", "--out", "new"], "none: no such folder"),
        (["reconstruct", "none", "--data", "photos", "--out", "file.txt"], "--out file.txt"),
        (["reconstruct", "none", "--data", "photos", "--out", "new", "--resolution", "4"], "resolution: found 4"),
        (["reconstruct", "none", "--data", "photos", "--out", "new", "--batch", "0"], "--batch"),
    ],
)
def test_commands(ldm, tmp_path, words, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.md").write_text("no image", encoding="utf-8")
    (tmp_path / "file.txt").write_text("text", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    for name, data in (("photos", {"root": "photos"}), ("wrong", {"resolutoin": 16}), ("scenes", VAE["data"])):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"data": data}), encoding="utf-8")
    images(tmp_path / "photos", good=2)
    before = files(tmp_path)
    assert says in ldm(*words)
    assert files(tmp_path) == before


def test_unreadable_images_are_listed_and_the_exit_code_says_so(tmp_path, capsys):
    assert main(["data", "check", str(images(tmp_path / "photos", good=1, bad=2))]) == 1
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()[:2]] == ["bad000.png", "bad001.png"]
    assert "Traceback" not in err


def test_reconstructing_unreadable_images(ldm, tmp_path, latents):
    root = images(tmp_path / "photos", good=0, bad=3)
    line = ldm("reconstruct", latents, "--data", root, "--out", "new", "--resolution", "16")
    assert "none of 3 images can be read" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["traning.steps=3"], "traning: unknown key; did you mean training?"),
        (["training.step=3"], "training.step: unknown key; did you mean training.steps?"),
        (["training.steps=many"], "training.steps: found 'many' (text); allowed is a whole number"),
        (["training.steps=0"], "training.steps: found 0; allowed is 1 or more"),
        (["loss.reconstruction=l3"], "loss.reconstruction: found 'l3' (text); allowed is one of l1, l2"),
        (["training.steps"], "override 'training.steps': allowed is key.sub=value"),
        (["data={source: folder}"], "data.root: found nothing for source folder"),
        (["data={source: folder, root: none}"], "none: no such folder"),
        (["validation_data={source: folder, root: none}"], "none: no such folder"),
        (["autoencoder={pretrained: none}"], "none: no such folder"),
        (["loss={perceptual: lpips, lpips_weights: none}"], "lpips_weights: found no file or folder none"),
        (["out=file.txt"], "file.txt"),
    ],
)
def test_training_stage_1(train, tmp_path, overrides, says):
    (tmp_path / "file.txt").write_text("text", encoding="utf-8")
    code, lines = train("vae", VAE, *overrides)
    assert code == 2
    assert says in lines[-1]
    assert not [line for line in lines if "Traceback" in line]
    # Nothing that would stand in the way of the corrected command.
    assert files(tmp_path) in (["config.yaml", "file.txt"], ["config.yaml", "file.txt", "run"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file or directory"),
        ("out: [", "not valid YAML"),
        ("- a list", "a config is a mapping"),
        ("out: a\nout: b\n", "the key 'out' is written twice"),
        ("", "out: missing; it is required"),
    ],
)
def test_a_config_that_is_none(train, tmp_path, text, says):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    for stage in ("vae", "ldm"):
        code, lines = train(stage, path)
        assert says in one_line(code, "\n".join(lines))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["autoencoder=none"], "none: no such folder"),
        (["conditions.text={encoder: clip, pretrained: none}"], "none"),
        (["conditions.text={encoder: clpi}"], "did you mean clip?"),
        (["unet={pretrained: none}"], "none"),
        (["unet.heads=3"], "unet.heads: found 3"),
        (["data={source: folder, root: none}"], "none: no such folder"),
        (["data.crop=random"], "data.crop: found random with cache.enabled true"),
    ],
)
def test_training_stage_2(train, tmp_path, latents, overrides, says):
    before = files(tmp_path)
    code, lines = train("ldm", {**LDM, "autoencoder": str(latents)}, *overrides)
    assert code == 2
    assert says in lines[-1]
    assert not [line for line in lines if "Traceback" in line]
    assert files(tmp_path) in (sorted([*before, "config.yaml"]), sorted([*before, "config.yaml", "run"]))


def test_a_mistake_found_after_the_folder_was_made_can_be_mended(train):
    assert train("vae", VAE, "autoencoder={pretrained: none}")[0] == 2
    assert train("vae", VAE, "training.steps=1")[0] == 0


@pytest.mark.parametrize("cache", [True, False])
def test_too_many_unreadable_images_stop_stage_2(train, tmp_path, latents, cache):
    root = images(tmp_path / "photos", good=6, bad=4)
    data = {"source": "folder", "root": str(root), "resolution": 16}
    values = {**LDM, "autoencoder": str(latents), "data": data, "cache": {"enabled": cache, "workers": 0}}
    code, lines = train("ldm", values)
    assert code == 2
    assert "more than data.max_bad_share 0.01 allows" in lines[-1]
    assert "run/quarantine.jsonl lists them" in lines[-1]
    # One of the two cures that the line names.
    assert train("ldm", values, "data.max_bad_share=0.5", "training.steps=1")[0] == 0


def test_no_readable_image_at_all_leaves_no_cache(train, tmp_path, latents):
    root = images(tmp_path / "photos", good=0, bad=4)
    values = {**LDM, "autoencoder": str(latents), "data": {"source": "folder", "root": str(root), "resolution": 16}}
    code, lines = train("ldm", {**values, "cache": {"workers": 0}})
    assert code == 2
    assert "none of 4 images can be read" in lines[-1]
    assert files(tmp_path / "run") == []


def test_a_full_disk_while_scenes_are_written(ldm, small_disk):
    fill(small_disk, leave=60_000)
    line = ldm("data", "scenes", small_disk / "new", "--count", "200")
    assert f"{small_disk / 'new'}: cannot be written" in line
    assert "No space left on device" in line
    assert files(small_disk) == []


def test_a_full_disk_while_a_report_is_written(ldm, tmp_path, capsys):
    root = images(tmp_path / "photos", good=1)
    assert main(["data", "check", str(root), "--json", "/dev/full"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ldm data: /dev/full: cannot be written: ")
    assert "No space left on device" in line


def test_a_full_disk_while_a_checkpoint_is_written(train, small_disk):
    """The checkpoint before stays, and the run goes on from it once there is room."""
    run = small_disk / "run"
    steps = {**VAE, "out": str(run), "training": {**VAE["training"], "checkpoint_every": 1}}
    assert train("vae", steps, "training.steps=1")[0] == 0
    filler = fill(small_disk, leave=40_000)
    code, lines = train("vae", steps, "training.steps=3")
    assert code == 2
    assert "step-2: cannot be written, earlier ones are kept" in lines[-1]
    assert "No space left on device" in lines[-1]
    assert not [line for line in lines if "Traceback" in line]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]
    assert CheckpointFolder(run / "checkpoints", keep=2).latest().step == 1
    filler.unlink()
    assert train("vae", steps, "training.steps=3")[0] == 0
    assert CheckpointFolder(run / "checkpoints", keep=2).latest().step == 3


def test_a_full_disk_at_the_start_and_for_the_finished_autoencoder(train, small_disk):
    run = small_disk / "run"
    values = {**VAE, "out": str(run)}
    filler = fill(small_disk)
    code, lines = train("vae", values, "training.steps=1")
    assert code == 2
    assert "No space left on device" in lines[-1]
    filler.unlink()
    assert train("vae", values, "training.steps=1")[0] == 0
    shutil.rmtree(run / "autoencoder")
    fill(small_disk, leave=20_000)
    code, lines = train("vae", values, "training.steps=1")
    assert code == 2
    assert f"{run / 'autoencoder'}: cannot be written" in lines[-1]
    assert not [name for name in files(run) if "partial" in name]


def test_a_full_disk_while_latents_are_cached(train, small_disk, latents):
    """A mapped file on a full disk would kill the process by SIGBUS, so the room is taken beforehand."""
    values = {**LDM, "autoencoder": str(latents), "cache": {"folder": str(small_disk / "latents"), "workers": 0}}
    for leave in (5_000, 14_000):  # too little for the moments; enough for them, too little for what follows
        filler = fill(small_disk, leave)
        code, lines = train("ldm", values)
        assert code == 2
        assert f"latent cache {small_disk / 'latents'}: cannot be written" in lines[-1]
        assert "No space left on device" in lines[-1]
        assert files(small_disk) == []
        filler.unlink()


def test_a_full_disk_as_the_real_program_tells_it(small_disk, latents, tmp_path):
    """TensorBoard writes from a thread of its own, which must not spoil the one line."""
    values = {**LDM, "autoencoder": str(latents), "out": str(small_disk / "run"), "cache": {"workers": 0}}
    fill(small_disk, leave=60_000)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**values, "runtime": {"precision": "fp32"}}), encoding="utf-8")
    command = [sys.executable, str(ROOT / "train_ldm.py"), str(config)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("train_ldm.py: ")
    assert "No space left on device" in result.stderr.splitlines()[-1]
    assert not [name for name in files(small_disk) if "part" in name]

"""DESIGN.md, held to: who may import whom, what may not be written, and what `import ldm` may load."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("autoencoder", "conditioning", "ldm")
FLOORS = (
    ("autoencoder", "conditioning"),
    ("ldm", "ldm.errors", "ldm.files", "ldm.randomness"),
    ("ldm.noise",),
    (
        "ldm.data",
        "ldm.objective",
        "ldm.guidance",
        "ldm.projected_guidance",
        "ldm.sampling",
        "ldm.interpolation",
        "ldm.attention",
        "ldm.unet",
        "ldm.growing",
        "ldm.adapters",
        "ldm.adapter_layers",
        "ldm.lora_files",
        "ldm.lora_reading",
        "ldm.picture",
        "ldm.canvas",
        "ldm.mask_shaping",
        "ldm.device",
    ),
    (
        "ldm.pipeline",
        "ldm.pipeline_model",
        "ldm.pipeline_memory",
        "ldm.pipeline_folder",
        "ldm.pipeline_inputs",
        "ldm.pipeline_request",
        "ldm.pipeline_conditions",
        "ldm.pipeline_weights",
    ),
    ("ldm.training", "ldm.evaluation", "ldm.interchange"),
    ("ldm.config",),
    ("ldm.cli", "train_vae", "train_ldm"),
)
"""DESIGN.md section 2, lowest first. A part may import its own floor and lower ones."""
LAZY = {("ldm", "ldm.pipeline")}
"""`from ldm import LatentDiffusionPipeline` is found at first use: an upward edge for type checkers only."""
WITHOUT_DOCSTRING = {
    # Named tuples whose fields say it all, one comment each.
    "autoencoder.discriminator.Judgement",
    "autoencoder.latents.Quantised",
    "autoencoder.latents.ScaledPair",
}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of ours, by dotted name."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    found = {}
    for path in [*paths, ROOT / "train_vae.py", ROOT / "train_ldm.py"]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports_of(name: str) -> set[str]:
    """The modules of ours that a module imports, inside functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: write imports out in full"
            module = str(node.module)
            # `from ldm import config` is the module, `from ldm import __version__` the package.
            found.update(
                f"{module}.{alias.name}" if f"{module}.{alias.name}" in modules() else module for alias in node.names
            )
    return found & modules().keys()


def edges() -> set[tuple[str, str]]:
    return {(name, other) for name in modules() for other in imports_of(name)}


def part_of(name: str) -> str:
    """The entry of FLOORS that a module belongs to: the longest that it begins with."""
    parts = [
        part for floor in FLOORS for part in floor if name == part or (name.startswith(f"{part}.") and part != "ldm")
    ]
    assert parts, f"{name} stands on no floor: add it to FLOORS and to DESIGN.md"
    return max(parts, key=len)


def floor_of(name: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if part_of(name) in floor)


def test_the_imports_are_found():
    # What the tests below rely on: nested imports, packages, names that are modules.
    assert ("train_vae", "ldm.training.stage1") in edges()  # inside a function
    assert ("ldm.cli.data", "ldm.data.check") in edges()  # for type checkers
    assert ("ldm.cli.main", "ldm") in edges()
    assert floor_of("ldm.data.scenes") == floor_of("ldm.unet") > floor_of("ldm.noise")


def test_imports_point_down():
    upwards = {edge for edge in edges() if floor_of(edge[1]) > floor_of(edge[0])}
    assert upwards == LAZY


@pytest.mark.parametrize("leaf", ["autoencoder", "conditioning"])
def test_a_leaf_imports_nothing_of_ours(leaf):
    assert {edge for edge in edges() if part_of(edge[0]) == leaf and part_of(edge[1]) != leaf} == set()


def test_no_circles():
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for name, other in edges() - LAZY:
        graph[name].add(other)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_commands_are_imported_by_nobody():
    names = ("entry", "options", "memory", "drawing", "saving", "masked", "frames", "reporting")
    shared = {f"ldm.cli.{name}" for name in names}
    found = {(a, b) for a, b in edges() if part_of(b) == "ldm.cli" and b not in shared}
    assert found == set()
    users = {name for name, other in edges() if other == "ldm.cli.entry"}
    assert {name for name in users if part_of(name) != "ldm.cli"} == {"train_vae", "train_ldm"}


@pytest.mark.parametrize("name", sorted(modules()))
def test_source(name):
    tree = modules()[name]
    assert ast.get_docstring(tree), f"{name}: a docstring tells what the file is for"
    for node in ast.walk(tree):
        place = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = [getattr(node, "module", None), *(alias.name for alias in node.names)]
            unsafe = {"pickle", "dill", "cloudpickle", "joblib", "shelve"} & {str(i).split(".")[0] for i in imported}
            assert not unsafe, f"{place}: {unsafe} runs what a file says"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.hub.load"):
            safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
            assert safe, f"{place}: torch.load without weights_only=True runs what a file says"
        if isinstance(node, ast.ExceptHandler):
            caught = "everything" if node.type is None else ast.unparse(node.type)
            names = {part.strip() for part in caught.strip("()").split(",")}
            assert not names & {"everything", "Exception", "BaseException"}, f"{place}: name what is expected"
        if isinstance(node, ast.Assert):
            pytest.fail(f"{place}: an assert is no answer to a user, and -O removes it; raise")


def test_public_functions_and_classes_say_what_they_do():
    missing = {
        f"{name}.{node.name}"
        for name, tree in modules().items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    }
    assert missing - WITHOUT_DOCSTRING == set()


def python(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)


HEAVY = "{'torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'accelerate', 'yaml'} & set(sys.modules)"


def test_import_ldm_loads_nothing_heavy():
    assert python("-c", f"import sys, ldm; print({HEAVY})").stdout.strip() == "set()"


@pytest.mark.parametrize(
    "command",
    [
        "generate",
        "inpaint",
        "outpaint",
        "img2img",
        "interpolate",
        "data",
        "reconstruct",
        "evaluate",
        "compare",
        "export",
        "plan",
    ],
)
def test_the_help_of_a_command_loads_nothing_heavy(command):
    call = f"try:\n    main([{command!r}, '--help'])\nfinally:\n    print({HEAVY})"
    code = f"import sys\nfrom ldm.cli.main import main\n{call}"
    lines = python("-c", code).stdout.splitlines()
    assert lines[-1] == "set()"
    assert lines[0].startswith(f"usage: ldm {command}")


def test_help_is_instant_and_loads_nothing_heavy():
    code = f"import sys\nfrom ldm.cli.main import main\nmain(['--help'])\nprint({HEAVY})"
    assert python("-c", code).stdout.splitlines()[-1] == "set()"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert "usage: ldm COMMAND" in python("-m", "ldm.cli.main", "--help").stdout
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("script", ["train_vae.py", "train_ldm.py"])
def test_the_help_of_training(script):
    out = python(script, "--help").stdout
    assert out.startswith(f"usage: {script}")
    assert "key.sub=value" in out

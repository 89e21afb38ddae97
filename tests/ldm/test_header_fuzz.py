"""Damaged and hostile weight files: every reader gives whole tensors or one line; no crash, no hang, no large memory.

Real files are mutated by bytes and by structure (shapes, offsets, types, lengths, names, nesting). A child process
reads them under limits of the system: of its memory (what it has, and 64 MB more) and of its processor time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import resource
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conditioning.encoder_folder import read_weights
from conditioning.label import LabelEncoder
from ldm.cli.entry import run_command
from ldm.errors import UserError
from ldm.evaluation.weight_files import read_weights as read_network
from ldm.interchange.embedding_file import Embedding, read_embedding, save_embedding
from ldm.interchange.weight_file import open_weights
from ldm.lora_files import Lora, LoraInfo, LoraLayer, save_lora
from ldm.lora_reading import checked_lora, read_lora
from ldm.pipeline_weights import check_files
from ldm.training.checkpoint import load_checkpoint

MODULES = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",)
ROOM = 64 << 20
SLOWEST = 2.0  # seconds of processor time for one file; milliseconds are usual

Read = Callable[[Path], list[Tensor]]


@dataclass(frozen=True)
class Reader:
    """Something that opens weight files, and a real file for it."""

    name: str
    """Of the file in its folder."""
    read: Read
    sample: bytes


def _lora(path: Path) -> list[Tensor]:
    layers = read_lora(checked_lora(path), MODULES).unet.values()
    return [tensor for layer in layers for tensor in (layer.down, layer.up)]


def _all(path: Path) -> list[Tensor]:
    with open_weights(path) as file:
        return [file.read(key) for key in file.shapes]


def _checkpoint(path: Path) -> list[Tensor]:
    """One whose manifest was made for the damaged file, so that its hash says nothing."""
    manifest = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    (path.parent / "state.json").write_text('{"step": 3}')
    return [tensor for named in load_checkpoint(path.parent).tensors.values() for tensor in named.values()]


def _label(path: Path) -> list[Tensor]:
    encoder = LabelEncoder(("cat", "dog"), 6)
    try:
        read_weights(path.parent, encoder)
    except (ValueError, FileNotFoundError) as error:  # a leaf's words for a mistake of the user
        raise UserError(str(error)) from error
    return list(encoder.state_dict().values())


def _part(path: Path) -> list[Tensor]:
    if not (path.parent / "config.json").exists():
        (path.parent / "config.json").write_text("{}")
    check_files(path.parent, [""])
    return []


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> list[Reader]:
    folder = tmp_path_factory.mktemp("samples")

    def saved(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
        save_file(tensors, folder / "file.safetensors", metadata=metadata)
        return (folder / "file.safetensors").read_bytes()

    lora, word = folder / "lora.safetensors", folder / "word.safetensors"
    save_lora(lora, Lora({MODULES[0]: LoraLayer(torch.ones(2, 4), torch.ones(4, 2), 2.0, "")}, {}, LoraInfo(title="x")))
    save_embedding(word, Embedding("<w>", torch.ones(2, 8)))
    several = {"a.weight": torch.ones(2, 3), "a.step": torch.tensor(3), "b": torch.ones(4, dtype=torch.float16)}
    network = {name: weight.contiguous() for name, weight in LabelEncoder(("cat", "dog"), 6).state_dict().items()}
    return [
        Reader("lora.safetensors", _lora, lora.read_bytes()),
        Reader("word.safetensors", lambda path: [read_embedding(path).vectors], word.read_bytes()),
        Reader("unet.safetensors", _checkpoint, saved(several)),
        Reader("file.safetensors", _all, saved(several, {"ldm.hints": "{}"})),
        Reader("model.safetensors", _label, saved(network)),
        Reader("diffusion_pytorch_model.safetensors", _part, saved(several)),
        Reader(
            "net.safetensors", lambda path: list(read_network("x", path, allow_pickle=False).values()), saved(several)
        ),
    ]


# --- Mutations -------------------------------------------------------------------------------------------------------

HUGE = (2**31, 2**32 + 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
ODD: tuple[Any, ...] = (-1, 0, 1, 0.5, 1e400, -0.0, None, True, "", "F32", [], {}, [[]], *HUGE)
TYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "OBJECT", "", "F32\0")
NAMES = (
    "",
    "../x",
    "/etc/passwd",
    "a\nb",
    "a\0b",
    "\x1b[2J",
    "é" * 40,
    "a" * 70_000,
    "__metadata__",
    "emb_params",
    "alpha",
)
CHARACTERS = b'0123456789"{}[]:,.-aFIUeEnult\\ \x00\x7f\xff\xc3\xed\xa0'


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def joined(header: str | bytes, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


def by_bytes(content: bytes, chance: random.Random) -> bytes:
    """Flips, cuts, insertions and lengths."""
    end, changed = min(max(9, 8 + int.from_bytes(content[:8], "little")), len(content)), bytearray(content)
    kind = chance.randrange(6)
    if kind == 0:
        for _ in range(chance.choice((1, 1, 2, 8))):
            changed[chance.randrange(end)] ^= 1 << chance.randrange(8)
    elif kind == 1:
        for _ in range(chance.choice((1, 2, 8))):
            changed[chance.randrange(8, end)] = chance.choice(CHARACTERS)
    elif kind == 2:
        del changed[chance.randrange(len(changed)) :]
    elif kind == 3:
        length = chance.choice((0, 1, end - 9, end - 7, end + 1, len(content), *HUGE, chance.randrange(2**64)))
        changed[:8] = (length % 2**64).to_bytes(8, "little")
    elif kind == 4:
        start = chance.randrange(len(changed))
        changed[start : start + chance.randrange(9)] = chance.randbytes(chance.randrange(9))
    else:
        start, to = sorted(chance.randrange(8, len(changed)) for _ in range(2))
        changed[start:start] = changed[start:to]
    return bytes(changed)


def by_structure(content: bytes, chance: random.Random) -> bytes:
    """A header that is well-formed JSON, and wrong."""
    header, data = split(content)
    key = chance.choice([name for name in header if name != "__metadata__"])
    entry = header[key]
    kind = chance.randrange(11)
    if kind == 0:
        entry["shape"] = [chance.choice((*HUGE, 0, 1, 2, 3)) for _ in range(chance.randrange(5))]
    elif kind == 1:
        entry["shape"] = chance.choice([chance.choice(ODD), [chance.choice(ODD)], [1] * 5000])
    elif kind == 2:
        start, end = entry["data_offsets"]
        step = chance.choice((-4, -1, 1, 4, 8, *HUGE))
        entry["data_offsets"] = chance.choice(([start + step, end], [start, end + step], [end, start], [0, step]))
    elif kind == 3:
        entry["data_offsets"] = chance.choice([chance.choice(ODD), [chance.choice(ODD)] * chance.randrange(4)])
    elif kind == 4:
        entry["dtype"] = chance.choice((*TYPES, *ODD))
    elif kind == 5:
        header[chance.choice(NAMES)] = dict(entry) if chance.random() < 0.5 else header.pop(key)
    elif kind == 6:
        header["__metadata__"] = chance.choice((*ODD, {"ldm.hints": chance.choice(ODD)}, {"a" * 9000: "b" * 9000}))
    elif kind == 7:
        left_out = chance.choice(("shape", "dtype", "data_offsets", None))
        header[key] = {name: value for name, value in entry.items() if name != left_out} | {"extra": 1}
    elif kind == 8:  # nested without end, and very many tensors of no size
        depth = chance.choice((100, 127, 128, 5000))
        bombs = ("[" * depth, "[" * depth + "]" * depth, '{"a":' * depth, '{"a":' * depth + "1" + "}" * depth)
        bomb = chance.choice(bombs)
        return joined(chance.choice((bomb, f'{{"__metadata__": {bomb}}}', f'{{"x": {{"shape": {bomb}}}}}')), data)
    elif kind == 9:  # a key twice
        text = json.dumps(header)
        return joined(
            f"{text[:-1]}, {json.dumps(key)}: {json.dumps({**entry, 'shape': [chance.choice(HUGE)]})}}}", data
        )
    else:
        header = {str(i): {**entry, "shape": [0, chance.choice(HUGE)], "data_offsets": [0, 0]} for i in range(200)}
    return joined(json.dumps(header), data if chance.random() < 0.7 else data + chance.randbytes(4))


def mutated(readers: list[Reader], seed: int, count: int) -> Iterator[tuple[Reader, bytes]]:
    for number in range(count):
        chance = random.Random(f"{seed}/{number}")
        reader = readers[number % len(readers)]
        content = chance.choice((by_bytes, by_structure))(reader.sample, chance)
        yield reader, by_bytes(content, chance) if chance.random() < 0.15 and len(content) > 9 else content


# --- The run ---------------------------------------------------------------------------------------------------------


def read_all(readers: list[Reader], seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Read mutated files; what went wrong is under "wrong"."""
    tried: Counter[str] = Counter()
    wrong, slowest = [], 0.0
    places = {reader.name: folder / reader.name.split(".")[0] / reader.name for reader in readers}
    for place in places.values():
        place.parent.mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, (reader, content) in enumerate(mutated(readers, seed, count)):
        path = places[reader.name]
        path.write_bytes(content)
        begun = time.process_time()
        try:
            tensors = reader.read(path)
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            tried["read"] += 1
            if size > 4 * len(content):  # float16 becomes float32; nothing else grows
                wrong.append(f"{number}: {size} bytes of tensors out of a file of {len(content)}")
            del tensors
        except UserError:
            tried["refused"] += 1
        except Exception as error:  # noqa: BLE001 - the finding
            wrong.append(f"{number} ({reader.name}): {type(error).__name__}: {str(error)[:200]}")
        slowest = max(slowest, time.process_time() - begun)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {**tried, "wrong": wrong[:20], "slowest": slowest, "grown": grown}


def in_a_child(readers: list[Reader], seed: int, count: int, seconds: int) -> dict[str, Any]:
    """`read_all` in a fork that may not take much memory or time; a crash of it is an error here."""
    with tempfile.TemporaryDirectory() as name:
        answer = Path(name) / "answer.json"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                warnings.simplefilter("ignore")
                gc.disable()
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
                answer.write_text(json.dumps(read_all(readers, seed, count, Path(name))))
                code = 0
            except Exception:  # noqa: BLE001 - the fork must end here whatever happened
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code == 0, f"the reader ended with {code} (-N: by signal N)"
        return json.loads(answer.read_text())


def assert_harmless(found: dict[str, Any], count: int) -> None:
    assert found["wrong"] == []
    assert found["read"] + found["refused"] == count
    assert found["read"] > count // 50 and found["refused"] > count // 2  # both ways are really taken
    assert found["slowest"] < SLOWEST
    assert found["grown"] < ROOM >> 20  # MB
    print({name: found[name] for name in ("read", "refused", "slowest", "grown")})


def test_the_samples_are_read(readers: list[Reader], tmp_path: Path) -> None:
    for reader in readers:
        path = tmp_path / reader.name
        path.write_bytes(reader.sample)
        reader.read(path)


def test_1500_damaged_files(readers: list[Reader]) -> None:
    assert_harmless(in_a_child(readers, seed=0, count=1500, seconds=60), 1500)


@pytest.mark.slow
def test_100000_damaged_files(readers: list[Reader]) -> None:
    for seed in range(1, 11):
        assert_harmless(in_a_child(readers, seed, count=10_000, seconds=600), 10_000)


def test_a_name_in_a_file_gives_no_orders_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a\x1b[2J\nb\x07": torch.ones(2)}, tmp_path / "lora.safetensors")
    assert run_command("ldm", lambda: (_lora(tmp_path / "lora.safetensors"), 0)[1]) == 2
    said = capsys.readouterr().err
    assert "found a\\x1b[2J b\\x07, which no plain LoRA has" in said
    assert said.count("\n") == 1


# --- A checkpoint's own files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("manifest.json", '{"../step-1/unet.safetensors": "x"}', "allowed are names of files in the folder"),
        ("manifest.json", '{"/etc/passwd": "x"}', "allowed are names of files in the folder"),
        ("manifest.json", "[]", "no table"),
        ("manifest.json", "[" * 100_000, "recursion"),
        ("manifest.json", "\xff\xfe", "utf-8"),
        ("state.json", "[]", "no table"),
        ("state.json", '{"step": "3"}', "found step '3'"),
        ("state.json", '{"step": -1}', "found step -1"),
        ("state.json", '{"step": true}', "found step True"),
    ],
)
def test_a_checkpoint_that_lies_about_itself(name: str, content: str, says: str, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "unet.safetensors")
    manifest = {"unet.safetensors": hashlib.sha256((tmp_path / "unet.safetensors").read_bytes()).hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "state.json").write_text('{"step": 3}')
    assert load_checkpoint(tmp_path).step == 3
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=says) as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)

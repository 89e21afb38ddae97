from __future__ import annotations

import pytest
import torch

from ldm.device import choose_device, choose_dtype
from ldm.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_names_of_types(name: str, dtype: torch.dtype) -> None:
    assert choose_dtype(name, CPU) is dtype
    assert choose_dtype(dtype, CPU) is dtype


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("avx512_bf16", [True, False])
def test_auto_is_bf16_only_on_a_cpu_that_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert choose_dtype("auto", CPU) is (torch.bfloat16 if amx or avx512_bf16 else torch.float32)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_only_on_a_gpu_that_does_not_emulate_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert choose_dtype("auto", torch.device("cuda")) is dtype


def test_auto_takes_the_gpu_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU


def test_wrong_names_say_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="dtype: found 'float64'; allowed is auto, fp32, bf16, fp16"):
        choose_dtype("float64", CPU)
    with pytest.raises(UserError, match=r"dtype: found torch\.int8"):
        choose_dtype(torch.int8, CPU)
    with pytest.raises(UserError, match="device: found 'gpu'; allowed is auto, cpu, cuda"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(UserError, match="this machine has 1 usable CUDA devices"):
        choose_device("cuda:1")

"""Which device and which floating type to compute in."""

from __future__ import annotations

import torch

from ldm.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device called `name`; "auto" takes the first of CUDA, Apple's MPS and the CPU that is there.

    Raises UserError for a name that torch does not know or a device that this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: found {name!r}; allowed is auto, cpu, cuda, cuda:N or mps") from error
    # torch keeps the index in 8 bits: of cuda:99999 a negative number remains.
    if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(f"device: found {name}; this machine has {found} usable CUDA devices; use auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device: found {name}; this machine has no MPS; use auto or cpu")
    return device


def choose_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The floating type called `name`: "auto", "fp32", "bf16", "fp16", or a torch dtype, which is returned as it is.

    "auto" is bf16 where the device multiplies it in hardware: CUDA since Ampere, and CPUs with AMX tiles. All else gets
    fp32: on a CPU with AVX2 only, bf16 was measured to be about a hundred times slower than fp32.
    """
    if isinstance(name, torch.dtype):
        if name not in DTYPES.values():
            raise UserError(f"dtype: found {name}; allowed is torch.float32, torch.bfloat16 or torch.float16")
        return name
    if name == "auto":
        return torch.bfloat16 if _fast_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype: found {name!r}; allowed is auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()

"""Which device and which floating type to compute in."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

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

    "auto" is bf16 where the device multiplies it in hardware: CUDA since Ampere, and CPUs with AMX tiles or with
    AVX512_BF16 (AMD since Zen 4; measured there: twice fp32's speed in Stable Diffusion's convolutions, 1.6 times in
    training a small U-Net). All else gets fp32: on a CPU with AVX2 only, bf16 was measured to be about a hundred times
    slower than fp32.
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
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def total_memory(device: torch.device) -> int:
    """Bytes that there are on the device; of the CPU what this machine has, or this process is allowed to use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    written = [path.read_text(encoding="utf-8").strip() for path in limits if path.is_file()]
    return min([total, *(int(limit) for limit in written if limit.isdecimal())])


def start_peak(device: torch.device) -> None:
    """Forget the peak so far. Where the system cannot (all but Linux), `peak_memory` is that of the whole process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5): the resident set's high-water mark


def peak_memory(device: torch.device) -> int:
    """Bytes at most since `start_peak`: what torch held of a CUDA device, on a CPU all memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return _resident_set("VmHWM")


def process_memory() -> int:
    """Bytes of main memory that this process has now (outside Linux: the most it has had)."""
    return _resident_set("VmRSS")


def _resident_set(field: str) -> int:
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS

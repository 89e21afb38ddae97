"""Memory and open files after hundreds of steps are what they were before; benchmarks/memory_growth.py goes further."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from small import ROOT


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_neither_memory_nor_open_files_grow(tmp_path):
    spec = importlib.util.spec_from_file_location("memory_growth", ROOT / "benchmarks" / "memory_growth.py")
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark
    spec.loader.exec_module(benchmark)
    # Checkpoints and previews come every 75 steps, so the first look is at a process that has done all there is to do.
    _, settled, last = benchmark.measure(tmp_path, 1500, [200, 500, 1500])
    assert last.step - settled.step >= 900
    assert last.memory - settled.memory < 8 * 1024  # KiB; a kilobyte a step would be a megabyte
    assert last.worker_memory - settled.worker_memory < 4 * 1024
    assert last.open_files <= settled.open_files + 2  # a checkpoint may be being written
    assert last.worker_open_files <= settled.worker_open_files

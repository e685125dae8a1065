"""What the workers' server imports leaves CUDA alone: a worker forked after it would fail at its first touch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dig.environment import COMPILES_VARIABLE, ROOT

CHECK = """
import sys
import torch

def forbidden(*arguments, **keywords):
    raise AssertionError("CUDA was asked for")

# Whatever starts CUDA in a process comes through one of these.
torch._C._cuda_init = forbidden
for name in ("_lazy_init", "current_device", "get_device_properties", "get_device_capability"):
    setattr(torch.cuda, name, forbidden)
import bench.run.preload
assert not torch.cuda.is_initialized()
assert {"bench.run.worker", "dig.raster"} <= sys.modules.keys(), sorted(sys.modules)
# What only fla and mamba-ssm need is left out where they are not installed.
from dig.packages import is_installed
assert is_installed("fla") or is_installed("mamba_ssm") or "transformers" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("compiles", ["", "1"])
def test_importing_it_starts_no_cuda(compiles: str) -> None:
    """PyTorch's compiler comes with it only where cases are compiled."""
    code = CHECK + f'assert ("torch._inductor.compile_fx" in sys.modules) == bool("{compiles}")\n'
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, COMPILES_VARIABLE: compiles},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_package_that_is_broken_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "fla.py").write_text("")
    (tmp_path / "einops.py").write_text("print('tried'); raise RuntimeError('built for another torch')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    code = "import bench.run.preload, sys; assert 'bench.run.worker' in sys.modules and 'einops' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "tried\n"


@pytest.mark.slow
def test_a_package_that_would_start_cuda_is_left_to_the_workers(tmp_path: Path) -> None:
    """As torchao does, which transformers imports where it is installed."""
    (tmp_path / "mamba_ssm.py").write_text("")
    (tmp_path / "einops.py").write_text("import torch\ntorch.cuda._lazy_init()\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    code = """
import sys, torch
started = []
torch.cuda._lazy_init = start = lambda: started.append(1)
import bench.run.preload
assert not started and "einops" not in sys.modules and "bench.run.worker" in sys.modules
assert torch.cuda._lazy_init is start
"""
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)

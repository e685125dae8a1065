"""Kernels that tune themselves: a check takes the first tiles, a case compiles all at once, a build keeps none."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cases.case import Case
from bench.cases.jobs import ParityJob
from bench.measure import tuners
from bench.run import worker
from dig.environment import ROOT

FIRST = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, triton
import triton.language as tl
from bench.measure.tuners import take_first_tiles

take_first_tiles()
assert os.environ["FLA_CACHE_RESULTS"] == "0"

@triton.autotune(configs=[triton.Config({"SIZE": size}) for size in (16, 32, 64)], key=["n"])
@triton.jit
def count(x, n, SIZE: tl.constexpr):
    tl.store(x, tl.load(x) + SIZE)

x = torch.zeros(1)
count[(1,)](x, 1)
print(int(x), count.best_config.kwargs)
count[(1,)](x, 2)
print(int(x), count.best_config.kwargs)
"""

KEPT = """
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Hopper:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Hopper())
import bench.measure.tuners as tuners
if FIRST:
    tuners.take_first_tiles()

@triton.autotune(
    configs=[triton.Config({"SIZE": size}) for size in (16, 32)], key=["n"], cache_results=True,
    do_bench=lambda call, quantiles: [float(FIRST)] * 3,
)
@triton.jit
def count(x, n, SIZE: tl.constexpr):
    tl.store(x, tl.load(x) + SIZE)

count.fn.run = lambda *args, **named: None
count[(1,)](torch.zeros(1), 1)
print(count.best_config.kwargs, count.cache_results)
"""

TOGETHER = """
import threading, time, types
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from bench.measure.tuners import compile_side_by_side

class Hopper:  # What compiles without a GPU; nothing is launched on it.
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Hopper())
compile_side_by_side(3)
compile_side_by_side(3)  # Once a process.

class TimedFirst(Exception):
    pass

def time_tiles(call, quantiles):
    raise TimedFirst

@triton.autotune(
    configs=[triton.Config({"SIZE": size}, num_warps=warps) for size in (16, 32, 48) for warps in (1, 2)],
    key=[], do_bench=time_tiles,
)
@triton.jit
def count(x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)  # 48 is no power of 2: it does not compile.
    tl.store(x + at, tl.load(x + at) + SIZE)

alive = most = 0
lock = threading.Lock()
compile_one = triton.compiler.compile

def watched(*what, **named):
    global alive, most
    with lock:
        alive += 1
        most = max(alive, most)
    time.sleep(0.2)
    try:
        return compile_one(*what, **named)
    finally:
        with lock:
            alive -= 1

triton.compiler.compile = watched
try:
    count[(1,)](torch.zeros(64))
except TimedFirst:
    print(len(count.fn.device_caches[0][0]), most, alive)
"""


def run(script: str, folder: Path) -> str:
    pytest.importorskip("triton")
    file = folder / "tuned.py"  # Triton reads a kernel's source, which -c has none of.
    file.write_text(script)
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(file)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**variables, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_parity_check_takes_the_first_tiles_and_runs_no_other(tmp_path: Path) -> None:
    first = {"SIZE": 16}
    assert run(FIRST, tmp_path) == f"{2 * 16} {first}\n{4 * 16} {first}"


def test_a_case_compiles_all_tiles_at_once_before_it_times_the_first(tmp_path: Path) -> None:
    # Four of the six compile; three at a time, none any more when the first is timed.
    assert run(TOGETHER, tmp_path) == "4 3 0"


def test_a_build_keeps_no_choice_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    autotune = pytest.importorskip("torch._inductor.runtime.autotune_cache")
    kept = autotune.AutotuneCache.save
    monkeypatch.setattr(autotune.AutotuneCache, "save", kept)  # put back afterwards
    tuners.keep_no_tuning()
    assert autotune.AutotuneCache.save is not kept
    written = pickle.dumps(autotune.AutotuneCache.__new__(autotune.AutotuneCache).save)
    monkeypatch.undo()
    assert pickle.loads(written).__func__ is kept  # What the process that measures reads, which never saw ours.
    tuners.keep_no_tuning()
    assert autotune.AutotuneCache.save(object(), "config", 1, triton_cache_hash="x") is None


def test_a_build_reads_and_keeps_nothing_that_a_kernel_timed_of_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    autotuner = pytest.importorskip("triton.runtime.autotuner")
    autotune = pytest.importorskip("torch._inductor.runtime.autotune_cache")
    monkeypatch.setattr(autotune.AutotuneCache, "save", autotune.AutotuneCache.save)  # put back afterwards
    monkeypatch.setattr(autotuner.Autotuner, "check_disk_cache", autotuner.Autotuner.check_disk_cache)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tuners.keep_no_tuning()
    timed: list[bool] = []
    tuner = autotuner.Autotuner.__new__(autotuner.Autotuner)
    assert tuner.check_disk_cache(("key",), [], lambda: timed.append(True)) is False
    assert timed
    assert not list(tmp_path.iterdir())
    named = inspect.signature(autotuner.Autotuner.check_disk_cache).parameters
    monkeypatch.undo()
    # Triton calls it by position; another signature would end a build where it tunes.
    assert len(named) == len(inspect.signature(autotuner.Autotuner.check_disk_cache).parameters)


def test_tiles_that_nobody_timed_are_kept_for_nobody(tmp_path: Path) -> None:
    assert run("FIRST = True\n" + KEPT, tmp_path) == "{'SIZE': 16} True"
    assert not list(tmp_path.rglob("*.autotune.json"))
    run("FIRST = False\n" + KEPT, tmp_path)
    assert list(tmp_path.rglob("*.autotune.json"))


def test_a_comparison_takes_the_first_tiles_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(worker, "take_first_tiles", lambda: done.append("first tiles"))
    monkeypatch.setattr(worker, "check_against_reference", lambda case: done.append("compared"))
    case = Case(model="DiT-S/8", resolution=64, dtype="fp32", device="cpu", mode="forward")
    assert worker.check_parity(ParityJob(case=case)) == {}
    assert done == ["first tiles", "compared"]

"""What changes a number is in its key: a resumed run measures again under other circumstances."""

from __future__ import annotations

import inspect
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench.cases.case import Case
from bench.cases.jobs import BUDGETS
from bench.measure.memory import MemoryMeter
from bench.measure.steps import build_step
from bench.measure.timing import sample
from bench.parity.inputs import fill_zeros, make_inputs
from bench.parity.reference import check_against_reference
from bench.store.identity import MEASURING, VERSIONS, code_hash, measurement_key
from dig.environment import CIRCUMSTANCES, ROOT, describe_environment, telling_variables
from dig.flops import model_macs
from dig.spec import create_model

CASE = Case(model="DiT-S/8", resolution=64, device="cpu")
KEY = """
from dig.environment import describe_environment
from bench.store.identity import measurement_key
from bench.cases.jobs import BUDGETS
from bench.cases.case import Case
case = Case(model="DiT-S/8", resolution=64, device="cpu")
print(measurement_key(case, code="", environment=describe_environment(), budget=BUDGETS["cpu"]))
"""


def key() -> str:
    """The key of a case, measured here and now."""
    return measurement_key(CASE, code="", environment=describe_environment(), budget=BUDGETS["cpu"])


@pytest.fixture(autouse=True)
def _untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of this machine's that can change a number."""
    for name in telling_variables(os.environ):
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "variable",
    [
        "OMP_NUM_THREADS=2",
        "MKL_NUM_THREADS=2",
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False",
        "PYTORCH_ALLOC_CONF=max_split_size_mb:64",
        "CUDA_LAUNCH_BLOCKING=1",
        "NVIDIA_TF32_OVERRIDE=0",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1",
        "CUBLAS_WORKSPACE_CONFIG=:4096:8",
        "TRITON_INTERPRET=1",
        "TORCHINDUCTOR_MAX_AUTOTUNE=1",
        "LD_PRELOAD=libjemalloc.so",
    ],
)
def test_variables_that_change_a_number_change_the_key(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setenv(*variable.split("=", 1))
    assert key() != before


@pytest.mark.parametrize("before", [["nice"], ["env", "HOME=/", "NVIDIA_API_KEY=x", "CUDA_HOME=/y"]])
def test_what_changes_no_number_changes_no_key(before: list[str]) -> None:
    """Another process, with other priority, home and secrets, has this one's."""
    done = subprocess.run([*before, sys.executable, "-c", KEY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == key()


def test_fewer_cpus_and_less_memory_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    # A container's limit may be the lower one.
    monkeypatch.setattr("dig.environment._control_groups", lambda controller: iter(()))
    before, allowed = key(), os.sched_getaffinity(0)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = 1 << 45 if limits[1] == resource.RLIM_INFINITY else limits[1]
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most - 4096, limits[1]))
        assert key() != before
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert (key() != before) == (len(allowed) > 1)
    finally:
        os.sched_setaffinity(0, allowed)
    assert key() == before


def test_no_secret_and_no_folder_is_recorded() -> None:
    given = {"CUDA_API_TOKEN": "x", "TRITON_CACHE_DIR": "/home/me", "TORCH_HOME": "/home/me", "OMP_PROC_BIND": "true"}
    assert telling_variables(given) == {"OMP_PROC_BIND": "true"}
    assert describe_environment()["variables"] == telling_variables(os.environ)


def test_code_that_can_change_a_number_changes_the_hash(tmp_path: Path) -> None:
    counted = [tmp_path / folder / name for folder in MEASURING for name in ("part.py", "deeper/part.py")]
    other = [tmp_path / "bench/judge/part.py", tmp_path / "bench/measure/notes.txt", tmp_path / "reports/part.py"]
    for path in (*counted, *other):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("FIRST = 1\n")
    hashes = [code_hash(tmp_path)]
    for path in counted:
        path.write_text("FIRST = 2\n")
        hashes.append(code_hash(tmp_path))
    counted[0].rename(counted[0].with_name("renamed.py"))
    hashes.append(code_hash(tmp_path))
    assert len(set(hashes)) == len(hashes)
    for path in other:
        path.write_text("FIRST = 2\n")
        assert code_hash(tmp_path) == hashes[-1]


@pytest.mark.parametrize(
    "part",
    [build_step, sample, MemoryMeter, make_inputs, fill_zeros, check_against_reference, model_macs, create_model],
    ids=lambda part: part.__name__,
)
def test_what_makes_a_number_is_where_the_hash_looks(part: Callable[..., object]) -> None:
    file = Path(inspect.getfile(part)).resolve()
    assert any(file.is_relative_to((ROOT / folder).resolve()) for folder in MEASURING)


def test_every_part_of_a_measurement_is_in_its_key() -> None:
    budget = BUDGETS["cpu"]
    environment = dict.fromkeys((*VERSIONS, *CIRCUMSTANCES), "this")
    assert {"gpu_name", "driver", "torch", "triton", "packages", "variables"} <= environment.keys()

    def of(case: Case = CASE, code: str = "a", environment: dict = environment, budget: object = budget) -> str:
        return measurement_key(case, code=code, environment=environment, budget=budget)  # type: ignore[arg-type]

    changed = [of(), of(code="b"), of(budget=replace(budget, target_s=2.0)), of(budget=replace(budget, width=0.1))]
    changes = {"model": "DiG-S/8", "resolution": 128, "batch": 2, "mode": "forward", "dtype": "fp32", "device": "cuda"}
    changes |= {"execution": "compile", "options": (("backend", "materialized"),)}
    changed += [of(case=replace(CASE, **{name: value})) for name, value in changes.items()]
    changed += [of(environment={**environment, name: "another"}) for name in environment]
    assert len(set(changed)) == len(changed)
    assert of(environment={**environment, "commit": "another", "hostname": "another"}) == of()


@pytest.mark.parametrize("folder", ["bench/measure", "bench/parity", "dig/diffusion"])
def test_every_file_of_a_folder_that_counts_changes_the_hash(folder: str, tmp_path: Path) -> None:
    for part in MEASURING:
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    before = code_hash(tmp_path)
    files = list((tmp_path / folder).rglob("*.py"))
    assert len(files) > 4
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content + b"# changed\n")
        assert code_hash(tmp_path) != before, path.name
        path.write_bytes(content)
    assert code_hash(tmp_path) == before

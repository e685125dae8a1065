"""What changes a number is in its key: a resumed run measures again under other circumstances."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dig.environment import ROOT, describe_environment, telling_variables

KEY = """
from dig.environment import describe_environment
from bench.store.identity import measurement_key
from bench.cases.jobs import BUDGETS
from bench.cases.case import Case
case = Case(model="DiT-S/8", resolution=64, device="cpu")
print(measurement_key(case, code="", environment=describe_environment(), budget=BUDGETS["cpu"]))
"""


def key(*before: str, **variables: str) -> str:
    """The key of a case in a process of these variables, started by these words."""
    kept = {name: value for name, value in os.environ.items() if name not in telling_variables(os.environ)}
    done = subprocess.run(
        [*before, sys.executable, "-c", KEY], env={**kept, **variables}, cwd=ROOT, capture_output=True, check=True
    )
    return done.stdout.decode()


@pytest.fixture(scope="module")
def plain() -> str:
    return key()


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
def test_variables_that_change_a_number_change_the_key(variable: str, plain: str) -> None:
    name, _, value = variable.partition("=")
    assert key(**{name: value}) != plain


@pytest.mark.parametrize("before", [["nice"], ["env", "HOME=/elsewhere", "NVIDIA_API_KEY=x", "CUDA_HOME=/y"]])
def test_what_changes_no_number_changes_no_key(before: list[str], plain: str) -> None:
    assert key(*before) == plain


def test_fewer_cpus_and_less_memory_change_the_key(plain: str) -> None:
    def within(limit: str) -> str:
        return key(sys.executable, "-c", f"import os, resource, sys; {limit}; os.execv(sys.argv[1], sys.argv[1:])")

    assert within("pass") == plain
    assert within("resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))") != plain
    if len(os.sched_getaffinity(0)) > 1:
        assert within("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})") != plain


def test_no_secret_and_no_folder_is_recorded() -> None:
    given = {"CUDA_API_TOKEN": "x", "TRITON_CACHE_DIR": "/home/me", "TORCH_HOME": "/home/me", "OMP_PROC_BIND": "true"}
    assert telling_variables(given) == {"OMP_PROC_BIND": "true"}
    assert describe_environment()["variables"] == telling_variables(os.environ)

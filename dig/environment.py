"""Where something was measured or trained: commit, versions, device, circumstances. No torch here: it is quick."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dig.nvml import Gpu
from dig.packages import DISTRIBUTIONS

ROOT = Path(__file__).resolve().parent.parent
HARNESS_VARIABLE = "DIG_HARNESS"
"""Tells a benchmark's processes the process id of their harness."""
COMPILES_VARIABLE = "DIG_COMPILES"
"""Told to the server that workers fork from: whether to import PyTorch's compiler, which takes seconds."""
COMMIT_VARIABLE = "DIG_COMMIT"
"""Names the commit (``<hash>`` or ``<hash>-dirty``) where the code runs without its .git folder."""

CIRCUMSTANCES = (
    "cpus", "cpu_quota", "cpu_governor", "huge_pages", "memory_limit", "gpu_power_limit", "gpu_ecc", "variables",
)  # fmt: skip
"""Keys of `describe_environment` that change from one call to the next on one machine with one set of versions, and a
number with them."""
_TELLING = (
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "GOTO_", "BLIS_", "VECLIB_", "DNNL_", "ONEDNN_", "ATEN_",
    "PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "CUDA_", "CUBLAS_", "CUBLASLT_", "CUDNN_", "CUTLASS_",
    "NCCL_", "TRITON_", "FLA_", "FLASH_", "MAMBA_", "CAUSAL_CONV1D_", "DIG_",
    "MALLOC_", "MIMALLOC_", "TCMALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "LD_LIBRARY_PATH", "NVIDIA_TF32_OVERRIDE",
    "PYTHONMALLOC", "PYTHONOPTIMIZE", "PYTHONDEVMODE", "PYTHONTRACEMALLOC",
)  # fmt: skip
"""How the names of variables begin that threads, allocators, kernels and compilers listen to. Rather one too many, for
that measures a case once more; one too few passes another number for the same."""
_TELLING_NOTHING = frozenset(
    {COMMIT_VARIABLE, HARNESS_VARIABLE, COMPILES_VARIABLE, "CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST"}
)
_ENDINGS_OF_NOTHING = (
    "_DIR",
    "_DIRECTORY",
    "_HOME",
    "_VERSION",
    "_LOG",
    "_LOGS",
    "_KEY",
    "_TOKEN",
    "_SECRET",
    "_PASSWORD",
)
"""Of names that say where something is kept, and of secrets, which no row may hold. Which card of a name was used is no
circumstance either (its UUID is recorded)."""


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> dict[str, Any]:
    if given := os.environ.get(COMMIT_VARIABLE):
        return {"commit": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None}
    # Only code counts: a results file being written does not make the measured code another.
    changed = _git("status", "--porcelain", "--", "*.py", "pyproject.toml")
    return {"commit": commit, "dirty": bool(changed)}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def version_line() -> str:
    """Versions of the project, with its commit where there is one, of PyTorch and of Python, for people."""
    version = _version("dig-diffusion")
    if version is None:  # run from a checkout that isn't installed
        version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    commit = _commit()
    at = f" ({commit['commit'][:12]}{', changed' if commit['dirty'] else ''})" if commit["commit"] else ""
    return f"dig-diffusion {version}{at}, torch {_version('torch')}, Python {platform.python_version()}"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # Not Linux: platform knows a name too, if a shorter one.
    return platform.processor() or platform.machine()


def telling_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that can change a number, by name."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if name.startswith(_TELLING)
        and name not in _TELLING_NOTHING
        and not name.endswith(_ENDINGS_OF_NOTHING)
        and (not name.endswith("_PATH") or name == "LD_LIBRARY_PATH")
    }


def _allowed_cpus() -> str:
    """The CPUs that this process may use, ``0-3,8``: two of one core are not two cores."""
    if not hasattr(os, "sched_getaffinity"):
        return f"0-{(os.cpu_count() or 1) - 1}"
    allowed = os.sched_getaffinity(0)
    first = sorted(cpu for cpu in allowed if cpu - 1 not in allowed)
    last = sorted(cpu for cpu in allowed if cpu + 1 not in allowed)
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _control_groups(controller: str) -> Iterator[Path]:
    """The folders of this process' control groups, from its own up: a container's limits are in them."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup", *([controller] if controllers else []))
        if not controllers or controller in controllers.split(","):
            own = root / path.lstrip("/")
            yield from (own, *(parent for parent in own.parents if parent.is_relative_to(root)))


def _cpu_quota() -> float | None:
    """CPUs' worth of time that control groups allow; None without such a limit."""
    quotas = []
    for group in _control_groups("cpu"):
        words = _read(group / "cpu.max").split() or [
            _read(group / "cpu.cfs_quota_us"),
            _read(group / "cpu.cfs_period_us"),
        ]
        if all(word.isdecimal() for word in words):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _memory_limit() -> int | None:
    """Bytes that this process may take by ``ulimit -v`` or its control groups; None without such a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    limits = [] if soft == resource.RLIM_INFINITY else [soft]
    for group in _control_groups("memory"):
        word = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        limits += [int(word)] if word.isdecimal() and int(word) < 1 << 60 else []
    return min(limits, default=None)


def _circumstances() -> dict[str, Any]:
    huge_pages = _read(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    return {
        "cpus": _allowed_cpus(),
        "cpu_quota": _cpu_quota(),
        "cpu_governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")) or None,
        "huge_pages": huge_pages.partition("[")[2].partition("]")[0] or None,
        "memory_limit": _memory_limit(),
        "variables": telling_variables(os.environ),
    }


def gpu_present() -> bool:
    """Say whether NVML finds an NVIDIA GPU, without starting CUDA in this process."""
    return Gpu.open() is not None


def describe_environment() -> dict[str, Any]:
    """What the ``environment`` of a row or a run holds; a key is None or absent where there is nothing to say."""
    gpu = Gpu.open()
    return {
        **_commit(),
        **(gpu.describe() if gpu is not None else {}),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "packages": {name: version for name in sorted(DISTRIBUTIONS.values()) if (version := _version(name))},
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **_circumstances(),
    }

"""Shared by all tests: GPU tests are skipped, with the reason, where there is no GPU."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

# Under nohup SIGHUP is ignored, and SIGINT where a shell started this in its background; by every process that a test
# starts too, and tests send them.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests run side by side, and start harnesses of their own: more threads than cores would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# PyTorch reads it once, at the first matrix product, which may be in a test before those that train deterministically.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Messages are wrapped at the terminal's width and coloured as its variables say; what is asserted must not hang on it.
os.environ["COLUMNS"] = "80"
for name in ("FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE", "GITHUB_ACTIONS"):
    os.environ.pop(name, None)

import pytest
import torch
import typer.testing
from hypothesis import settings

# A few drawn inputs each time, many once in CI: nox -s tests_slow names the profile.
settings.register_profile("few", max_examples=20, deadline=None)
settings.register_profile("many", max_examples=100, deadline=None)
settings.load_profile("few")

# To make typer's commands of an app takes most of what calling one in a test does, and gives the same each time.
typer.testing._get_command = functools.cache(typer.testing._get_command)

# Without a GPU, Triton's interpreter replaces it. It must be chosen before anything imports triton, which
# diffusers does: so here, and not beside the tests of the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model of size S has two blocks in this process: enough for what does not hang on depth."""
    from baselines import dis, dit
    from dig import config, flops

    # Counts are kept by a model's name, which says nothing of this.
    monkeypatch.setattr(flops, "_counted", {})
    for sizes in (config.SIZES, dit.SIZES, dis.SIZES):
        monkeypatch.setitem(sizes, "S", (2, *sizes["S"][1:]))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module with families, importable in this process; all is forgotten afterwards."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    from tests import own_family

    (tmp_path / f"{name}.py").write_text(own_family.MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    from bench.store import identity
    from dig import registry

    before = dict(registry.families())
    yield name
    registry._families.clear()
    registry._families.update(before)
    registry._sources.clear()
    identity._family_hash.cache_clear()
    sys.modules.pop(name, None)

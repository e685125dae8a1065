"""Operations do without Triton until one of its implementations is called."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from dig.ops import first_call
from dig.packages import MissingPackageError

WITHOUT = """
import sys
sys.modules["triton"] = None
from dig.ops import adaln, gla, srem, swiglu
for operation in (adaln, gla, srem, swiglu):
    assert "reference" in operation.IMPLEMENTATIONS
"""


def test_the_packages_do_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def fails() -> Callable[[int], int]:
    raise ImportError("libcuda.so.1 is broken")


def test_where_triton_is_missing_a_call_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = first_call.from_triton(fails)
    # It is installed, and something else is wrong.
    monkeypatch.setattr(first_call, "require", lambda module, purpose: SimpleNamespace())
    with pytest.raises(ImportError, match=r"^libcuda\.so\.1 is broken$"):
        operation(1)
    monkeypatch.undo()
    monkeypatch.setattr("dig.packages.is_installed", lambda module: False)
    with pytest.raises(MissingPackageError, match=r"^implementation 'triton' needs the package triton; install it"):
        operation(1)


def test_torch_compile_traces_the_import() -> None:
    @first_call.from_triton
    def double() -> Callable[[torch.Tensor], torch.Tensor]:
        from dig.ops.linear import as_rows

        return as_rows

    x = torch.ones(2, 3, 4)
    assert torch.compile(double, fullgraph=True, backend="eager")(x).shape == (6, 4)

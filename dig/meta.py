"""Models without memory, on torch's ``meta`` device: for the shapes of their tensors, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FILLS = {"uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_"}
"""Functions that fill a tensor with random numbers."""


class _Unfilled(TorchFunctionMode):
    """Fills nothing. Of a tensor on ``meta`` torch asks its compiler for that, which takes a second to import."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Within, tensors that are made have no memory, and random fills do nothing."""
    with torch.device("meta"), _Unfilled():
        yield

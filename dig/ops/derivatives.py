"""Which derivatives this project's kernels have: first ones, by a backward pass. Others are refused, in one line each.

Unchecked, PyTorch would fail deep inside a kernel's registration, or silently leave out what a fused pass hides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")

_INSTEAD = "take backend 'reference' for them"
_TRANSFORMS = {
    torch._C._functorch.TransformType.Grad: "derivatives by torch.func (grad, vjp, jacrev)",
    torch._C._functorch.TransformType.Jvp: "forward-mode derivatives",
    torch._C._functorch.TransformType.Vmap: "rule for torch.func.vmap",
}


def refuse_transforms() -> None:
    """Raise ValueError under one of torch.func's transforms, or where forward-mode derivatives are asked for."""
    if torch.compiler.is_compiling():
        return
    transform = torch._C._functorch.peek_interpreter_stack()
    asked = None if transform is None else _TRANSFORMS.get(transform.key())
    if forward_ad._current_level >= 0:
        asked = asked or "forward-mode derivatives"
    if asked is not None:
        raise ValueError(f"backend 'triton' has no {asked}; {_INSTEAD}")


def once(backward: Callable[P, R]) -> Callable[P, R]:
    """Let a backward pass refuse, by ValueError, to be differentiated itself: see `refuse_second_derivatives`."""

    @functools.wraps(backward)
    def checked(*arguments: P.args, **named: P.kwargs) -> R:
        refuse_second_derivatives()
        return backward(*arguments, **named)

    return checked


def refuse_second_derivatives() -> None:
    """Raise ValueError in a backward pass that is recorded for another one.

    The second pass itself would be too late: part of what it needs is never recorded, and its result could be wrong.
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        raise ValueError(f"backend 'triton' has no second derivatives, which create_graph=True asks for; {_INSTEAD}")

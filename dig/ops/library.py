"""Operations that are registered with PyTorch, and called directly where nothing needs the registration.

Registered with torch.library, an operation is differentiable, ``torch.compile`` and CUDA graphs take it whole, and
PyTorch's modes (a FLOP counter, a tracer) see it. That costs the host more than the operation's launches. A backward
pass, a forward pass without gradients and the fused block's passes need none of it. There the function is called as it
is: the same launches, the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN = (Tensor, nn.Parameter)


class Operation(Generic[P, R]):
    """An operation of this project, called like the function that it was made of.

    Args:
        function: Takes tensors, lists of them and numbers, the first one a tensor or a list; changes none of them.
        name: As PyTorch is to know it, ``dig::…``.
    """

    def __init__(self, function: Callable[P, R], name: str) -> None:
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=())
        self._recorded: Callable[..., R] | None = None
        update_wrapper(self, function)

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> R:
        """What the function gives, differentiable where gradients are recorded."""
        if arguments and unseen(arguments[0]):
            return self.function(*arguments, **named)
        result: R = self.registered(*arguments, **named)
        return result

    def recorded(self, *arguments: P.args, **named: P.kwargs) -> R:
        """`__call__`; where nobody but autograd asks, autograd is told by a node of this project's own.

        The same numbers and gradients, for less of the host's time. Of tensors and numbers alone, given in order.
        """
        if self._recorded is None or named or not (arguments and unwatched(arguments[0])):
            return self(*arguments, **named)
        if torch.is_grad_enabled():
            return self._recorded(*arguments)
        return self.function(*arguments, **named)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """As `torch.library.CustomOpDef.register_fake`."""
        registered: Callable[..., Any] = self.registered.register_fake(function)
        return registered

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As `torch.library.CustomOpDef.register_autograd`."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        function: Callable[..., Any] = self.function

        class Recorded(torch.autograd.Function):
            # In one, for PyTorch binds arguments by the signature of a forward that has a setup_context beside it.
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                output = function(*arguments)
                setup_context(ctx=ctx, inputs=arguments, output=output)
                return output

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                return backward(ctx, *gradients)

        self._recorded = Recorded.apply


def operation(name: str) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Make a function an `Operation`."""

    def register(function: Callable[P, R]) -> Operation[P, R]:
        return Operation(function, name)

    return register


def unseen(first: object) -> bool:
    """Whether an operation that is called here, with this first argument, needs no registration.

    Then `Operation.function` may be called in its place; whoever calls several asks once.
    """
    return not torch.is_grad_enabled() and unwatched(first)


def unwatched(first: object) -> bool:
    """Whether nobody but autograd needs to be told of an operation that is called here, with this first argument."""
    # torch.compile takes the registered operation, and mustn't trace what else is asked here.
    if torch.compiler.is_compiling():
        return False
    if isinstance(first, (list, tuple)) and first:
        first = first[0]
    return (
        type(first) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )

"""A DiG block's passes on this project's kernels as operations that ``torch.compile`` takes whole.

Traced, a block is some 17 operations a training step. Each is called by Inductor's wrapper through PyTorch's dispatcher
and asks anew about its tensors, which costs the host more than its launches: compiled, DiG took longer outside of CUDA
graphs than as it is. Between the passes' operations the compiler finds nothing to fuse. So here each pass is one, and
does inside what it does where nobody compiles: it launches directly, and within a CUDA graph on a side stream too.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dig.ops.derivatives import refuse_second_derivatives
from dig.ops.library import unseen
from dig.ops.side_stream import side_work
from dig.raster_inference import infer_block, infer_images
from dig.raster_training import Kept, backward_pass, forward_pass
from dig.raster_weights import BlockWeights, Settings, prepare_block, settings_of
from dig.scan import ScanOrder

_WEIGHTS = len(BlockWeights._fields)
_MADE = tuple(name for name in Kept._fields if name not in ("x", "c", "branch1"))
"""What a forward pass makes in any case, of what it keeps."""


class CompiledBlock(torch.autograd.Function):
    """`dig.raster_block.RasterBlock` within torch.compile, for `train_block`, which names the arguments.

    Settings are strings and numbers here: PyTorch 2.11's compiler hands nothing else to a node. What a pass takes of
    the weights and of the condition is made inside its operation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, norm: str, numbers: tuple[int, ...], *weights: Tensor | None) -> Tensor:
        """(B, T, D) in x's dtype."""
        out, kept = train(x, c, weights, norm, numbers)
        ctx.save_for_backward(*kept, *weights)
        ctx.norm, ctx.numbers = norm, numbers
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, c and the parameters; None for a parameter that is frozen."""
        refuse_second_derivatives()
        needed, condition = ctx.needs_input_grad[-_WEIGHTS:], ctx.needs_input_grad[1]
        dx, dc, gradients = go_back(
            ctx.saved_tensors, dout.contiguous(), ctx.norm, ctx.numbers, needed, condition=condition
        )
        return dx, dc, None, None, *gradients


def train_block(x: Tensor, c: Tensor, weights: BlockWeights, settings: Settings) -> Tensor:
    """`dig.raster_block.train_block`, of which nothing was prepared ahead."""
    out: Tensor = CompiledBlock.apply(x, c, *_numbers(settings), *weights)
    return out


def train(
    x: Tensor, c: Tensor, weights: Sequence[Tensor | None], norm: str, numbers: Sequence[int]
) -> tuple[Tensor, Kept]:
    """`prepare_block` and `forward_pass` as one operation; ``norm`` and ``numbers`` are the settings."""
    found = torch.ops.dig.train_block(x, c, weights, norm, numbers)
    branch1 = found[-1] if x.shape[0] > 1 else None
    made = found[1 : 1 + len(_MADE)]
    return found[0], Kept(x=x, c=c, branch1=branch1, **dict(zip(_MADE, made, strict=True)))


def go_back(
    saved: Sequence[Tensor | None],
    dout: Tensor,
    norm: str,
    numbers: Sequence[int],
    needed: Sequence[bool],
    *,
    condition: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """`backward_pass` as one operation: gradients of x, of the condition and of the weights that are asked for."""
    found = torch.ops.dig.train_block_backward(dout, saved, needed, condition, norm, numbers)
    dc = found[1] if condition else None
    gradients = iter(found[1 + condition :])
    return found[0], dc, [next(gradients) if asked else None for asked in needed]


def infer(x: Tensor, c: Tensor, w: BlockWeights, s: Settings, *, fold_gates: bool) -> Tensor:
    """`prepare_block` and `infer_block` (with ``fold_gates``) or `infer_images` as one operation; x is left as is."""
    out: Tensor = torch.ops.dig.infer_block(x, c, w, fold_gates, *_numbers(s))
    return out


def _numbers(s: Settings) -> tuple[str, tuple[int, ...]]:
    """Settings as an operation takes them."""
    return s.norm, (s.heads, *s.grid, int(s.order.transposed), int(s.order.reversed))


def _settings(norm: str, numbers: Sequence[int]) -> Settings:
    heads, rows, columns, transposed, reversed = numbers
    return settings_of(norm, heads, (rows, columns), ScanOrder(bool(transposed), bool(reversed)))


def _train_block(
    x: Tensor,
    c: Tensor,
    weights: Sequence[Tensor | None],
    norm: str,
    numbers: Sequence[int],
) -> list[Tensor]:
    """The result; what is kept, by `_MADE`; and of several images the first branch."""
    w = BlockWeights._make(weights)
    with torch.no_grad(), side_work(x.device):
        p = prepare_block(w, c, x.dtype, fold_gates=False)
        s = _settings(norm, numbers)
        out, kept = forward_pass(x, c, p.modulation, p.products, w, s)
    found = [out, *(getattr(kept, name) for name in _MADE)]
    return found if kept.branch1 is None else [*found, kept.branch1]


def _train_block_backward(
    dout: Tensor,
    saved: Sequence[Tensor | None],
    needed: Sequence[bool],
    condition: bool,
    norm: str,
    numbers: Sequence[int],
) -> list[Tensor]:
    """Gradients of x, of c if it is asked for, and of those parameters that are."""
    s = _settings(norm, numbers)
    asked = BlockWeights._make(needed)
    with torch.no_grad(), side_work(dout.device):
        dx, dc, gradients = backward_pass(lambda: saved, dout, s, asked, condition=condition, part=None)
    wanted = [gradient for gradient, wants in zip((dc, *gradients), (condition, *needed), strict=True) if wants]
    found = [dx, *(gradient for gradient in wanted if gradient is not None)]
    assert len(found) == 1 + len(wanted), "a gradient that was asked for was not computed"
    return found


def _infer_block(
    x: Tensor,
    c: Tensor,
    weights: Sequence[Tensor | None],
    fold_gates: bool,
    norm: str,
    numbers: Sequence[int],
) -> Tensor:
    w = BlockWeights._make(weights)
    s = _settings(norm, numbers)
    with torch.no_grad():
        run = infer_block if fold_gates else infer_images
        return run(x, prepare_block(w, c, x.dtype, fold_gates=fold_gates), w, s)


def _pass_below(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """What autograd is to do of an operation: nothing, and refuse where that would lose a gradient or a tangent.

    `CompiledBlock` asks for none. A traced program may hold the operation without it.
    """
    below = getattr(torch.ops.dig, name).default

    def run(*arguments: Any) -> Any:
        tensors = [value for value in _flat(arguments) if isinstance(value, Tensor)]
        forward = forward_ad._current_level >= 0
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise ValueError(
                f"torch.ops.dig.{name} has no gradient by itself: call the model, or what was traced of it under "
                "torch.no_grad()"
            )
        if forward and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise ValueError(f"torch.ops.dig.{name} has no forward-mode derivatives; take backend 'reference' for them")
        if unseen(arguments[0]):
            return function(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return below(*arguments)

    return run


def _flat(arguments: Sequence[Any]) -> Iterator[Any]:
    for value in arguments:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


# By hand, for `torch.library.custom_op` puts Python of its own around each call, several times as long as the
# dispatcher's. Nothing differentiates these: `CompiledBlock` does.
_LIBRARY = torch.library.Library("dig", "FRAGMENT")
for _function in (_train_block, _train_block_backward, _infer_block):
    _name = _function.__name__[1:]
    _schema = torch.library.infer_schema(_function, mutates_args=())
    _LIBRARY.define(f"{_name}{_schema}", tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _pass_below(_name, _function), "Autograd")
    # Of tensors without values, the operations within tell the shapes.
    torch.library.register_fake(f"dig::{_name}", _function, lib=_LIBRARY)

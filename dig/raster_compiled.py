"""A DiG block's passes on this project's kernels as operations that ``torch.compile`` takes whole.

Traced, a block is some 17 operations a training step. Each is called by Inductor's wrapper through PyTorch's dispatcher
and asks anew about its tensors, which costs the host more than its launches: compiled, DiG took longer outside of CUDA
graphs than as it is. Between the passes' operations the compiler finds nothing to fuse. So here each pass is one, and
does inside what it does where nobody compiles: it launches directly, and within a CUDA graph on a side stream too.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dig.ops.side_stream import side_work
from dig.raster_inference import infer_block, infer_images
from dig.raster_training import Kept, backward_pass, forward_pass
from dig.raster_weights import BlockWeights, Settings, prepare_block, settings_of
from dig.scan import ScanOrder

_MADE = tuple(name for name in Kept._fields if name not in ("x", "c", "branch1"))
"""What a forward pass makes in any case, of what it keeps."""


def train(x: Tensor, c: Tensor, w: BlockWeights, s: Settings) -> tuple[Tensor, Kept]:
    """`prepare_block` and `forward_pass` as one operation; arguments as there."""
    out, *made = torch.ops.dig.train_block(x, c, w, *_numbers(s))
    branch1 = made.pop() if x.shape[0] > 1 else None
    return out, Kept(x=x, c=c, branch1=branch1, **dict(zip(_MADE, made, strict=True)))


def go_back(
    saved: Sequence[Tensor | None], dout: Tensor, s: Settings, needed: BlockWeights, *, condition: bool
) -> tuple[Tensor, Tensor | None, BlockWeights]:
    """`backward_pass` as one operation; arguments as there, gradients of what is asked for alone."""
    dx, *rest = torch.ops.dig.train_block_backward(dout, saved, list(needed), condition, *_numbers(s))
    gradients = iter(rest)
    dc = next(gradients) if condition else None
    return dx, dc, BlockWeights._make(next(gradients) if asked else None for asked in needed)


def infer(x: Tensor, c: Tensor, w: BlockWeights, s: Settings, *, fold_gates: bool) -> Tensor:
    """`prepare_block` and `infer_block` (with ``fold_gates``) or `infer_images` as one operation; x is left as is."""
    out: Tensor = torch.ops.dig.infer_block(x, c, w, fold_gates, *_numbers(s))
    return out


def _numbers(s: Settings) -> tuple[str, list[int]]:
    """Settings as an operation takes them."""
    return s.norm, [s.heads, *s.grid, *map(int, s.order)]


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
        dx, dc, gradients = backward_pass(lambda: saved, dout, s, asked, condition=condition, across=None)
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


# By hand, for `torch.library.custom_op` puts Python of its own around each call, several times as long as the
# dispatcher's. Nothing differentiates these: `dig.raster_block.RasterBlock` does.
_LIBRARY = torch.library.Library("dig", "FRAGMENT")
for _function in (_train_block, _train_block_backward, _infer_block):
    _name = _function.__name__[1:]
    _schema = torch.library.infer_schema(_function, mutates_args=())
    _LIBRARY.define(f"{_name}{_schema}", tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    # Of tensors without values, the operations within tell the shapes.
    torch.library.register_fake(f"dig::{_name}", _function, lib=_LIBRARY)

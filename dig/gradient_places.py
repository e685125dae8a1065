"""Places of gradients: memory in which whoever sends them wants them, lent to the backward pass that computes them.

DistributedDataParallel copies each gradient into a bucket before it is sent, unless it lies there already: 2.7 GB of
DiG-XL/2 that are read and written in every step. PyTorch takes a parameter's first gradient as it is, memory and all,
where nobody else holds the tensor. So a backward pass that writes into a view of the bucket, and returns a tensor that
is new, saves the copy.

A place is memory that keeps what was in it for as long as `Tensor.grad` is there. It is taken only where the gradient
becomes that: by passes that the network itself began, and once in each.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from dig.ops.launch import ALIGNMENT


@dataclass(eq=False)
class _Place:
    """Memory for one parameter's gradient, and the backward pass that took it last."""

    view: Tensor
    taken: int | None = None


class Places:
    """What a network's sender lends, by parameter; it holds no parameter."""

    def __init__(self) -> None:
        self._places: Any = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._places)

    def lend(self, parameters: Iterable[Tensor], views: Iterable[Tensor]) -> None:
        """Lend memory for the gradients of these parameters, instead of what was lent for them before.

        A view of another shape, dtype or device than its parameter is not lent, nor one with gaps. Kernels need one
        thing of the rest: it begins at a multiple of 16 bytes, as Triton's are compiled for, and as cuBLAS asks for
        where it takes the product that it would take for memory of its own.
        """
        for parameter, view in zip(parameters, views, strict=True):
            if _fits(view, parameter) and view.is_contiguous() and view.data_ptr() % ALIGNMENT == 0:
                self._places[parameter] = _Place(view)
            else:
                self._places.pop(parameter, None)

    def clear(self) -> None:
        """Lend nothing any more."""
        self._places.clear()

    def take(self, parameter: Tensor, accumulator: Any) -> Tensor | None:
        """A place, as a tensor that nobody else holds, for the gradient of the backward pass that is under way.

        None where none is lent; where there is a gradient already, to which this one will be added; where a hook may
        keep what it is shown; where this pass took it before, for autograd will add the two; and where the pass
        accumulates none, as `torch.autograd.grad` does, which hands out what it is given.

        Args:
            parameter: Whose.
            accumulator: Autograd's node that accumulates its gradient.
        """
        place: _Place | None = self._places.get(parameter)
        if place is None or parameter.grad is not None or parameter._backward_hooks:
            return None
        current = torch._C._current_graph_task_id()
        if place.taken == current or not _fits(place.view, parameter) or not _accumulates(accumulator):
            return None
        place.taken = current
        # Were it the tensor that is held here, autograd would copy it.
        return place.view.detach()


def _fits(view: Tensor, parameter: Tensor) -> bool:
    return view.shape == parameter.shape and view.dtype == parameter.dtype and view.device == parameter.device


def _accumulates(accumulator: Any) -> bool:
    """Whether the backward pass that is under way will accumulate a gradient in this node."""
    try:
        return torch._C._will_engine_execute_node(accumulator)
    except RuntimeError:  # `torch.autograd.grad` asks for it: so PyTorch says that it can't tell.
        return False


_lent: weakref.WeakKeyDictionary[nn.Module, Places] = weakref.WeakKeyDictionary()


def lend_to(network: DistributedDataParallel, places: Places) -> None:
    """Let the passes that a network begins take places; until it is gone."""
    _lent[network] = places


def places_here() -> Places | None:
    """What is lent to the network whose forward pass this is called in; None without one."""
    network: Any = DistributedDataParallel._get_active_ddp_module()
    return None if network is None else _lent.get(network)

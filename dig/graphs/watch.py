"""Watching a step run: what it writes, so that it can be put back, and what a CUDA graph couldn't repeat.

A `TorchDispatchMode` sees every operation of PyTorch's, those of the backward pass and of the optimizer too, with its
schema, which says which arguments are written. Kernels that are launched past PyTorch it doesn't see.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dig.graphs.recording import CaptureError, is_users

_HIDDEN_WRITES = {"aten::native_batch_norm": (3, 4), "aten::cudnn_batch_norm": (3, 4)}
"""Arguments that are written though the schema doesn't say so: running mean and variance."""
_TRAINING = 5
"""Place of these operations' argument that says whether they are."""
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_COPIES = {"aten::_to_copy", "aten::copy_"}


def storage_of(tensor: Tensor) -> int:
    """What tells a tensor's memory from another's for as long as it lives."""
    return tensor.untyped_storage()._cdata


def _is_freed(tensor: Tensor) -> bool:
    """Whether its memory was given back under it, as FSDP does with weights that it gathered."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() < (
        (tensor.storage_offset() + last + 1) * tensor.itemsize
    )


class Journal:
    """What tensors held before they were first written, kept in the host's memory."""

    def __init__(self) -> None:
        self._entries: list[tuple[Tensor, Tensor]] = []
        self._seen: set[tuple[Any, ...]] = set()

    def note(self, tensor: Tensor) -> None:
        """Keep what a tensor holds, if it isn't kept already."""
        key = (storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if key not in self._seen:
            self._seen.add(key)
            with torch.no_grad():
                self._entries.append((tensor, tensor.detach().to("cpu", copy=True)))

    def restore(self) -> None:
        """Put everything back, the last one first: of two that overlap, the earlier one was kept unwritten."""
        for tensor, saved in reversed(self._entries):
            if _is_freed(tensor):
                continue
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.detach().copy_(saved)
        self._entries.clear()
        self._seen.clear()


class Watch(TorchDispatchMode):
    """Note what one run of a step makes and writes; refuse what a graph can't hold.

    Args:
        device: Where the graph will run.
        journal: Takes what the run overwrites of what was there before it.
        generators: Those that a graph is told of.
        known: Storages that the run before this one made and that may be written: `Captured` knows how they begin.
        earlier: The watch of the run before. With it, this run is judged: the first one may compile, tune and
            fill caches, which only has to be over when the graph is captured.

    Attributes:
        made: Storages that the run allocated.
        written: Storages that were there before and that it wrote.
        read: A tensor of each storage that was there before.
    """

    def __init__(
        self,
        device: torch.device,
        journal: Journal,
        *,
        generators: Iterable[torch.Generator] = (),
        known: Iterable[int] = (),
        earlier: Watch | None = None,
    ) -> None:
        super().__init__()
        self._device = device
        self._journal = journal
        self._generators = {_address(generator) for generator in generators}
        self._known = frozenset(known)
        self._earlier = earlier
        self.made: set[int] = set()
        self.written: set[int] = set()
        self.read: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, with a look before and after."""
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and _has_storage(leaf)]
        if self._earlier is not None and (reason := self._refusal(func, args, kwargs, given)):
            raise CaptureError(f"{_caller()} {reason}")
        lifted = getattr(func, "_opname", "") == "lift_fresh"  # what torch.tensor made, unseen
        for tensor in _written(func, args, kwargs):
            self._write(tensor)
        result = func(*args, **kwargs)
        theirs = set() if lifted else {storage_of(tensor) for tensor in given}
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and _has_storage(leaf)]
        self.made.update(storage_of(tensor) for tensor in results if storage_of(tensor) not in theirs)
        draws = self._earlier is not None and torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        # Attention gives its seed on the CPU, beside its results.
        if draws and results and all(tensor.device.type != self._device.type for tensor in results):
            raise CaptureError(
                f"{_caller()} draws random numbers on the CPU, which replays of a CUDA graph would not draw again; "
                "draw them on the GPU (device=), or pass them as inputs"
            )
        for tensor in given:
            storage = storage_of(tensor)
            if storage not in self.made and storage not in self.read:
                self.read[storage] = tensor.detach()  # without what it was made of, which would stay too
        return result

    def _write(self, tensor: Tensor) -> None:
        storage = storage_of(tensor)
        if storage in self.made:
            return
        self.written.add(storage)
        if storage in self._known:
            return
        if self._earlier is not None:
            if tensor.device.type != self._device.type:
                raise CaptureError(
                    f"{_caller()} changes a tensor on the CPU, {_describe(tensor)}, which replays of a CUDA graph "
                    "don't; keep it on the GPU, or move this out of the step"
                )
            if storage in self._earlier.made:
                raise CaptureError(
                    f"{_caller()} changes a tensor, {_describe(tensor)}, that an earlier run of the step made, so that "
                    "nobody knows how it began (gradients, an optimizer's state, a scale); pass optimizer=, scaler=, "
                    "or run the step once before it is captured"
                )
        self._journal.note(tensor)

    def _refusal(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> str:
        """Why a graph can't hold an operation; empty where it can."""
        if not any(tensor.device.type == self._device.type for tensor in given) and "generator" not in kwargs:
            return ""
        name = getattr(getattr(func, "_schema", None), "name", "")
        tags = getattr(func, "tags", ())
        if name in _INDEXED:
            return _index_refusal(name, args)
        if torch.Tag.data_dependent_output in tags:
            return (
                f"reads a value from the GPU ({name.removeprefix('aten::')}: item(), float(), bool(), an if on a "
                "tensor), for which a CUDA graph can't wait; return the tensor and read it after the call, or use "
                "torch.where"
            )
        if torch.Tag.dynamic_output_shape in tags and kwargs.get("output_size") is None:
            return (
                f"makes a tensor whose size depends on values ({name.removeprefix('aten::')}); in a CUDA graph all "
                "sizes are fixed: use a mask, torch.where, or torch.nonzero_static"
            )
        if name in _COPIES and (reason := _copy_refusal(name, args, kwargs)):
            return reason
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and _address(generator) not in self._generators:
            return "draws from a generator that the graph isn't told of; pass generators=[...] to capture"
        return ""


def _address(generator: Any) -> int:
    """What tells a generator from another: the dispatcher hands out new objects for it."""
    address: int = generator._cdata
    return address


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)


@functools.cache
def _written_places(func: Any) -> tuple[tuple[int, str], ...]:
    schema = getattr(func, "_schema", None)
    if schema is None:
        return ()
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation overwrites."""
    values = [args[place] if place < len(args) else kwargs.get(name) for place, name in _written_places(func)]
    name = getattr(getattr(func, "_schema", None), "name", "")
    if name in _HIDDEN_WRITES and args[_TRAINING]:
        values += [args[place] for place in _HIDDEN_WRITES[name]]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and _has_storage(leaf)]


def _index_refusal(name: str, args: Any) -> str:
    target, indices = args[0], [index for index in args[1] if index is not None]
    masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
    one_value = name != "aten::index" and args[2].numel() == 1
    if masks and not (one_value and len(indices) == 1):
        return (
            "indexes by a mask, which makes a tensor whose size depends on values; in a CUDA graph all sizes are "
            "fixed: use torch.where, or masked_fill"
        )
    if any(index.device.type != target.device.type for index in indices):
        return "indexes a tensor of the GPU by numbers on the CPU; make the index on the GPU, before the step"
    return ""


def _copy_refusal(name: str, args: Any, kwargs: Any) -> str:
    """Why a copy between the devices can't be in a graph; pinned memory that stays may take part in one."""
    if name == "aten::copy_":
        target, source = args[0], args[1]
        to, pinned = target.device.type, (target if target.device.type == "cpu" else source)
        fine = (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)) and pinned.is_pinned()
    else:
        source, device = args[0], kwargs.get("device")
        to, fine = (source.device if device is None else torch.device(device)).type, False
    if to == source.device.type or fine:
        return ""
    if to == "cpu":
        return (
            "moves a tensor to the CPU, for which a CUDA graph can't wait; return the tensor and move it after the call"
        )
    return (
        f"moves a tensor from the CPU, {_describe(source)}, whose values replays would not see; pass it to the step as "
        "an input, or make it on the GPU"
    )


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _caller() -> str:
    """The line of the step that is running, as the user wrote it."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno},"
        frame = frame.f_back
    return "the backward pass"

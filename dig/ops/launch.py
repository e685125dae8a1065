"""What every operation needs around its launches: the context of a thread's launches on a device, and tensors to fill.

A context remembers which streams have been made to wait for another one since their last launch. An operation asks for
it once, by `launch_context`, and hands it on.

**Launching costs the host.** At every launch Triton looks at every argument to find the compiled kernel, which takes
several times as long as the launch itself. Outside of a CUDA graph, a step of one image waits for that. So what Triton
found is kept here, by all that it depends on, and launched directly the next time: `LaunchContext.__call__`. Where
numbers and constants follow from shapes and strides, an operation puts them into a `Launch` once, which keeps its own
forms: then only the tensors' dtypes and addresses are looked at.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import reduce
from itertools import accumulate
from operator import attrgetter, itemgetter, or_
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from dig.ops.descriptors import Box, described, without_tensor
from dig.ops.tiles import for_device, gpu_index

Grid = tuple[int, ...]
Argument = Any
"""A tensor, a tuple of tensors, or a tensor descriptor."""

ALIGNMENT = 16
"""Bytes. Triton compiles another kernel for an address that isn't a multiple of it."""
MOST_FORMS = 4096
"""Of all kernels on a device; then all are forgotten, and found again. One step of a model takes about 40."""

_dtype = attrgetter("dtype")
_address = Tensor.data_ptr
_current_gpu: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
"""Without first asking whether CUDA is there: who launches has tensors on it."""


_Places = tuple[Callable[[Any], Any], tuple[tuple[int, int], ...]]
"""What picks addresses of the tensors', and of which of the picked how many bytes are added."""


class _Form(NamedTuple):
    """A kernel as it was compiled for some arguments: ``run(x, y, z, stream, *before, *addresses, *after)``."""

    run: Callable[..., None]
    before: tuple[Any, ...]
    """What it takes of the kernel itself."""
    after: tuple[Any, ...]
    """Constants, in the order of the kernel's parameters; in a `Launch` its numbers come first."""
    kernel: object
    """Held, so that no other kernel gets its id."""


def _form(compiled: CompiledKernel, kernel: Any, after: tuple[Any, ...]) -> _Form:
    # Neither metadata nor hooks: `_watched` has seen that nobody asks for them.
    before = (compiled.function, compiled.packed_metadata, None, None, None)
    return _Form(*_without_scratch(compiled.run, before), after, kernel)


def _without_scratch(run: Any, before: tuple[Any, ...]) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Triton's launcher, or the C function that it calls, and what that takes before a kernel's own arguments.

    The launcher asks at each launch for scratch memory, which no kernel here has, and adds a few flags, which are
    always the same. They are found by having a copy of it call something else.
    """
    if getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1) or not hasattr(run, "launch"):
        return run, before
    seen: list[tuple[Any, ...]] = []
    probe = copy.copy(run)
    probe.launch = lambda *arguments: seen.append(arguments)
    probe(1, 2, 3, 4, *before)
    (found,) = seen or [()]
    flags = found[5 : len(found) - len(before) + 1]
    if found != (1, 2, 3, 4, before[0], *flags, *before[1:]) or any(not isinstance(f, bool | None) for f in flags):
        return run, before
    return run.launch, found[4:]


class Launch:
    """A kernel and all that it is launched with but tensors: made once for all that this follows from.

    Args:
        kernel: A Triton kernel whose parameters are tensors, numbers and constants, in this order.
        grid: Up to three numbers of programs.
        numbers: Its arguments that aren't tensors; each is always of one type.
        early: Whether it calls `dig.ops.early_launch.start_early`.
        parts: Where each tensor of the kernel lies: in which of the tensors that `LaunchContext.start` is given, and
            at which of its elements. Views of parts would take the host as long as memory of their own. Without, they
            are those that are given.
        tuples: Of how many tensors each parameter is a tuple, where the kernel takes tuples alone; they are given one
            after the other.
        boxes: Where the kernel takes tensor descriptors: of each tensor its shape, strides and tile, or None if it is
            taken as it is.
        constants: Its constants, and the options that it is compiled with.
    """

    __slots__ = (
        "boxes", "checked", "constants", "early", "forms", "grid", "kernel", "numbers", "of_one_kind", "parts",
        "programs", "tuples",
    )  # fmt: skip

    def __init__(
        self,
        kernel: Any,
        grid: Grid,
        numbers: tuple[float, ...],
        *,
        early: bool = False,
        parts: tuple[tuple[int, int], ...] | None = None,
        tuples: tuple[int, ...] = (),
        boxes: tuple[Box | None, ...] = (),
        **constants: Any,
    ) -> None:
        self.boxes = boxes
        self.checked: tuple[dict[str, Any] | None, ...] = ()
        """Of descriptors of these boxes all but their tensors, once they have been made."""
        self.kernel, self.grid, self.numbers, self.early, self.constants = kernel, grid, numbers, early, constants
        self.parts, self.of_one_kind = parts, False
        ends = tuple(accumulate(tuples, initial=0))
        self.tuples = tuple(slice(*ends[i : i + 2]) for i in range(len(tuples)))
        self.programs = (*grid, 1, 1)[:3]
        self.forms: dict[Any, tuple[_Form, _Places | None]] = {}
        """By device, order of launch and dtypes, or by order alone; beside each, `places`."""

    def given(self, tensors: tuple[Argument, ...]) -> tuple[Argument, ...]:
        """The kernel's, of those that it is started with."""
        if self.parts is not None:
            # How far it goes no kernel asks: an element stands for the part.
            tensors = tuple(
                tensors[which].as_strided((1,), (1,), tensors[which].storage_offset() + first)
                if first
                else tensors[which]
                for which, first in self.parts
            )
        if self.boxes:
            pairs = zip(tensors, self.boxes, strict=True)
            return tuple(tensor if box is None else TensorDescriptor(tensor, *box) for tensor, box in pairs)
        return tuple(tensors[each] for each in self.tuples) if self.tuples else tensors

    def places(self, tensors: tuple[Argument, ...]) -> _Places | None:
        """How the kernel's addresses are made of the tensors', by ``parts``; None without."""
        if self.parts is None:
            return None
        which = [each for each, _ in self.parts]
        # Of one alone, `itemgetter` gives no tuple.
        pick = itemgetter(*which) if len(which) > 1 else itemgetter(slice(which[0], which[0] + 1))
        offsets = [(i, first * tensors[each].itemsize) for i, (each, first) in enumerate(self.parts) if first]
        return pick, tuple(offsets)

    def settled(self, parts: tuple[tuple[int, int], ...] | None = None) -> Launch:
        """The same for one device and one dtype of each tensor, which whoever starts it has seen to; with these parts.

        Where this one has parts itself, they are kept.
        """
        made = copy.copy(self)
        made.forms, made.of_one_kind = {}, True
        if parts is not None:
            made.parts = parts
        return made


class LaunchContext:
    """How one thread launches this project's kernels on one device.

    A context manager: within, the device is the current one, as Triton's launches ask for.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waited: set[int] = set()
        self._gpu = gpu_index(device) if device.type == "cuda" else -1
        self._forms: dict[Any, _Form] = {}
        self._before: list[int] = []
        self._early: bool | None = None
        self._current: Callable[[int], int] | None = None

    def _ask_for_streams(self) -> Callable[[int], int]:
        """What gives a GPU's current stream, as Triton asks for it."""
        found: Callable[[int], int] = triton.runtime.driver.active.get_current_stream
        self._current = found
        return found

    def __enter__(self) -> LaunchContext:
        if self._gpu >= 0:
            current = torch.cuda.current_device()
            self._before.append(current)
            if current != self._gpu:
                torch.cuda.set_device(self._gpu)
        return self

    def __exit__(self, *error: object) -> None:
        if self._gpu >= 0:
            before = self._before.pop()
            if before != self._gpu:
                torch.cuda.set_device(before)

    def __call__(
        self, kernel: Any, grid: Grid, tensors: tuple[Argument, ...], numbers: tuple[float, ...], **constants: Any
    ) -> None:
        """Launch a kernel on the current stream: what ``kernel[grid](*tensors, *numbers, **constants)`` does.

        Args:
            kernel: A Triton kernel whose parameters come in this order.
            grid: Up to three numbers of programs.
            tensors: What it reads and writes: tensors, tuples of them, or descriptors.
            numbers: Its other arguments; each is always of one type.
            constants: Its constants, and the options that it is compiled with.
        """
        if self._gpu < 0 or _watched(kernel):
            kernel[grid](*tensors, *numbers, **constants)
            return
        addresses, types, bits = _looked_at(tensors)
        key = id(kernel), types, numbers, tuple(constants), tuple(constants.values())
        form = None if bits % ALIGNMENT else self._forms.get(key)
        if form is None:
            compiled = kernel[grid](*tensors, *numbers, **constants)
            if not bits % ALIGNMENT and isinstance(compiled, CompiledKernel):
                self._keep(key, kernel, compiled, len(tensors) + len(numbers), constants)
            return
        stream = (self._current or self._ask_for_streams())(self._gpu)
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        form.run(x, y, z, stream, *form.before, *addresses, *numbers, *form.after)

    def _keep(self, key: Any, kernel: Any, compiled: CompiledKernel, given: int, constants: dict[str, Any]) -> None:
        if len(self._forms) >= MOST_FORMS:
            self._forms.clear()
        self._forms[key] = _form(compiled, kernel, _ordered(kernel, given, constants))

    def start(self, launch: Launch, *tensors: Argument) -> None:
        """Launch a kernel on the current stream, as `__call__`, and on this device, whichever is the current one.

        Args:
            launch: All but the tensors.
            tensors: What it reads and writes, or what this is part of: tensors, or descriptors.
        """
        gpu = self._gpu
        if gpu >= 0 and _current_gpu() != gpu:
            with self:
                self.start(launch, *tensors)
            return
        order = _ANYHOW
        if launch.early:
            order = _EARLY if self._early and not self._waited else self._order()
        if gpu < 0 or _watched(launch.kernel):
            self._through_triton(launch, order, tensors)
            return
        try:
            addresses: list[Any] = [*map(_address, tensors)]
        except TypeError:
            addresses, types, bits = _looked_into(tensors)
            key: Any = (gpu, order, types)
            known = launch.forms.get(key)
        else:
            key = order if launch.of_one_kind else (gpu, order, *map(_dtype, tensors))
            known = launch.forms.get(key)
            if known is not None and known[1] is not None:
                pick, offsets = known[1]
                addresses = [*pick(addresses)]
                for i, offset in offsets:
                    addresses[i] += offset
            bits = reduce(or_, addresses)
            if launch.tuples:
                addresses = [tuple(addresses[each]) for each in launch.tuples]
        if known is None or bits % ALIGNMENT:
            self._through_triton(launch, order, tensors, key)
            return
        if launch.boxes:
            if not launch.checked:
                launch.checked = tuple(without_tensor(each) for each in launch.given(tensors))
            pairs = zip(tensors, addresses, launch.checked, strict=True)
            addresses = [address if of is None else described(tensor, of) for tensor, address, of in pairs]
        run, before, after, _ = known[0]
        stream = (self._current or self._ask_for_streams())(gpu)
        run(*launch.programs, stream, *before, *addresses, *after)

    def _through_triton(self, launch: Launch, order: int, tensors: tuple[Argument, ...], key: Any = None) -> None:
        """Launch as Triton does; under a key, keep what it found."""
        given, constants = launch.given(tensors), launch.constants | _OPTIONS[order]
        compiled = launch.kernel[launch.grid](*given, *launch.numbers, **constants)
        if key is None or not isinstance(compiled, CompiledKernel) or _looked_into(given)[2] % ALIGNMENT:
            return
        after = _ordered(launch.kernel, len(given) + len(launch.numbers), constants)
        launch.forms[key] = _form(compiled, launch.kernel, (*launch.numbers, *after)), launch.places(tensors)

    def early(
        self, kernel: Any, grid: Grid, tensors: tuple[Argument, ...], numbers: tuple[float, ...], **constants: Any
    ) -> None:
        """Launch a kernel that calls `dig.ops.early_launch.start_early`; as `__call__`, but early where it may be."""
        self(kernel, grid, tensors, numbers, **constants, **self.take_options())

    def take_options(self) -> dict[str, Any]:
        """Launch options of the next kernel that calls `dig.ops.early_launch.start_early`, taken as it is launched.

        It is launched early unless it is the first on the current stream since that was made to wait for another one:
        nothing promises that an early kernel of a CUDA graph waits for both. (Outside of a graph a stream that waits
        launches nothing.)
        """
        return _OPTIONS[self._order()]

    def _order(self) -> int:
        """`take_options`, as an index of `_OPTIONS`."""
        if self._early is None:
            self._early = launches_early(self.device)
        if not self._early:
            return _IN_ORDER_ONLY
        if self._waited:
            stream = torch.cuda.current_stream(self.device).cuda_stream
            if stream in self._waited:
                self._waited.remove(stream)
                return _IN_ORDER
        return _EARLY

    def stream_waits(self, stream: torch.cuda.Stream) -> None:
        """A stream has been made to wait for another one: what is launched next on it depends on both."""
        self._waited.add(stream.cuda_stream)


_ANYHOW, _IN_ORDER_ONLY, _IN_ORDER, _EARLY = range(4)
_OPTIONS: tuple[dict[str, Any], ...] = ({}, {"EARLY": False}, {"EARLY": True}, {"EARLY": True, "launch_pdl": True})
"""What each order of launch adds to a kernel's constants; the first to those of one that can't be launched early."""


def _ordered(kernel: Any, given: int, constants: dict[str, Any]) -> tuple[Any, ...]:
    """A kernel's constants in the order of its parameters, of which so many come before; options aren't among them."""
    return tuple(constants[name] for name in kernel.arg_names[given:])


def _watched(kernel: Any) -> bool:
    """Whether a launch must go through Triton: a hook asks to be told of it, or the kernel is interpreted."""
    runtime = knobs.runtime
    try:
        return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or kernel.pre_run_hooks)
    except AttributeError:  # Somebody's function in the place of a chain of hooks, or no kernel of Triton's compiler.
        return True


def _looked_at(arguments: tuple[Argument, ...]) -> tuple[list[Any], tuple[Any, ...], int]:
    """What a kernel is launched with for these, what Triton compiles it for, and the bitwise or of all addresses."""
    bits = 0
    try:
        addresses: list[Any] = list(map(_address, arguments))
    except TypeError:
        return _looked_into(arguments)
    for address in addresses:
        bits |= address
    return addresses, tuple(map(_dtype, arguments)), bits


def _looked_into(arguments: tuple[Argument, ...]) -> tuple[list[Any], tuple[Any, ...], int]:
    """`_looked_at`, of arguments that aren't all tensors."""
    addresses: list[Any] = []
    types: list[Any] = []
    bits = 0
    for each in arguments:
        if isinstance(each, TensorDescriptor):  # which asks for aligned addresses itself
            addresses.append(each)
            types.append((each.base.dtype, *each.block_shape))
        elif isinstance(each, tuple):
            inner, kinds, inside = _looked_at(each)
            addresses.append(tuple(inner))
            types.append(kinds)
            bits |= inside
        else:
            address = _address(each)
            addresses.append(address)
            types.append(_dtype(each))
            bits |= address
    return addresses, tuple(types), bits


def launches_early(device: torch.device) -> bool:
    """Whether kernels are launched early there."""
    return for_device(device).early_launch


class _Contexts(threading.local):
    """A thread's contexts, by GPU (-1: the CPU) and by device. Autograd goes back in threads of its own."""

    def __init__(self) -> None:
        self.by_gpu: dict[int, LaunchContext] = {}
        self.by_device: dict[torch.device, LaunchContext] = {}
        """Of those that say which GPU they are."""


_contexts = _Contexts()


def launch_context(device: torch.device) -> LaunchContext:
    """This thread's context on a device, the same one each time.

    Entered, ``with launch_context(device) as launch``, it makes a CUDA device the current one, as Triton's launches ask
    for. On a CPU kernels are interpreted.

    Looked up, and not handed down from the model, because PyTorch's custom operations take tensors and numbers alone,
    and because it is autograd that calls their backward passes. Nothing else of a launch is ambient.
    """
    known = _contexts.by_device.get(device)
    if known is not None:
        return known
    index = device.index if device.type == "cuda" else -1
    gpu = gpu_index(device) if index is None else index
    by_gpu = _contexts.by_gpu
    context = by_gpu.get(gpu)
    if context is None:
        context = by_gpu[gpu] = LaunchContext(torch.device("cuda", gpu) if gpu >= 0 else device)
    if index is not None:
        _contexts.by_device[device] = context
    return context


def empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Of x's shape and device, contiguous whatever the strides of x; of x's dtype unless another is given."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def or_none(tensor: Tensor | None, like: Tensor) -> Tensor:
    """A tensor, or in its place one of no elements: what PyTorch is told of an operation has no optional results."""
    return torch.empty(0, dtype=like.dtype, device=like.device) if tensor is None else tensor


def last_contiguous(tensor: Tensor) -> Tensor:
    """A gradient as autograd hands it over, copied only if its last dimension isn't contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

"""What every operation needs around its launches: the context of a thread's launches on a device, and tensors to fill.

A context remembers which streams have been made to wait for another one since their last launch. An operation asks for
it once, by `launching`, and hands it on.

**Launching costs the host.** At every launch Triton looks at every argument to find the compiled kernel, which takes
several times as long as the launch itself. Outside of a CUDA graph, a step of one image waits for that. So what Triton
found is kept here, by all that it depends on, and launched directly the next time: `LaunchContext.__call__`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

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


class _Form(NamedTuple):
    """A kernel as it was compiled for some arguments."""

    run: Callable[..., None]
    function: object
    metadata: object
    constants: tuple[Any, ...]
    """In the order of the kernel's parameters."""
    kernel: object
    """Held, so that no other kernel gets its id."""


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
        run, function, metadata, constant, _ = form
        stream = triton.runtime.driver.active.get_current_stream(self._gpu)
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        # Neither metadata nor hooks: `_watched` has seen that nobody asks for them.
        run(x, y, z, stream, function, metadata, None, None, None, *addresses, *numbers, *constant)

    def _keep(self, key: Any, kernel: Any, compiled: CompiledKernel, given: int, constants: dict[str, Any]) -> None:
        if len(self._forms) >= MOST_FORMS:
            self._forms.clear()
        order = tuple(constants[name] for name in kernel.arg_names[given:])
        self._forms[key] = _Form(compiled.run, compiled.function, compiled.packed_metadata, order, kernel)

    def early(
        self, kernel: Any, grid: Grid, tensors: tuple[Argument, ...], numbers: tuple[float, ...], **constants: Any
    ) -> None:
        """Launch a kernel that calls `dig.ops.early_launch.start_early`; as `__call__`, but early where it may be."""
        self(kernel, grid, tensors, numbers, **constants, **self.next_kernel())

    def next_kernel(self) -> dict[str, Any]:
        """Launch options of a kernel that calls `dig.ops.early_launch.start_early`, which counts as launched by this.

        It is launched early unless it is the first on the current stream since that was made to wait for another one:
        nothing promises that an early kernel of a CUDA graph waits for both. (Outside of a graph a stream that waits
        launches nothing.)
        """
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


_IN_ORDER_ONLY: dict[str, Any] = {"EARLY": False}
_IN_ORDER: dict[str, Any] = {"EARLY": True}
_EARLY: dict[str, Any] = {"EARLY": True, "launch_pdl": True}


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
    """A thread's contexts, by GPU (-1: the CPU). Autograd goes back in threads of its own."""

    def __init__(self) -> None:
        self.by_gpu: dict[int, LaunchContext] = {}


_contexts = _Contexts()


def launch_context(device: torch.device) -> LaunchContext:
    """This thread's context on a device, the same one each time.

    Looked up, and not handed down from the model, because PyTorch's custom operations take tensors and numbers alone,
    and because it is autograd that calls their backward passes. Nothing else of a launch is ambient.
    """
    gpu = gpu_index(device) if device.type == "cuda" else -1
    context = _contexts.by_gpu.get(gpu)
    if context is None:
        context = _contexts.by_gpu[gpu] = LaunchContext(torch.device("cuda", gpu) if gpu >= 0 else device)
    return context


def launching(device: torch.device) -> LaunchContext:
    """Make a CUDA device the current one within, as Triton's launches ask for; gives `launch_context`.

    Args:
        device: Where the kernels within are launched. On a CPU they are interpreted.
    """
    return launch_context(device)


def empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Of x's shape and device, contiguous whatever the strides of x; of x's dtype unless another is given."""
    if x.is_contiguous():
        return torch.empty_like(x) if dtype is None else torch.empty_like(x, dtype=dtype)
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def last_contiguous(tensor: Tensor) -> Tensor:
    """A gradient as autograd hands it over, copied only if its last dimension isn't contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

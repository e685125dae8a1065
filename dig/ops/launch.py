"""What every operation needs around its launches: the context of a thread's launches on a device, and tensors to fill.

A context has to remember one thing from one launch to the next: which streams have been made to wait for another one
since. Who launches asks for it by name, once an operation, and hands it on: `launching`.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dig.ops.tiles import for_device, gpu_index


class LaunchContext:
    """How one thread launches this project's kernels on one device.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waited: set[int] = set()

    def next_kernel(self) -> dict[str, Any]:
        """Launch options of a kernel that calls `dig.ops.early_launch.start_early`, which counts as launched by this.

        It is launched early, but where it is the first on the current stream after that was made to wait for another
        one: that such a kernel of a CUDA graph waits for both of them is nowhere promised. (Outside of a graph a stream
        that waits launches nothing.)
        """
        if not launches_early(self.device):
            return {"EARLY": False}
        if self._waited:
            stream = torch.cuda.current_stream(self.device).cuda_stream
            if stream in self._waited:
                self._waited.remove(stream)
                return {"EARLY": True}
        return {"EARLY": True, "launch_pdl": True}

    def stream_waits(self, stream: torch.cuda.Stream) -> None:
        """A stream has been made to wait for another one: what is launched next on it depends on both."""
        self._waited.add(stream.cuda_stream)


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


class launching:  # noqa: N801 - a context manager that is called like a function
    """Make a CUDA device the current one, as Triton's launches ask for; gives this thread's `LaunchContext` there.

    Args:
        device: Where the kernels within are launched. On a CPU they are interpreted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._current: AbstractContextManager[object] = (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        )

    def __enter__(self) -> LaunchContext:
        self._current.__enter__()
        return launch_context(self._device)

    def __exit__(self, *error: Any) -> None:
        self._current.__exit__(*error)


def empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Of x's shape and device, contiguous whatever the strides of x; of x's dtype unless another is given."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def last_contiguous(tensor: Tensor) -> Tensor:
    """A gradient as autograd hands it over, copied only if its last dimension isn't contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

"""A side stream: work beside the critical path, as a branch of a CUDA graph.

A training step is a chain of kernels, each waiting for the one before, and much that it computes nothing in the chain
waits for: gradients of weights, sums over partial sums, the next block's weights in another dtype. While a CUDA graph
is captured, `on_side_stream` puts such work on a second stream, so that the graph holds it as a branch. It then fills
the SMs that a kernel's last programs leave idle, and the gaps between kernels. Outside of a capture the host is what a
step of batch 1 waits for, and two streams would only give it more to do: everything runs in order.

The same kernels add up the same numbers either way, so the results are the same bits.

**Memory.** PyTorch's allocator hands a freed tensor's memory out again to the stream that it came from, at once. What
the side stream reads is therefore held until it is joined. What is allocated on it may be freed at any time: only work
on it, which begins by waiting for all that was launched before it, gets that memory next.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from dig.ops.launch import launch_context
from dig.ops.tiles import gpu_index


class _Scopes(threading.local):
    """What a thread has open, the innermost scope last. (Autograd goes back in threads of its own.)"""

    def __init__(self) -> None:
        self.open: list[_Scope] = []


class _Scope:
    """The two streams of a capture, and what the second still reads."""

    def __init__(self, device: torch.device) -> None:
        self.main = torch.cuda.current_stream(device)
        self.side = _side_stream(device)
        self.held: list[Tensor | None] = []
        self.launch = launch_context(device)
        # What the stream did before is not known here.
        self.launch.stream_waits(self.main)
        self.fork()

    def fork(self) -> None:
        """Let what comes next on the side stream wait for all that has been launched so far."""
        self.side.wait_stream(self.main)
        self.launch.stream_waits(self.side)

    def join(self, point: torch.cuda.Event | None = None) -> None:
        """Let what comes next on the main stream wait for this point of the side stream, or for all of it so far."""
        if point is None:
            self.main.wait_stream(self.side)
        else:
            self.main.wait_event(point)
        self.launch.stream_waits(self.main)


_scopes = _Scopes()
_IN_ORDER: AbstractContextManager[None] = nullcontext()
_side_streams: dict[int, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    index = gpu_index(device)
    if index not in _side_streams:
        _side_streams[index] = torch.cuda.Stream(index)
    return _side_streams[index]


def side_work(device: torch.device) -> AbstractContextManager[None]:
    """Let there be a side stream within, where a CUDA graph is being captured; all of it is joined at the end."""
    if torch.compiler.is_compiling() or device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return _IN_ORDER
    return _open_scope(device)


@contextmanager
def _open_scope(device: torch.device) -> Iterator[None]:
    scope = _Scope(device)
    _scopes.open.append(scope)
    try:
        yield
    finally:
        _scopes.open.remove(scope)
        scope.join()


def on_side_stream(*reads: Tensor | None) -> AbstractContextManager[None]:
    """Launch what is within beside the critical path, after all that has been launched so far.

    Nothing outside may read its results before `wait`, or before the end of `side_work`.

    Args:
        *reads: The tensors that it reads or writes and that were allocated outside; they are held until the end of
            `side_work`.
    """
    if not uses_side_stream():
        return _IN_ORDER
    return _fork(_scopes.open[-1], reads)


@contextmanager
def _fork(scope: _Scope, reads: tuple[Tensor | None, ...]) -> Iterator[None]:
    scope.held.extend(reads)
    scope.fork()
    with torch.cuda.stream(scope.side):
        yield


def uses_side_stream() -> bool:
    """Whether `on_side_stream` puts work on a side stream here."""
    return not torch.compiler.is_compiling() and bool(_scopes.open)


def mark() -> torch.cuda.Event | None:
    """A point that `wait` can wait for: the end of all that is on the side stream so far. None where nothing is."""
    if not uses_side_stream():
        return None
    return _scopes.open[-1].side.record_event()


def wait(point: torch.cuda.Event | None) -> None:
    """Go on after this point: what was on the side stream before it may be read."""
    if point is not None:
        _scopes.open[-1].join(point)

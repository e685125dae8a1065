"""A side stream: work beside the critical path, as a branch of a CUDA graph.

A training step is a chain of kernels, each waiting for the one before. Nothing in the chain waits for some of its work:
gradients of weights, sums over partial sums, the next block's weights in another dtype. While a CUDA graph is captured,
`on_side_stream` puts such work on a second stream, which makes it a branch of the graph. It fills the SMs that a
kernel's last programs leave idle, and the gaps between kernels. Outside of a capture everything runs in order: a step
of batch 1 waits for the host, to which a second stream is only more work.

A backward pass goes block by block. `Across` lets the side stream run on from one block into the next, which need not
wait for the gradients of the weights before it. What a block needs soon goes to a third stream (``ahead``), where it
doesn't queue behind those.

The same kernels add up the same numbers either way, so the results are the same bits.

**Memory.** PyTorch's allocator gives a freed tensor's memory back to the stream that it came from, at once. So what the
side stream reads is held until that is joined. What is allocated on the side stream may be freed at any time: the
memory goes to later work of that stream, which waits for all that was launched before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dig.ops.launch import launch_context
from dig.ops.tiles import gpu_index


class _Scopes(threading.local):
    """What a thread has open, the innermost scope last. (Autograd goes back in threads of its own.)"""

    def __init__(self) -> None:
        self.open: list[_Scope] = []


class _Scope:
    """The streams of a capture, and what those beside the first still read."""

    def __init__(self, device: torch.device, *, third: bool = False) -> None:
        self.main = torch.cuda.current_stream(device)
        self.side = _beside(device, "side")
        self.ahead = _beside(device, "ahead") if third else self.side
        self.held: list[Tensor | None] = []
        self.launch = launch_context(device)
        # What the stream did before is not known here.
        self.launch.stream_waits(self.main)
        for stream in self._others():
            self.fork(stream)

    def _others(self) -> Iterable[torch.cuda.Stream]:
        return dict.fromkeys((self.side, self.ahead))

    def fork(self, stream: torch.cuda.Stream) -> None:
        """Let what comes next on a stream beside the main one wait for all that has been launched on that so far."""
        stream.wait_stream(self.main)
        self.launch.stream_waits(stream)

    def join(self, point: torch.cuda.Event | None = None) -> None:
        """Let what comes next on the main stream wait for a point of another one, or for all of them so far."""
        if point is None:
            for stream in self._others():
                self.main.wait_stream(stream)
        else:
            self.main.wait_event(point)
        self.launch.stream_waits(self.main)


_scopes = _Scopes()
_IN_ORDER: AbstractContextManager[None] = nullcontext()
_streams: dict[tuple[int, str], torch.cuda.Stream] = {}


def _beside(device: torch.device, name: str) -> torch.cuda.Stream:
    key = gpu_index(device), name
    if key not in _streams:
        _streams[key] = torch.cuda.Stream(key[0])
    return _streams[key]


def _may_fork(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, by nobody who compiles."""
    return not torch.compiler.is_compiling() and device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def side_work(device: torch.device) -> AbstractContextManager[None]:
    """Let there be a side stream within, where a CUDA graph is being captured; all of it is joined at the end."""
    return _open_scope(device) if _may_fork(device) else _IN_ORDER


@contextmanager
def _open_scope(device: torch.device) -> Iterator[None]:
    scope = _Scope(device)
    _scopes.open.append(scope)
    try:
        yield
    finally:
        _scopes.open.remove(scope)
        scope.join()


class _Left(NamedTuple):
    """What the parts before one left to the side stream."""

    end: torch.cuda.Event
    held: list[Tensor | None]
    parts: int


class Across:
    """Side work of a backward pass that is gone back through part by part, as autograd's nodes are.

    Each part begins while the side stream still does what the one before left to it. Nobody may read that before
    `join`, of all parts or of that one; where the pass ends without, its end joins.
    """

    def __init__(self) -> None:
        self._scope: _Scope | None = None
        self._before: _Left | None = None
        self._begun, self._passed = 0, 0

    def part(self) -> Part:
        """One of its parts: for the node that goes back through it, and for whoever hands on its results."""
        return Part(self)

    @contextmanager
    def work(self, part: Part, device: torch.device) -> Iterator[None]:
        """`Part.work` while a CUDA graph is captured."""
        if self._scope is None:
            self._scope = _Scope(device, third=True)
            torch.autograd.Variable._execution_engine.queue_callback(self.join)
        self.catch_up()
        scope = self._scope
        self._before = _Left(scope.side.record_event(), scope.held, self._begun)
        scope.held = []
        part.number = self._begun
        self._begun += 1
        _scopes.open.append(scope)
        try:
            yield
        finally:
            _scopes.open.remove(scope)

    def catch_up(self) -> None:
        """See `Part.catch_up`."""
        if self._scope is not None and self._before is not None:
            self._scope.join(self._before.end)
            self._passed = self._before.parts
            self._before = None

    def has_passed(self, part: Part) -> bool:
        """Whether the main stream goes on after all that a part left to the side stream, if it left anything."""
        return part.number is None or part.number < self._passed

    def join(self) -> None:
        """Go on after all of it."""
        scope, self._scope, self._before = self._scope, None, None
        self._passed = self._begun
        if scope is not None:
            scope.join()


class Part:
    """A part of `Across`, made by that.

    Attributes:
        number: How many parts had begun before this one did, the last time; None where it never did in a capture.
        places: Gives, in the backward pass, memory in which somebody wants the part's results; None where nobody does.
    """

    def __init__(self, across: Across) -> None:
        self._across = across
        self.places: Callable[[], Any] | None = None
        self.number: int | None = None

    def work(self, device: torch.device) -> AbstractContextManager[None]:
        """`side_work` of the part, within a node's backward pass."""
        return self._across.work(self, device) if _may_fork(device) else _IN_ORDER

    def catch_up(self) -> None:
        """Go on after all that the part before this one left to the side stream, whose tensors are then let go.

        To be called in each part once, where that has been done: until then the memory is not free.
        """
        self._across.catch_up()

    def join(self) -> None:
        """Go on after all of this part: nothing to wait for where a later one has caught up with it."""
        if not self._across.has_passed(self):
            self._across.join()


def on_side_stream(*reads: Tensor | None, ahead: bool = False) -> AbstractContextManager[None]:
    """Launch what is within beside the critical path, after all that has been launched so far.

    Nothing outside may read its results before `wait`, or before the end of `side_work`.

    Args:
        *reads: The tensors that it reads or writes and that were allocated outside; they are held until the end of
            `side_work`.
        ahead: Whether something soon waits for it: in a `Part` it then has a stream of its own.
    """
    if not uses_side_stream():
        return _IN_ORDER
    scope = _scopes.open[-1]
    return _fork(scope, scope.ahead if ahead else scope.side, reads)


@contextmanager
def _fork(scope: _Scope, stream: torch.cuda.Stream, reads: tuple[Tensor | None, ...]) -> Iterator[None]:
    scope.held.extend(reads)
    scope.fork(stream)
    with torch.cuda.stream(stream):
        yield


def uses_side_stream() -> bool:
    """Whether `on_side_stream` puts work on a side stream here."""
    return not torch.compiler.is_compiling() and bool(_scopes.open)


class Point(NamedTuple):
    """The end of all that is on a stream beside the main one so far, and how many tensors are held by then."""

    event: torch.cuda.Event
    held: int


def mark(*, ahead: bool = False) -> Point | None:
    """A point that `wait` can wait for: the end of all that is on the side stream so far. None where nothing is.

    Args:
        ahead: As of `on_side_stream`: of what was launched there.
    """
    if not uses_side_stream():
        return None
    scope = _scopes.open[-1]
    return Point((scope.ahead if ahead else scope.side).record_event(), len(scope.held))


def wait(point: Point | None) -> None:
    """Go on after this point: what was on the side stream before it may be read."""
    if point is not None:
        _scopes.open[-1].join(point.event)


def let_go(point: Point | None) -> None:
    """`wait`, and hold no longer what the side stream read before this point; nothing else may read that beside it."""
    if point is not None:
        wait(point)
        scope = _scopes.open[-1]
        scope.held[: point.held] = [None] * point.held

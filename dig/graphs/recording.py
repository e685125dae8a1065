"""The lower half of capturing: the one stream of a process, and one function recorded as it stands.

Nothing here runs a step before, copies an input, or puts anything back: a benchmark that owns its warm-up uses it bare.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

TORCH_FOLDER = str(Path(torch.__file__).parent)
OWN_FOLDER = str(Path(__file__).parent)

_abandoned: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture broke. PyTorch's allocators may go on asking them whether a stream is theirs."""


_ending: list[weakref.WeakSet[Any]] = []
"""Of each `graphs_end_here` that is under way, the graphs recorded within."""


@contextmanager
def graphs_end_here() -> Iterator[None]:
    """Reset every graph that is recorded within, whoever holds it: none can be replayed afterwards.

    For what has to outlive them: a NCCL communicator that a graph sends over waits in its end for the graph's, forever.
    """
    here: weakref.WeakSet[Any] = weakref.WeakSet()
    _ending.append(here)
    try:
        yield
    finally:
        _ending.remove(here)
        for graph in list(here):
            with suppress(RuntimeError):  # After an error of CUDA's, which is what the caller hears of.
                graph.reset()


class CaptureError(RuntimeError):
    """A step can't be captured as a CUDA graph, or a captured one not be called like this; the message says why."""


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """Run what is within on the one stream that this process captures on, and wait for it; nothing on a CPU.

    A graph can't be captured on the default stream. And cuBLAS keeps a workspace, 32 MiB on an H100, for every stream
    that a thread has called it on, to the end of the process: steps on several streams would be charged with several.
    """
    if device.type == "cpu":
        yield
        return
    with torch.cuda.device(device):
        stream = _stream(_index(device))
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            # After an error too: what it left running must not write to what somebody puts back.
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()


@contextmanager
def garbage_collected_before() -> Iterator[None]:
    """Collect Python's garbage, and collect none within: what holds memory of CUDA frees it in its end.

    In a capture that is not permitted: it breaks the capture, or, in a destructor, ends the process, as a window of
    PyTorch's symmetric memory does. Which object is in a cycle, and when its turn comes, nobody knows beforehand.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def record(
    run: Callable[[], T], *, device: torch.device | None = None, generators: Sequence[torch.Generator] = ()
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Record one call of a function as a CUDA graph.

    Returns the graph, and what the call returned, which each replay writes to.

    The function must have run on the capture stream before (`on_capture_stream`), so that kernels are compiled and
    tuned, and states exist. It isn't executed: its launches are only noted.

    Args:
        run: Launches on the current stream, and on streams that wait for it and that it waits for again.
        device: The GPU; the current one if not given.
        generators: Generators of random numbers on the GPU, other than its default one, that the function draws from.

    Raises:
        CaptureError: It does what a graph can't hold. The process can go on: the stream is what it was, and the
            allocator as good as PyTorch lets it be.
    """
    with torch.cuda.device(device), garbage_collected_before():  # The device None changes nothing.
        index = torch.cuda.current_device()
        torch.cuda.synchronize()
        # What is cached is not the graph's to use, whose memory comes from a pool of its own.
        torch.cuda.empty_cache()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        for ending in _ending:
            ending.add(graph)
        for generator in generators:
            graph.register_generator_state(generator)
        before = torch.cuda.current_stream()
        raised: Exception | None = None
        result: Any = None
        try:
            # Other threads may pin memory meanwhile, as one does that makes the next inputs; the default mode forbids
            # that everywhere in the process.
            with torch.cuda.graph(graph, pool=pool, stream=_stream(index), capture_error_mode="thread_local"):
                try:
                    result = run()
                except Exception as error:
                    raised = error
        except RuntimeError as error:
            # The capture couldn't be ended. What the function itself raised comes first, and says more.
            torch.cuda.set_stream(before)
            _clean_up(graph, pool, index)
            raised = raised or error
        if raised is not None:
            explained = _explained(raised)
            raise explained from (None if explained is raised else raised)
    return graph, result


def _clean_up(graph: torch.cuda.CUDAGraph, pool: Any, index: int) -> None:
    """Undo what `CUDAGraph.capture_end` would have undone, had it come so far."""
    _abandoned.append(graph)
    with suppress(RuntimeError, AttributeError):
        # The first raises where the capture had got past it, and the pool is released by the graph.
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    # The default generator may still take itself for captured; the end of any capture tells it otherwise.
    again = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=_stream(index), capture_error_mode="thread_local")
    with suppress(RuntimeError), again:
        torch.zeros(1, device=torch.device("cuda", index))


def _explained(error: Exception) -> Exception:
    """The error as it is, or, where it is CUDA's or PyTorch's about a capture, one that says what to do."""
    text = str(error).split("\n")[0].removesuffix(".")
    passes = isinstance(error, (CaptureError, torch.OutOfMemoryError)) or not isinstance(error, RuntimeError)
    if passes or "captur" not in str(error):
        return error
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
    where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "the step"
    return CaptureError(
        f"{where}, can't be in a CUDA graph ({text}): within a step nothing may wait for the GPU, copy from or to "
        "memory that isn't pinned (torch.tensor(..., device=...) does), or launch on a stream that the step's doesn't "
        "wait for (as gradients do while the loss of an eager step is alive); move it out of the step"
    )


def is_users(filename: str) -> bool:
    """Whether a frame of this file is neither PyTorch's nor this package's, nor of a decorator between them."""
    return not filename.startswith((TORCH_FOLDER, OWN_FOLDER, contextlib.__file__))

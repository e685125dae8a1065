"""Windows: memory of one rank that its peers read, out of which `dig.training.parallel.copying` copies.

It is PyTorch's symmetric memory. Multicast is never used.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Window(Protocol):
    """Memory of this rank that its peers may read; each of them has as much of its own.

    Attributes:
        uncounted: Bytes of it that PyTorch's allocator knows nothing of.
    """

    uncounted: int

    def of(self, rank: int) -> Tensor:
        """Bytes of a rank's memory, this one's too: in a storage that nothing holds but what is returned."""

    def meet(self) -> None:
        """Let work that follows on the current stream wait for what all ranks have launched on theirs before this."""


class SymmetricWindow:
    """A window in PyTorch's symmetric memory. Made by `over` or `new`, by all ranks at a time.

    Args:
        memory: What it is over.
        handle: PyTorch's, of that memory.
    """

    def __init__(self, memory: Tensor, handle: Any) -> None:
        self._memory = memory  # The handle alone does not keep it.
        self._handle = handle
        self.uncounted = 0

    @classmethod
    def over(cls, memory: Tensor, group: dist.ProcessGroup) -> SymmetricWindow | None:
        """One over memory that is there; None if that is not symmetric. The ranks' hosts wait for each other.

        Args:
            memory: Contiguous, of as many bytes on every rank.
            group: Whose ranks may read it.

        Raises:
            RuntimeError: A CUDA graph is being captured, or the memory can't be shared.
        """
        import torch.distributed._symmetric_memory as symmetric

        _refuse_capture(memory.nbytes)
        # Nothing here needs multicast, and there are GPUs on which PyTorch can't bind memory to it.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        # PyTorch 2.11 does two things on the default stream, whichever is current, without waiting for them. It clears
        # the flags by which ranks meet: a peer may have set one by then, and the ranks would wait for each other for
        # ever. And it writes where the flags are, which kernels on other streams would read too early.
        default = torch.cuda.default_stream(memory.device)
        default.synchronize()
        handle: Any = symmetric.rendezvous(memory, group)
        default.synchronize()
        return None if handle is None else cls(memory, handle)

    @classmethod
    def new(cls, nbytes: int, device: torch.device, group: dist.ProcessGroup) -> SymmetricWindow:
        """One over memory that is allocated for it; else as `over`."""
        import torch.distributed._symmetric_memory as symmetric

        _refuse_capture(nbytes)
        before = torch.cuda.memory_allocated(device)
        made = cls.over(symmetric.empty(nbytes, dtype=torch.uint8, device=device), group)
        assert made is not None
        # PyTorch 2.13 takes it out of a pool of its allocator, 2.11 from the driver.
        made.uncounted = max(0, nbytes - (torch.cuda.memory_allocated(device) - before))
        return made

    def of(self, rank: int) -> Tensor:
        """See `Window.of`."""
        # Not get_buffer, which counts from where the allocation begins.
        return self._handle.get_remote_tensor(rank, (self._memory.nbytes,), torch.uint8)

    def meet(self) -> None:
        """See `Window.meet`. One small kernel, which a CUDA graph can hold."""
        self._handle.barrier(channel=0)


def _refuse_capture(nbytes: int) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph is being captured, and {nbytes} bytes more would have to be shared with the other ranks, "
            "for which their hosts have to meet; run the step on the stream of the capture before"
        )


class WindowsDifferError(ValueError):
    """Ranks that copy were lent other windows than each other, so what they read of their peers was something else."""


@dataclass(eq=False)
class _Lent:
    """A window, and to whom it was lent last."""

    window: Window
    nbytes: int
    stream: int
    tensor: StorageWeakRef
    address: int


class Windows:
    """Windows that are lent as tensors, and lent again once nothing holds those.

    Whoever lets go of one must have ordered its stream behind all work on it, as with memory of PyTorch's allocator:
    like that one, this lends it again on the same stream alone. FSDP does so. Before it drops what was gathered, it
    lets the streams that gather wait for the copy out of it; before it drops what was reduced, the stream of the
    backward pass for the reduction, of which the last thing is that all ranks meet.

    All ranks must ask for the same in the same order, and let go of it likewise; then they are lent the same windows
    (`check`).

    Args:
        group: Whose ranks read them.
        make: Makes a window of so many bytes on a device; one of symmetric memory if not given.
    """

    def __init__(self, group: dist.ProcessGroup, make: Callable[[int, torch.device], Window] | None = None) -> None:
        self.rank, self.ranks = group.rank(), group.size()
        self._make = make or (lambda nbytes, device: SymmetricWindow.new(nbytes, device, group))
        self._lent: list[_Lent] = []
        self._order = 0

    @property
    def count(self) -> int:
        """How many have been made."""
        return len(self._lent)

    @property
    def uncounted(self) -> int:
        """Bytes of them that PyTorch's allocator knows nothing of."""
        return sum(lent.window.uncounted for lent in self._lent)

    def lend(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(numel,) in a window, for the current stream.

        Raises:
            RuntimeError: None is free that is large enough, and a CUDA graph is being captured.
        """
        nbytes = numel * dtype.itemsize
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        free = (
            lent for lent in self._lent if lent.stream == stream and lent.nbytes >= nbytes and lent.tensor.expired()
        )
        lent = next(free, None)
        window = self._make(nbytes, device) if lent is None else lent.window
        memory = window.of(self.rank)
        tensor = StorageWeakRef(memory.untyped_storage())
        if lent is None:
            lent = _Lent(window, nbytes, stream, tensor, memory.data_ptr())
            self._lent.append(lent)
        else:
            lent.tensor, lent.address = tensor, memory.data_ptr()
        self._order = zlib.crc32(f"{self._lent.index(lent)} {nbytes}".encode(), self._order)
        return memory[:nbytes].view(dtype)

    def behind(self, tensor: Tensor) -> Window | None:
        """The window that was lent as this tensor, from its first element on; None if there is none."""
        address = tensor.data_ptr()
        found = (lent.window for lent in self._lent if lent.address == address and not lent.tensor.expired())
        return next(found, None)

    def check(self, gather: Callable[[int], list[int]]) -> None:
        """See that all ranks were lent the same windows so far. All must ask.

        Args:
            gather: Gives what each rank gives.

        Raises:
            WindowsDifferError: They were not; on all ranks.
        """
        if len(set(gather(self._order))) > 1:
            raise WindowsDifferError(
                "ranks that copy were lent other windows than each other, and read wrong values: what they computed "
                "since is lost; send by collectives"
            )

    def others(self) -> list[int]:
        """The other ranks, from the next one on: no two ranks begin with the same one."""
        return [(self.rank + step) % self.ranks for step in range(1, self.ranks)]


def seen_in(window: Window, rank: int, like: Tensor) -> Tensor:
    """What a rank has where this one has a contiguous tensor that a window begins with."""
    return window.of(rank)[: like.nbytes].view(like.dtype)

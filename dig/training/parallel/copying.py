"""Collectives by copy engines: each rank reads what it needs out of its peers' memory.

NCCL's kernels hold SMs for as long as they send, and a matrix product whose CTAs fill the GPU then takes two waves. A
copy from a peer's memory is done by an engine beside the SMs; only sums are kernels, and the few threads in which ranks
wait for each other. The memory is PyTorch's symmetric memory. Multicast is never used.

Shapes: N elements of one rank's share, W ranks.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

GRAIN = 32
"""Elements that a rank's chunk of a bucket is a multiple of: copies begin at 128 bytes of fp32."""
PIECE = 1 << 24
"""Most elements of a bucket that are copied to a window at a time, where it isn't in one itself."""


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


def _seen(window: Window, rank: int, like: Tensor) -> Tensor:
    """What a rank has where this one has a contiguous tensor that a window begins with."""
    return window.of(rank)[: like.nbytes].view(like.dtype)


class CopyGather:
    """FSDP2's all-gather: each rank copies the others' shares out of their windows into its own.

    Args:
        windows: What is gathered lies in them.
    """

    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is gathered, in which FSDP puts this rank's share in its place."""
        return self._windows.lend(math.prod(map(int, size)), dtype=dtype, device=device).view(*map(int, size))

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather on the current stream.

        Args:
            output_tensor: (W·N,) that `allocate` gave.
            input_tensor: (N,) of it, this rank's share in its place.
            group: Of the windows.
            async_op: Makes no difference: the host never waits.

        Raises:
            RuntimeError: The output is not in a window.
        """
        window = self._windows.behind(output_tensor)
        if window is None:
            raise RuntimeError("what is gathered must lie in memory that CopyGather.allocate gave")
        shares = output_tensor.view(self._windows.ranks, -1)
        window.meet()  # Every rank's share is in its place.
        for peer in self._windows.others():
            shares[peer].copy_(_seen(window, peer, output_tensor).view_as(shares)[peer])
        window.meet()  # No rank reads this one's share any more.


class CopyReduce:
    """FSDP2's reduce-scatter: each rank copies its parts of the others' tensors, and adds them up in the ranks' order.

    Args:
        windows: What is reduced lies in them.
    """

    def __init__(self, windows: Windows) -> None:
        self._windows = windows
        self._next_output: int | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is reduced, which peers read, and then for the result, which they don't."""
        numel = math.prod(map(int, size))
        # FSDP asks for a pair, one after the other. Were an input taken for an output, it would be copied once more.
        if numel == self._next_output:
            self._next_output = None
            return torch.empty(*map(int, size), dtype=dtype, device=device)
        self._next_output = numel // self._windows.ranks
        return self._windows.lend(numel, dtype=dtype, device=device).view(*map(int, size))

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Reduce on the current stream.

        Args:
            output_tensor: (N,), overwritten: the sum or the mean of the ranks' parts.
            input_tensor: (W·N,), a part for each rank.
            group: Of the windows.
            op: ``SUM`` or ``AVG``.
            async_op: Makes no difference: the host never waits.

        Raises:
            ValueError: The operation is another one.
        """
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(f"copies add up or average; got {op}")
        windows, given = self._windows, input_tensor
        window = windows.behind(given)
        if window is None:
            given = windows.lend(given.numel(), dtype=given.dtype, device=given.device)
            given.copy_(input_tensor.view(-1))
            window = cast(Window, windows.behind(given))
        output = output_tensor.view(-1)
        # The first one lies where the result comes: with two ranks nothing more is needed.
        first = min(windows.others(), default=windows.rank)
        parts = [output if rank == first else torch.empty_like(output) for rank in range(windows.ranks)]
        parts[windows.rank] = given.view(windows.ranks, -1)[windows.rank]
        window.meet()  # Every rank's tensor is there.
        for peer in windows.others():
            parts[peer].copy_(_seen(window, peer, given).view(windows.ranks, -1)[windows.rank])
        _combine(parts, output, output, mean=op == dist.ReduceOp.AVG)
        window.meet()  # No rank reads this one's any more.


def _combine(parts: Sequence[Tensor], scratch: Tensor, output: Tensor, *, mean: bool) -> None:
    """Add up the ranks' parts in their order, so that the bits do not depend on the rank that does it.

    Args:
        parts: (N,) of each rank.
        scratch: The first or second of them, or another tensor, that is overwritten.
        output: Takes the result; with two ranks or fewer it may be any of the parts.
        mean: Whether it is divided by their number.
    """
    if len(parts) == 1:
        output.copy_(parts[0])
    elif len(parts) == 2 and mean:
        # One pass over the memory; a sum and a division are two. It rounds the difference, then the result: both
        # within 2^-24 of the larger part, in fp32.
        torch.lerp(parts[0], parts[1], 0.5, out=output)
    elif len(parts) == 2:
        torch.add(parts[0], parts[1], out=output)
    else:
        torch.add(parts[0], parts[1], out=scratch)
        for part in parts[2:]:
            scratch.add_(part)
        if mean:
            torch.div(scratch, len(parts), out=output)
        elif output is not scratch:
            output.copy_(scratch)


def use_copies(model: nn.Module, group: dist.ProcessGroup, windows: Windows | None = None) -> Windows:
    """Let a model that FSDP2 shards gather and reduce by copies from now on.

    Args:
        model: Sharded (`dig.training.parallel.shard`), over all ranks of the group.
        group: Of its mesh.
        windows: What all its parts share; made if not given.
    """
    windows = Windows(group) if windows is None else windows
    gather, reduce = CopyGather(windows), CopyReduce(windows)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_custom_all_gather(cast(Any, gather))
            part.set_custom_reduce_scatter(cast(Any, reduce))
    return windows


def average(windows: Windows, own: Tensor, window: Window | None = None) -> None:
    """Make a tensor its mean over the ranks, in place: each averages a chunk, and copies the others' from them.

    Args:
        windows: Of the ranks.
        own: (N,), contiguous.
        window: Begins with the tensor; the one that was lent as it, if not given.
    """
    window = cast(Window, windows.behind(own)) if window is None else window
    rank, ranks, others = windows.rank, windows.ranks, windows.others()
    size = math.ceil(own.numel() / (ranks * GRAIN)) * GRAIN

    def chunk(tensor: Tensor, number: int) -> Tensor:
        return tensor[number * size : (number + 1) * size]

    seen = {peer: _seen(window, peer, own) for peer in others}
    mine = chunk(own, rank)
    parts = [mine if number == rank else torch.empty_like(mine) for number in range(ranks)]
    window.meet()  # Every rank's tensor is there.
    for peer in others:
        parts[peer].copy_(chunk(seen[peer], rank))
    _combine(parts, parts[min(others, default=rank)], mine, mean=True)
    window.meet()  # Every rank's chunk is its mean, and nobody reads what it was before.
    for peer in others:
        chunk(own, peer).copy_(chunk(seen[peer], peer))
    window.meet()  # No rank reads this one's chunk any more.


class CopyAllReduce:
    """Lets DistributedDataParallel average gradients by copies, beside the backward pass.

    Its buckets are laid anew after the first backward pass, as ever, but in symmetric memory, and shared with the other
    ranks in the pass that follows. Until then there is one bucket of all gradients, which is copied to a window and
    back, piece by piece: a window of its size would stay.

    Args:
        network: On its device, with ``gradient_as_bucket_view``, before its first pass.
        windows: For buckets that aren't in symmetric memory; made if not given.

    Attributes:
        windows: Those.
    """

    def __init__(self, network: DistributedDataParallel, windows: Windows | None = None) -> None:
        self._group: dist.ProcessGroup = network.process_group
        self.windows = Windows(self._group) if windows is None else windows
        self._device = next(network.parameters()).device
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            # Else its small kernels queue behind the thousands of CTAs of the backward pass.
            self._stream = torch.cuda.Stream(self._device, priority=-1)
            # Else PyTorch may allocate them as NCCL wants them, past the pool that is in use.
            os.environ.setdefault("DDP_DISABLE_COMM_MEM", "1")
            self._hook = network.register_forward_pre_hook(torch.compiler.disable(self._lay_buckets))
        self._symmetric = False
        self._shared: dict[tuple[int, int], Window | None] = {}
        # No function of this file: DistributedDataParallel refuses annotations that are text.
        network.register_comm_hook(self, lambda state, bucket: state.average(bucket))

    def _lay_buckets(self, network: nn.Module, _given: object) -> None:
        """Before each pass until DistributedDataParallel knows the gradients' order; it would do the same within."""
        import torch.distributed._symmetric_memory as symmetric

        if not torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing():
            return
        with torch.cuda.use_mem_pool(symmetric.get_mem_pool(self._device)):
            self._symmetric = cast(Any, network).reducer._rebuild_buckets()
        if self._symmetric:
            self._hook.remove()

    @torch.no_grad()
    def average(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Launch the average of a bucket; the future orders the stream that waits for it, and not the host.

        Raises:
            RuntimeError: A bucket would have to be shared while a CUDA graph is being captured.
        """
        gradients = bucket.buffer()
        with self._beside():
            window = self._window_of(gradients)
            if window is not None:
                average(self.windows, gradients, window)
            else:
                for piece in gradients.split(PIECE):
                    lent = self.windows.lend(piece.numel(), dtype=piece.dtype, device=piece.device)
                    lent.copy_(piece)
                    average(self.windows, lent)
                    piece.copy_(lent)
                    del lent  # Else the next piece needs another window.
            future: torch.futures.Future[Tensor] = torch.futures.Future(
                devices=None if self._stream is None else [self._device]
            )
            # It notes where the current stream is, which is what whoever waits for it waits for.
            future.set_result(gradients)
        return future

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of the copies, behind what the current one has launched."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def _window_of(self, gradients: Tensor) -> Window | None:
        """The window over a bucket; None while it is not in symmetric memory."""
        if not self._symmetric:
            return None
        key = gradients.data_ptr(), gradients.nbytes
        if key not in self._shared:
            self._shared[key] = SymmetricWindow.over(gradients, self._group)
        return self._shared[key]

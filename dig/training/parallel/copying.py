"""Collectives by copy engines: each rank reads what it needs out of its peers' memory.

NCCL's kernels hold SMs for as long as they send, and a matrix product whose CTAs fill the GPU then takes two waves. A
copy from a peer's memory is done by an engine beside the SMs; only sums are kernels, and the few threads in which ranks
wait for each other. The memory is lent in `dig.training.parallel.windows`.

Shapes: N elements of one rank's share, W ranks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dig.gradient_places import Places, lend_to
from dig.training.parallel.windows import SymmetricWindow, Window, Windows, seen_in

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

GRAIN = 32
"""Elements that a rank's chunk of a bucket is a multiple of: copies begin at 128 bytes of fp32."""
PIECE = 1 << 24
"""Most elements of a bucket that are copied to a window at a time, where it isn't in one itself."""


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
            shares[peer].copy_(seen_in(window, peer, output_tensor).view_as(shares)[peer])
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
            parts[peer].copy_(seen_in(window, peer, given).view(windows.ranks, -1)[windows.rank])
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

    seen = {peer: seen_in(window, peer, own) for peer in others}
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
    back, piece by piece: a window of its size would stay. Buckets that stay are lent to the backward pass
    (`dig.gradient_places`): what is written there need not be copied there.

    Args:
        network: On its device, with ``gradient_as_bucket_view``, before its first pass.
        windows: For buckets that aren't in symmetric memory; made if not given.

    Attributes:
        windows: Those.
        places: In the buckets that stay.
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
        self._laid = False
        self._shared: dict[tuple[int, int], Window | None] = {}
        self.places = Places()
        self._lent: dict[int, int] = {}
        """Where the bucket of a number was when it was lent."""
        if network.gradient_as_bucket_view:
            lend_to(network, self.places)
        # No function of this file: DistributedDataParallel refuses annotations that are text.
        network.register_comm_hook(self, lambda state, bucket: state.average(bucket))

    def _lay_buckets(self, network: nn.Module, _given: object) -> None:
        """Before each pass until DistributedDataParallel knows the gradients' order; it would do the same within."""
        import torch.distributed._symmetric_memory as symmetric

        cuda = self._device.type == "cuda"
        if not torch.is_grad_enabled() or (cuda and torch.cuda.is_current_stream_capturing()):
            return
        with torch.cuda.use_mem_pool(symmetric.get_mem_pool(self._device)) if cuda else nullcontext():
            self._laid = cast(Any, network).reducer._rebuild_buckets()
        if self._laid:
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
        self._lend(bucket, window)
        return future

    def _lend(self, bucket: GradBucket, window: Window | None) -> None:
        """Lend places in a bucket that stays, once; those of one that doesn't would be left by the next pass."""
        if not self._laid or (window is None and self._stream is not None):
            return
        index, at = bucket.index(), bucket.buffer().data_ptr()
        known = self._lent.get(index)
        if known == at:
            return
        if known is not None:
            self.places.clear()
            self._lent.clear()
        self._lent[index] = at
        self.places.lend(bucket.parameters(), bucket.gradients())

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
        if not self._laid or self._stream is None:
            return None
        key = gradients.data_ptr(), gradients.nbytes
        if key not in self._shared:
            self._shared[key] = SymmetricWindow.over(gradients, self._group)
        return self._shared[key]

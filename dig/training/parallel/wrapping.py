"""A model that trains in all ranks: DistributedDataParallel, or FSDP2 by block.

Shapes: B samples of one rank's part of a batch.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dig.graphs import on_capture_stream
from dig.training.blocks import blocks_of
from dig.training.parallel.copying import CopyAllReduce, use_copies
from dig.training.parallel.reach import can_copy
from dig.training.parallel.windows import Windows

Kind = Literal["ddp", "fsdp"]
Sending = Literal["auto", "collectives", "copies"]
Precision = Literal["bf16", "fp32"]
M = TypeVar("M", bound=nn.Module)
logger = logging.getLogger(__name__)

GRAPH_WARMUP = 11
"""Runs before a step with DistributedDataParallel is captured, as PyTorch's notes on CUDA graphs ask for: over the
first ten it times itself with events, which a capture can't hold, and in the second it lays its buckets anew."""
_CONSTANT_BUFFERS: dict[str, Any] = {
    name: False
    for name in ("forward_sync_buffers", "broadcast_buffers")  # its name of today, and before torch 2.13
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
}
if len(_CONSTANT_BUFFERS) > 1:
    del _CONSTANT_BUFFERS["broadcast_buffers"]
# A depthwise convolution's weight (C, 1, K, K) gets a gradient from torch.compile with the strides of channels last:
# (9, 1, 3, 1), not (9, 9, 3, 1). They differ in a dimension of one element, where no stride is ever taken: both name
# the same memory in the same order, and autograd takes the one for the other. DistributedDataParallel compares them as
# they are, and warns, once a process. A difference in another dimension is not meant, and still told where it is first.
_SAME_MEMORY = (
    r"Grad strides do not match bucket view strides(?s:.*)"
    r"grad\.sizes\(\) = \[(\d+), 1, (\d+), (\d+)\], strides\(\) = \[(\d+), \d+, (\d+), (\d+)\]\s+"
    r"bucket_view\.sizes\(\) = \[\1, 1, \2, \3\], strides\(\) = \[\4, \d+, \5, \6\]"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Parallel:
    """A model in training on all ranks. Made by `wrap`.

    Attributes:
        kind: How.
        model: The model, with the names of its parameters as they were; with FSDP they are DTensors, sharded.
        network: What is called with ``(x, t, y)`` of this rank's B samples; its backward pass leaves gradients that are
            means over the ranks.
        warmup: Runs that a capture needs before (`dig.capture`).
        keeps_whole: Whether blocks of a sharded model stay gathered to the backward pass of a step's last part.
        sending: ``copies`` where ranks copy from each other's memory; ``collectives`` where their group's backend
            sends.
        windows: What they copy out of; None without copies.
    """

    kind: Kind
    model: nn.Module
    network: Callable[..., Any]
    warmup: int
    keeps_whole: bool = False
    sending: Literal["collectives", "copies"] = "collectives"
    windows: Windows | None = None

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Run one part of a batch, forward and backward: only the last one's gradients go to the other ranks."""
        if isinstance(self.model, FSDPModule):
            self.model.set_is_last_backward(last)
            self.model.set_requires_gradient_sync(last)
            if self.keeps_whole:
                # In a graph nothing is freed and gathered again: the next part finds what this one had.
                self.model.set_reshard_after_backward(last)
            yield
            return
        inner = getattr(self.network, "_orig_mod", self.network)  # what torch.compile wrapped
        assert isinstance(inner, DistributedDataParallel)
        with nullcontext() if last else inner.no_sync():
            yield


def wrap(
    model: nn.Module,
    kind: Kind,
    *,
    dtype: Precision = "bf16",
    captured: bool = False,
    compiled: bool = False,
    mesh: DeviceMesh | None = None,
    sending: Sending = "collectives",
) -> Parallel:
    """Make a model train in all ranks of the job that this process has joined (`dig.training.parallel.joined`).

    Run the step as ever: autocast around ``network``'s call where ``dtype`` is bf16, and one optimizer over
    ``model.parameters()``, made after this. Average the ranks' losses where they are shown.

    Args:
        model: On this rank's device, with the same weights on all ranks, in training mode. One that a device can't
            hold may lie on the host with ``fsdp`` and a mesh of GPUs: it goes there share by share.
        kind: ``ddp`` keeps all of the model on every rank and averages gradients. ``fsdp`` shards weights, gradients
            and moments by block: each block is gathered when it is called.
        dtype: With ``fsdp``: ``bf16`` gathers weights in bf16, computes with them, and reduces gradients in fp32;
            ``fp32`` does all in fp32. With ``ddp`` weights and gradients are fp32, and autocast says what computes.
        captured: Whether the step is to be a CUDA graph. With ``fsdp`` blocks then stay whole from their first forward
            to their last backward pass of a step.
        compiled: Whether it goes through torch.compile: the whole model with ``ddp``, block by block with ``fsdp``.
        mesh: Of one dimension, with ``fsdp``; all ranks if not given.
        sending: How weights and gradients go: ``collectives`` of the group's own backend, NCCL or gloo; ``copies`` by
            engines that copy between GPUs of one host, beside kernels (`dig.training.parallel.copying`); ``auto`` by
            copies where the ranks can.

    Raises:
        ValueError: There is no such kind or way of sending, it has no blocks to shard, or the ranks can't copy.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"parallel must be {' or '.join(get_args(Kind))}; got {kind!r}")
    device = next(model.parameters()).device
    if kind == "fsdp":
        mesh = mesh or mesh_of_all(device.type)
        # Before anything is changed.
        sent = sending_of(sending, torch.device(mesh.device_type), mesh.get_group())
        if compiled:
            for block in blocks_of(model):
                block.compile()
        shard(model, dtype=dtype, mesh=mesh, keep_whole=captured)
        windows = use_copies(model, mesh.get_group()) if sent == "copies" else None
        return Parallel(
            kind=kind, model=model, network=model, warmup=0, keeps_whole=captured, sending=sent, windows=windows
        )
    sent = sending_of(sending, device)
    warnings.filterwarnings("ignore", message=_SAME_MEMORY, category=UserWarning)
    # For a graph, its gradients' accumulators have to be made on the stream of the capture.
    with on_capture_stream(device) if captured else nullcontext():
        network: Any = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            # Gradients lie in the buckets that are reduced: nothing is copied back, and nothing held twice.
            gradient_as_bucket_view=True,
            # Those of the models here are constants.
            **_CONSTANT_BUFFERS,
        )
    windows = CopyAllReduce(network).windows if sent == "copies" else None  # The network holds it.
    if compiled:
        network = torch.compile(network)
    return Parallel(kind=kind, model=model, network=network, warmup=GRAPH_WARMUP, sending=sent, windows=windows)


def sending_of(
    sending: Sending, device: torch.device, group: dist.ProcessGroup | None = None
) -> Literal["collectives", "copies"]:
    """How the ranks of a group send, all of them the same way. All must ask.

    Args:
        sending: As of `wrap`. A rank alone has nothing to send, whatever is asked for.
        device: This rank's.
        group: Whose ranks; those of the job if not given.

    Raises:
        ValueError: There is no such way, or the ranks can't copy.
    """
    if sending not in get_args(Sending):
        raise ValueError(f"sending must be {', '.join(get_args(Sending))}; got {sending!r}")
    group = dist.distributed_c10d._get_default_group() if group is None else group
    if sending == "collectives" or group.size() == 1:
        return "collectives"
    reason = can_copy(group, device)
    if reason is None:
        return "copies"
    if sending == "copies":
        raise ValueError(f"ranks can't send by copies: {reason}; take sending collectives")
    logger.info("ranks send by collectives: %s", reason)
    return "collectives"


def mesh_of_all(device: str) -> DeviceMesh:
    """All ranks in a row, on their ``cuda`` or ``cpu`` devices."""
    return init_device_mesh(device, (dist.get_world_size(),))


def shard(
    model: M,
    *,
    dtype: Precision = "fp32",
    mesh: DeviceMesh | None = None,
    keep_whole: bool = False,
    trains: bool = True,
) -> M:
    """FSDP2 by block, in place: parameters become DTensors, each rank holding a share of every one.

    Args:
        model: The same on all ranks, on this one's device or on the host: see `wrap`.
        dtype: See `wrap`.
        mesh: See `wrap`.
        keep_whole: Whether a block's weights stay gathered from its forward to its backward pass: they take memory, and
            are gathered once a step.
        trains: Whether a backward pass follows each forward pass. Only that frees what no block holds, embeddings and
            the head: without one, the next forward pass would compute with what they were before.
    """
    if mesh is None:
        mesh = mesh_of_all(next(model.parameters()).device.type)
    # Inputs stay as they are: times of flow matching lose by bf16, and autocast casts what a layer computes with.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if dtype == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_whole)
    # What is left, embeddings and the head, is gathered once for a forward and backward pass: None is PyTorch's word
    # for a root that stays whole between them.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=None if trains else True)
    return model

"""Whether the ranks of a group can copy from each other's memory, as `dig.training.parallel.copying` does."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist


class Place(NamedTuple):
    """Where a rank computes.

    Attributes:
        host: Its machine's name.
        boot: What tells machines of one name apart.
        gpu: Its GPU's UUID.
        visible: UUIDs of the GPUs that it sees, in their order.
        number: Of its own among them.
    """

    host: str
    boot: str
    gpu: str
    visible: tuple[str, ...]
    number: int


def can_copy(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why the ranks of a group can't copy from each other; None where they can. All must ask, and hear the same.

    Args:
        group: Whose ranks.
        device: This rank's.
    """
    if device.type != "cuda":
        return f"copies go between GPUs, not on a {device.type}"
    if group.size() == 1:
        return "there is one rank alone"
    index = torch.cuda.current_device() if device.index is None else device.index
    places: list[Place] = [_place(index)] * group.size()
    dist.all_gather_object(places, places[0], group=group)
    reasons: list[str | None] = [None] * group.size()
    dist.all_gather_object(reasons, _obstacle(places, group.rank()), group=group)
    return next((reason for reason in reasons if reason is not None), None)


def _place(index: int) -> Place:
    visible = tuple(str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count()))
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = ""
    return Place(host=socket.gethostname(), boot=boot, gpu=visible[index], visible=visible, number=index)


def _obstacle(places: Sequence[Place], rank: int) -> str | None:
    """What keeps a rank from its peers' memory.

    Args:
        places: Of each rank.
        rank: Which one.
    """
    hosts = {(place.host, place.boot) for place in places}
    if len(hosts) > 1:
        names = ", ".join(sorted(host for host, _ in hosts)[:3])
        return f"ranks are on {len(hosts)} hosts ({names}), and copies go within one"
    if len({place.gpu for place in places}) < len(places):
        return "ranks share a GPU"
    if len({place.visible for place in places}) > 1:
        return "ranks see other GPUs, or in another order; let each see all of them alike (CUDA_VISIBLE_DEVICES)"
    mine = places[rank].number
    for peer, place in enumerate(places):
        if peer != rank and not torch.cuda.can_device_access_peer(mine, place.number):
            return f"the GPU of rank {rank} has no access to the memory of rank {peer}'s"
    try:
        import torch.distributed._symmetric_memory as symmetric

        backend = symmetric.get_backend(torch.device("cuda", mine))
    except (ImportError, AttributeError, RuntimeError):
        backend = None
    if backend != "CUDA":
        return f"PyTorch {torch.__version__} has no symmetric memory of CUDA's here (its backend is {backend})"
    return None

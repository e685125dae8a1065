"""Training, sampling and encoding by several processes, a GPU each, on PyTorch's own engine.

`joined` makes the processes that torchrun started one job. `wrap` makes a model that trains in all of them. Nothing
here decides what is exchanged: DistributedDataParallel or FSDP2 (``fully_shard``) does, over NCCL, or by the copies of
`dig.training.parallel.copying`.
"""

from __future__ import annotations

from dig.training.parallel.ranks import Ranks, joined
from dig.training.parallel.wrapping import Kind, Parallel, Sending, mesh_of_all, shard, wrap

__all__ = ["Kind", "Parallel", "Ranks", "Sending", "joined", "mesh_of_all", "shard", "wrap"]

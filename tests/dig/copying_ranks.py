"""A rank that sends by copies, and its windows: files that all ranks map on the CPU, the real ones on GPUs."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dig.training.parallel import Ranks, mesh_of_all
from dig.training.parallel.windows import SymmetricWindow, Window, Windows


class FileWindow:
    """A window of the CPU."""

    uncounted = 0
    _numbers = itertools.count()

    def __init__(self, folder: Path, nbytes: int, group: dist.ProcessGroup) -> None:
        number = next(self._numbers)  # The same on all ranks, as they make the same windows.
        self._paths = [folder / f"window-{number}-{rank}" for rank in range(group.size())]
        self._nbytes, self._group = nbytes, group
        with self._paths[group.rank()].open("wb") as file:
            file.truncate(nbytes)
        dist.barrier(group)

    def of(self, rank: int) -> Tensor:
        return torch.from_file(str(self._paths[rank]), shared=True, size=self._nbytes, dtype=torch.uint8)

    def meet(self) -> None:
        dist.barrier(self._group)


class Job:
    """This rank, its windows, and what it checks."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.ranks, self.device, self.folder = ranks, ranks.device, folder
        self.mesh = mesh_of_all(self.device.type)
        self.group: dist.ProcessGroup = self.mesh.get_group()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def window(self, nbytes: int, device: torch.device) -> Window:
        if self.cuda:
            return SymmetricWindow.new(nbytes, device, self.group)
        return FileWindow(self.folder, nbytes, self.group)

    def windows(self) -> Windows:
        return Windows(self.group, self.window)

    def tensor(self, *values: float) -> Tensor:
        return torch.tensor(values, device=self.device)

    def stagger(self, turn: int) -> None:
        """Let another rank be late at each turn: one that didn't wait for it would read or write too early."""
        if turn % self.ranks.world_size == self.ranks.rank:
            if self.cuda:
                torch.cuda._sleep(20_000_000)
            else:
                time.sleep(0.02)

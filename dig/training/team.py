"""What a trainer asks of the processes that train together; here the answers of a process alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dig.training.config import TrainConfig
from dig.training.data import DataOrder
from dig.training.saving import Checkpoint, read_checkpoint, save_checkpoint
from dig.training.step import TrainingStep, build_step

T = TypeVar("T")


class Team:
    """One process alone. `dig.training.parallel.team.Together` is several.

    Attributes:
        leads: Whether this process writes what is written once: logs, grids, records.
        size: Processes of a step.
        rank: Of this process among them.
        kind: How they share a model; empty for one process.
        sharded: Whether each holds a part of the model's state only.
        keeps: Whether what was trained can be saved when an error ends the run.
        records: Whether the team itself records why an error ended the run: see `began`.
    """

    leads: bool = True
    size: int = 1
    rank: int = 0
    kind: str = ""
    sharded: bool = False
    keeps: bool = True
    records: bool = False

    def begin(self, config: TrainConfig, folder: Path) -> None:
        """See that the processes train the same.

        Raises:
            ValueError: They don't, or the batch can't be shared out among them.
        """

    def build(self, config: TrainConfig, first: Mapping[str, Tensor] | None) -> TrainingStep:
        """The training step: `dig.training.step.build_step`."""
        return build_step(config, first)

    def order(self, config: TrainConfig, length: int) -> DataOrder:
        """Which samples of a step are this process'."""
        return DataOrder(
            length=length, batch_size=config.batch // self.size, seed=config.seed, rank=self.rank, world_size=self.size
        )

    def from_leader(self, ask: Callable[[], T]) -> T:
        """What asking gives, asked by the one process that leads."""
        return ask()

    def stops(self, stop: Callable[[], bool]) -> bool:
        """Whether the run is to stop before its next step: the same in all processes."""
        return stop()

    def saves(self, stop: Callable[[], bool], save: Callable[[], bool]) -> bool:
        """Whether to save out of turn after a step; where processes agree on stopping, it is asked for here too."""
        return save()

    def waits(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """What may end a wait for data: a process that has others can't leave without them."""
        return stop

    def any(self, flag: bool) -> bool:
        """Whether any process says so; all must ask."""
        return flag

    def average(self, sums: Tensor) -> None:
        """Make sums over this process' samples the means over the processes, in place."""

    def doing(self, what: str, step: int | None = None) -> None:
        """Say what begins, to whoever watches."""

    def began(self, folder: Path) -> None:
        """The run is on record in its folder: what ends it from now on belongs there, too."""

    def random(self, device: str) -> dict[str, Tensor]:
        """States of the generators, by their names in a checkpoint."""
        states = {"random.cpu": torch.get_rng_state()}
        if device == "cuda":
            states["random.cuda"] = torch.cuda.get_rng_state()
        return states

    def set_random(self, states: Mapping[str, Tensor]) -> None:
        """Let the generators go on from their states, as `random` gives them."""
        torch.set_rng_state(states["random.cpu"])
        if "random.cuda" in states:
            torch.cuda.set_rng_state(states["random.cuda"])

    def read(self, path: Path, state: Mapping[str, Tensor]) -> Checkpoint:
        """Read a checkpoint: its tensors, or those of them that `load` asks for."""
        return _own_random(read_checkpoint(path), state)

    def load(self, step: TrainingStep, checkpoint: Checkpoint) -> None:
        """Overwrite a step's state with a checkpoint of `read`."""
        step.load(checkpoint.tensors)

    def save(self, folder: Path, step: int, tensors: Mapping[str, Tensor], about: dict[str, Any], keep: int) -> Path:
        """Write a checkpoint, or begin to: `dig.training.saving.save_checkpoint`."""
        return save_checkpoint(folder, step, tensors, about, keep=keep)

    def saved(self) -> None:
        """Return once a checkpoint that is being written counts."""

    def end(self) -> None:
        """The run is over: nothing is under way any more."""


def _own_random(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Checkpoint:
    """A checkpoint of several ranks for one process: their generators are none of its own, and begin anew."""
    for name in ("random.cpu", "random.cuda"):
        if name in checkpoint.tensors and checkpoint.tensors[name].ndim > 1:
            del checkpoint.tensors[name]
            if name in state:
                checkpoint.tensors[name] = state[name]
    return checkpoint

"""Several ranks as the team of one trainer: the steps of one process at the same batch, each part done by one rank."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor, distribute_tensor

from dig.training.config import TrainConfig
from dig.training.logs import append_event
from dig.training.parallel.agreement import check_alike, check_one_folder, facts
from dig.training.parallel.ranks import Ranks, Votes
from dig.training.parallel.shards import ShardWriter, give_name, load_folder, shapes_of
from dig.training.parallel.watching import Lost, Watch
from dig.training.parallel.windows import Windows
from dig.training.parallel.wrapping import Kind, Sending, sending_of
from dig.training.saving import (
    FOLDER,
    SCHEMA,
    SHARDS,
    UNFINISHED,
    Checkpoint,
    CheckpointError,
    checkpoint_files,
    checkpoint_path,
    make_way,
    not_finite,
    read_about,
    read_checkpoint,
    step_of,
    write_record,
)
from dig.training.shares import local
from dig.training.step import TrainingStep, build_step
from dig.training.team import Team

T = TypeVar("T")
logger = logging.getLogger(__name__)

SEEDS = 2**20
"""Apart from each other, the ranks' generators for what a model draws itself; more than there are ranks."""


class Together(Team):
    """All ranks of a job.

    Args:
        ranks: The job.
        kind: How they share the model.
        sending: How they send: see `dig.training.parallel.wrap`.
        watch: Told what this rank does.
    """

    keeps = False
    records = True

    def __init__(self, ranks: Ranks, kind: Kind, watch: Watch, sending: Sending = "collectives") -> None:
        self.leads = ranks.leads
        self.size = ranks.world_size
        self.rank = ranks.rank
        self.kind: Kind = kind
        self.sharded = kind == "fsdp"
        self._sending: Sending = sending
        self._windows: Windows | None = None
        self._folder = Path()
        self._ranks = ranks
        self._watch = watch
        self._votes = Votes(ranks, 2)
        self._stop = False
        self._saving: tuple[Any, int] | None = None

    def begin(self, config: TrainConfig, folder: Path) -> None:
        """See that all ranks would train the same, and that a step's batch divides among them."""
        self.doing("comparing code, options and data")
        check_alike(self._ranks, facts(config, parallel=self.kind, sending=self._sending))
        parts = self.size * config.accumulate
        if config.batch % parts:
            shares = f"{self.size} ranks" + (f" of {config.accumulate} parts each" if config.accumulate > 1 else "")
            raise ValueError(
                f"a batch of {config.batch} does not divide into {shares}: --batch is of all ranks together"
            )
        if self.sharded and config.lora:
            raise ValueError("adapters of --lora are small and are not sharded: use --parallel ddp")
        self._sending = sending_of(self._sending, self._ranks.device)
        self._folder = folder / FOLDER

    def build(self, config: TrainConfig, first: Mapping[str, Tensor] | None) -> TrainingStep:
        """The step, whose model is wrapped; each rank's own draws are its own."""
        self.doing("comparing folders")
        check_one_folder(self._ranks, self._folder)
        self.doing("building the model")
        step = build_step(config, first, self.kind, self._sending)
        self._windows = step.windows
        torch.manual_seed((config.seed * SEEDS + self.rank + 1) % 2**63)
        return step

    def from_leader(self, ask: Callable[[], T]) -> T:
        """What asking gives on rank 0, on all ranks; where it raises there, the watch ends the others."""
        found: T = self._ranks.from_leader(ask() if self.leads else None)
        return found

    def stops(self, stop: Callable[[], bool]) -> bool:
        """What the last vote but one came to."""
        return self._stop

    def saves(self, stop: Callable[[], bool], save: Callable[[], bool]) -> bool:
        """Vote on both; whether any rank was asked to save by the step before."""
        self._stop, saves = self._votes.cast(stop(), save())
        return saves

    def waits(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """Nothing: the others would wait for the step."""
        return lambda: False

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return self._ranks.any(flag)[0]

    def average(self, sums: Tensor) -> None:
        """Sums over each rank's samples to their means over the ranks."""
        self._ranks.mean_(sums)

    def doing(self, what: str, step: int | None = None) -> None:
        """Tell the watch. From the first step on it can say what to do."""
        if step is not None:
            self._watch.remedy = self._remedy
        self._watch.doing(what, step)

    def began(self, folder: Path) -> None:
        """The watch records what ends the job: a rank's own error may be no more than that its peers are gone."""

        def record(lost: Lost) -> None:
            append_event(folder, "failed", rank=lost.rank, step=lost.step, reason=lost.message)

        self._watch.record = record

    def _remedy(self) -> str:
        """What to do about a job that failed while it trained; another rank may still be saving."""
        steps = [step_of(path) for path in checkpoint_files(self._folder)]
        if not steps:
            return "the same command goes on from the newest checkpoint, of which none is whole yet, or begins anew"
        return f"the same command goes on from the newest checkpoint, of step {max(steps)} or later"

    def random(self, device: str) -> dict[str, Tensor]:
        """States of all ranks' generators, (ranks, bytes)."""
        mine = [torch.get_rng_state()]
        if device == "cuda":
            mine.append(torch.cuda.get_rng_state())
        states = self._ranks.gather([state.numpy() for state in mine])
        names = ("random.cpu", "random.cuda")
        return {
            name: torch.stack([torch.from_numpy(found[i]) for found in states])
            for i, name in enumerate(names[: len(mine)])
        }

    def set_random(self, states: Mapping[str, Tensor]) -> None:
        """Each rank its own."""
        super().set_random({name: found[self.rank].clone() for name, found in states.items()})

    def read(self, path: Path, state: Mapping[str, Tensor]) -> Checkpoint:
        """What a checkpoint says; of a file its tensors, of a folder those that it has, by name."""
        about = read_about(path)
        if about is None:
            raise CheckpointError(f"{path} is no checkpoint of python -m dig train")
        if not path.is_dir():
            tensors = read_checkpoint(path).tensors
        else:
            try:
                shapes = shapes_of(path)
                wanted = {name: torch.empty(shapes[name][1], dtype=torch.uint8) for name in _RANDOM if name in shapes}
                load_folder(path, wanted)
            except ValueError as error:
                raise CheckpointError(f"cannot read {path}: {error}") from None
            tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in shapes.items()}
            tensors |= wanted
        for name in _RANDOM:
            if name in state and name in tensors and tensors[name].shape != state[name].shape:
                # Of another number of ranks: what a model draws itself goes on otherwise.
                tensors[name] = state[name]
        return Checkpoint(path=path, about=about, tensors=tensors)

    def load(self, step: TrainingStep, checkpoint: Checkpoint) -> None:
        """Overwrite the state, each rank its share."""
        ours = step.tensors()
        if checkpoint.path.is_dir():
            try:
                load_folder(checkpoint.path, ours)
            except ValueError as error:
                raise CheckpointError(f"cannot read {checkpoint.path}: {error}") from None
            return
        with torch.no_grad():
            for name, tensor in ours.items():
                whole = checkpoint.tensors[name]
                if isinstance(tensor, DTensor):
                    # Every rank has read all of it: nothing has to be sent.
                    whole = distribute_tensor(
                        whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
                    ).to_local()
                local(tensor).copy_(whole)

    def save(self, folder: Path, step: int, tensors: Mapping[str, Tensor], about: dict[str, Any], keep: int) -> Path:
        """Begin a checkpoint: copied to the host's memory when this returns, then written while training goes on.

        Raises:
            CheckpointError: A tensor is not finite on some rank.
            WindowsDifferError: Ranks that copy have read something else than they asked for.
        """
        self.saved()
        if self._windows is not None:
            self._windows.check(self._ranks.gather)
        wrong = not_finite({name: local(tensor) for name, tensor in tensors.items()})
        if self.any(wrong is not None):
            name = next(found for found in self._ranks.gather(wrong) if found is not None)
            raise CheckpointError(f"{name} is not finite after step {step}: no checkpoint is made of it")
        path = checkpoint_path(folder, step).with_suffix(SHARDS)
        making = folder / f"{UNFINISHED}{path.name}"

        def publish(checksums: dict[str, str]) -> None:
            make_way(path)
            give_name(making, path)
            write_record(path, {"files": checksums}, keep)

        content = {"schema": SCHEMA, "step": step, "ranks": self.size, "parallel": self.kind, **about}
        writer = ShardWriter(making, content, publish)
        held = {name: tensor.detach() for name, tensor in tensors.items()}
        self._saving = async_save(held, storage_writer=writer, process_group=self._ranks.saving), step
        return path

    def saved(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            OSError: A rank could not write.
        """
        if self._saving is None:
            return
        (future, step), self._saving = self._saving, None
        try:
            future.result()
        except CheckpointException as error:
            rank, (reason, _) = next(iter(error.failures.items()))
            if isinstance(reason, OSError) and reason.errno == errno.ENOSPC:
                raise CheckpointError(
                    f"rank {rank} could not write the checkpoint of step {step}: the disk of {self._folder} is full; "
                    "free some of it"
                ) from None
            if isinstance(reason, OSError) and reason.errno is not None:
                raise reason from None
            raise CheckpointError(f"rank {rank} could not write the checkpoint of step {step}: {reason}") from None

    def end(self) -> None:
        """Nothing is under way any more."""
        self._votes.end()


_RANDOM = ("random.cpu", "random.cuda")

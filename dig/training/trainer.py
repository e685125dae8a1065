"""The trainer: one loop for every model, loss, data set and execution; killed at any moment, it goes on exactly."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from dig.environment import describe_environment
from dig.layers import Backbone
from dig.locks import lock_file
from dig.messages import describe
from dig.sampling.images import write_png
from dig.training import lora
from dig.training.average import warn_of_first_weights
from dig.training.config import TrainConfig
from dig.training.data import DataSet
from dig.training.data.files import write_atomically
from dig.training.data.loader import check_workers
from dig.training.grids import Grids
from dig.training.inputs import InputStream
from dig.training.loggers import check_loggers
from dig.training.logs import NoLog, RunLog
from dig.training.lora import write_adapter
from dig.training.meter import Meter, Status
from dig.training.needs import check_training
from dig.training.resuming import CONFIG_NAME, check_folder, check_room, check_same_run, check_state
from dig.training.saving import (
    FOLDER,
    CheckpointError,
    checkpoint_files,
    newest_checkpoint,
    remove_unfinished,
    set_aside,
)
from dig.training.step import use_deterministic_algorithms
from dig.training.team import Team
from dig.training.watch import NotFiniteLossError, StepWatch, TrainingError

__all__ = ["CONFIG_NAME", "NotFiniteLossError", "Status", "Trainer", "TrainingError"]

logger = logging.getLogger(__name__)


class Trainer:
    """A training run in a folder, begun or gone on with.

    Args:
        config: The run. With checkpoints in the folder, it must be the one that they were made by, but for the fields
            that no weight depends on.
        dataset: What it is trained on, `DataSpec.of` which is ``config.data``.
        folder: Of the run; made if it is not there.
        decode: Latents (B, C, h, w), scaled, to images (B, 3, H, W), for grids of samples. None in pixel space; with
            latents, there are then no grids.
        workers: Processes that read the data.
        first: State dict of the first weights, where they are those of a file (``config.init``); not read where a
            checkpoint follows.
        elsewhere: Whether a run that began on another device, backend or execution may go on here, with other last
            bits.
        team: The processes that train together; each has a trainer of the same run and folder.

    Attributes:
        step: Steps that lie behind.
        seconds: Time in training steps so far, over all of the run's processes, without saving and sampling, and
            without each process's first step, which compiles kernels and captures the graph.

    Raises:
        ValueError: The folder holds another run, another process is at it, or the model can't be built or can't run
            like this.
        TooLargeError: It needs more memory, or its checkpoints more room on the disk, than there is.
        CheckpointError: All checkpoints are damaged, or the newest one is another run's.
        OSError: The folder can't be written to.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: DataSet,
        folder: Path,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        workers: int | None = None,
        first: Mapping[str, Tensor] | None = None,
        elsewhere: bool = False,
        team: Team | None = None,
    ) -> None:
        self._elsewhere = elsewhere
        self._team = team = Team() if team is None else team
        self.config = config
        self.folder = folder
        self._dataset = dataset
        self._grids = Grids(config, folder, decode)
        self._workers = workers
        check_workers(workers)
        check_loggers(config.log)
        team.begin(config, folder)
        check_training(config, ranks=team.size, sharded=team.sharded)
        folder.mkdir(parents=True, exist_ok=True)
        message = f"another process is training into {folder}; wait for it, or choose another folder"
        with ExitStack() as stack:
            if team.leads:
                stack.enter_context(lock_file(folder / ".lock", message))
            self._prepare(first)
            self._lock = stack.pop_all()

    def _prepare(self, first: Mapping[str, Tensor] | None) -> None:
        """Build the model, load the newest checkpoint, open the logs."""
        config, folder, team = self.config, self.folder, self._team
        environment = describe_environment()
        check_folder(config, folder, environment, elsewhere=self._elsewhere)
        # What can't be made should be known now, and not when there is something to write.
        (folder / FOLDER).mkdir(exist_ok=True)
        self._grids.folder.mkdir(exist_ok=True)
        if config.deterministic:
            use_deterministic_algorithms()
        if config.init and first is None and not checkpoint_files(folder / FOLDER):
            raise ValueError(
                f"{folder} has no checkpoint yet, and begins with the weights of a file: name it by --init"
            )
        self._step = team.build(config, first)
        self._watch = StepWatch((*self._step.loss.terms, "grad_norm"), config.device)
        self._whole = True  # whether all of the state is of the same step
        self.step = 0
        self._meter = Meter(config, team.size)
        self._resume()
        if self.step and team.leads:
            self._write_adapter()
        state = self._state()
        self.log: RunLog = NoLog()
        self.status = Status(step=self.step)
        if not team.leads:
            team.began(folder)
            return
        remove_unfinished(folder / FOLDER)
        check_room(config, folder, self.step, state)
        warn_of_first_weights(config)
        content = {"config": config.to_json(), "environment": environment}
        write_atomically(folder / CONFIG_NAME, (json.dumps(content, indent=1) + "\n").encode())
        self.log = RunLog(folder, self.step, config.log, config.to_json())
        about = {"ranks": team.size, "parallel": team.kind, "sending": self._step.sending} if team.kind else {}
        self.log.event("resumed" if self.step else "started", step=self.step, **about, environment=environment)
        team.began(folder)

    @property
    def model(self) -> Backbone:
        """The model in training."""
        return self._step.model

    @property
    def seconds(self) -> float:
        """Time in training steps so far: see the class."""
        return self._meter.seconds

    def _resume(self) -> None:
        """Load the newest checkpoint that is whole, if there is one."""
        self._team.doing("loading the checkpoint")
        path = self._team.from_leader(lambda: newest_checkpoint(self.folder / FOLDER))
        if path is None:
            return
        state = self._state()
        checkpoint = self._team.read(path, state)
        check_same_run(self.config, path, checkpoint.about)
        tensors, about = checkpoint.tensors, checkpoint.about
        if about["config"]["device"] != self.config.device:
            # Of another device, on which a model's own draws went on elsewhere.
            tensors.pop("random.cuda", None)
            tensors |= {name: tensor for name, tensor in state.items() if name == "random.cuda"}
        check_state(checkpoint, state)
        self._team.set_random({name: tensors.pop(name) for name in list(tensors) if name.startswith("random.")})
        self._team.load(self._step, checkpoint)
        self.step = about["step"]
        self._meter.load(about)
        if not self._team.leads:
            return
        # Left under their names, they would count among those to keep, and push out the new ones.
        for moved in set_aside(self.folder / FOLDER, self.step):
            logger.warning("a damaged checkpoint of a later step is now called %s", moved)

    def _state(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, by name."""
        return self._step.tensors() | self._team.random(self.config.device)

    def save(self, folder: Path | None = None) -> Path:
        """Write a checkpoint of this moment, into the run's folder of them or another one.

        Of several processes all must, and it may still be on its way to the disk when this returns.

        Raises:
            TrainingError: The loss of a step, or a weight, is not finite.
            OSError: The disk is full, say.
        """
        self._watch.drain()
        if folder is None:
            self.log.sync()
        self._team.doing("saving", self.step)
        self._team.average(self._step.sums)
        # The data's position is the step: which samples it takes is a function of that and the seed.
        about = {
            **self._meter.state(),
            "samples_seen": self.step * self.config.batch,
            "config": self.config.to_json(),
        }
        try:
            path = self._team.save(
                folder or self.folder / FOLDER, self.step, self._state(), about, keep=self.config.keep
            )
        except CheckpointError as error:
            raise NotFiniteLossError(str(error)) from None
        if folder is None and self._team.leads:
            self._write_adapter()
        return path

    def _write_adapter(self) -> None:
        """Write the averaged adapter of this moment, if the run trains one."""
        if self._step.adapted is not None:
            averages = self._step.ema.state_dict()
            write_adapter(self.folder / lora.FOLDER, self._step.adapted, averages, self.config, self.step)

    def run(
        self,
        *,
        stop: Callable[[], bool] = lambda: False,
        save: Callable[[], bool] = lambda: False,
        report: Callable[[Status], object] | None = None,
    ) -> int:
        """Train to the last step, or until ``stop`` says so, and save.

        Whatever else ends it, a full disk or data that can't be read, what was trained is saved before: in the run's
        folder or, where that can't be written to, in one for temporary files, which the error then names.

        Args:
            stop: Asked after every step, and while data or a grid keep it waiting.
            save: Asked after every step: whether to save now, out of turn.
            report: Called after every step.

        Returns:
            Steps that lie behind.

        Raises:
            TrainingError: The loss is no longer finite, or something else ended the run before its last step.
        """
        self._saved = self.step
        outcome: dict[str, Any] = {"what": "stopped"}
        stream: InputStream | None = None
        try:
            stream = InputStream(
                self.config,
                self._dataset,
                self._step.loss,
                null_label=self.model.null_label,
                first_step=self.step,
                workers=self._workers,
                order=self._team.order(self.config, len(self._dataset)),
            )
            self._catch_up(stream, stop)
            self._train(stream, stop, save, report)
            if self.step != self._saved:
                self.save()
            self._team.saved()
            self._team.end()
            outcome = {"what": "finished" if self.step >= self.config.steps else "stopped"}
        except Exception as error:
            outcome = {"what": "failed", "reason": describe(error)}
            if isinstance(error, NotFiniteLossError):
                raise
            kept = self._keep()
            if kept is None:
                raise
            raise TrainingError(f"{describe(error)}; {kept}") from error
        finally:
            if stream is not None:
                stream.close()
            if outcome["what"] != "failed" or not self._team.records:
                with suppress(OSError):
                    self.log.event(**outcome, step=self.step)
            with suppress(OSError):
                self.log.close()
            self._lock.close()
        return self.step

    def _train(
        self,
        stream: InputStream,
        stop: Callable[[], bool],
        save: Callable[[], bool],
        report: Callable[[Status], object] | None,
    ) -> None:
        config, team = self.config, self._team
        self._meter.begin()
        while self.step < config.steps and not team.stops(stop):
            team.doing("waiting for data", self.step + 1)
            # The host may run ahead of the device, but not by more inputs than are worth their memory.
            self._watch.wait()
            inputs = stream.take(team.waits(stop))
            if inputs is None:
                break
            team.doing("training", self.step + 1)
            self._whole = False
            self._step.run(inputs, config.learning_rate_at(self.step))
            self.step += 1
            self._meter.pending += 1
            self._whole = True
            self._watch.passed(self.step, self._step.sums, self._meter.pending)
            asked = team.saves(stop, save)
            logs, saves = self.step % config.log_every == 0, asked or self.step % config.save_every == 0
            grids = self._grids.due(self.step)
            self._meter.stepped()
            if logs or saves or grids:
                self._meter.account()
            if logs:
                self._log(len(stream.loader.unreadable))
            if grids:
                self._draw_grid(stop)
            # Last: a kill before it does the step again, with its line and its grid.
            if saves:
                self.save()
                self._saved = self.step
                if asked:
                    team.saved()
                    self.log.event("saved", step=self.step)
            if logs or saves or grids:
                self._meter.skip()
            self.status = Status(step=self.step, loss=self._watch.loss, images_per_second=self.status.images_per_second)
            if report is not None:
                report(self.status)
        self._meter.account()

    def _catch_up(self, stream: InputStream, stop: Callable[[], bool]) -> None:
        """Do what the process before could not after its last step: a line that couldn't be written, a grid."""
        if self._meter.pending and self.step % self.config.log_every == 0:
            self._log(len(stream.loader.unreadable))
        if self.step and self._grids.due(self.step) and not self._team.from_leader(self._grids.path(self.step).exists):
            self._draw_grid(stop)

    def _keep(self) -> str | None:
        """Save what has been trained when an error ends the run; where it is, for people, or None if there is nothing.

        A state in the middle of a step is none: the steps since the last checkpoint are done again.
        """
        if not self._whole or self.step == self._saved or not self._team.keeps:
            return None
        try:
            self.save()
        except NotFiniteLossError:
            return None
        except Exception:  # Whatever it is, a full disk most often: another place may take it.
            try:
                folder = Path(tempfile.mkdtemp(prefix="dig-kept-"))
                self.save(folder)
            except Exception as error:
                logger.warning("and what was trained since the last checkpoint can't be kept: %s", describe(error))
                return None
            return (
                f"what was trained, {self.step} steps, is kept in {folder}: move its files into {self.folder / FOLDER} "
                "and go on with the same command"
            )
        return f"what was trained, {self.step} steps, is saved: go on with the same command"

    def _log(self, unreadable: int) -> None:
        """Write the line of the steps since the last one."""
        sums, steps = self._step.sums, self._meter.pending
        self._watch.drain()
        self._team.average(sums)
        means = [value / steps for value in sums.tolist()]
        names = (*self._step.loss.terms, "grad_norm")
        figures = self._meter.figures()
        self.log.metrics(
            self.step,
            {
                **dict(zip(names, means, strict=True)),
                "learning_rate": self.config.learning_rate_at(self.step - 1),
                "epoch": self.step * self.config.batch / len(self._dataset),
                **figures,
                "unreadable_images": unreadable,
            },
        )
        # Only now: a line that the disk has no room for is written by the process that goes on.
        sums.zero_()
        rate = figures["images_per_second"]
        self._meter.begin_line()
        self.status = Status(step=self.step, loss=means[0], images_per_second=math.nan if rate is None else rate)

    def _draw_grid(self, stop: Callable[[], bool]) -> None:
        """Sample a grid with the averaged weights: a column for each of the first ten classes.

        If the run is to stop meanwhile, the grid is left to the process that goes on with it.
        """
        self._team.doing("drawing a grid", self.step)
        decoded = self._grids.draw(self._step.ema, stop=lambda: self._team.any(stop()))
        if decoded is not None and self._team.leads:
            write_png(self._grids.path(self.step), decoded)
            self.log.image(self.step, decoded)

"""The trainer: one loop for every model, loss, data set and execution; killed at any moment, it goes on exactly."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dig.ceiling import gpu_ceiling
from dig.diffusion import build_loss, sample
from dig.environment import describe_environment
from dig.flops import UncountedError, model_macs
from dig.layers import Backbone
from dig.sampling.images import make_grid, to_pixels, write_png
from dig.training.config import TrainConfig
from dig.training.data import DataSet
from dig.training.data.files import write_atomically
from dig.training.inputs import AHEAD, InputStream
from dig.training.logs import RunLog
from dig.training.saving import FOLDER, newest_checkpoint, read_checkpoint, remove_unfinished, save_checkpoint
from dig.training.step import TrainingStep, use_deterministic_algorithms

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
GRIDS_NAME = "samples"
GRID_COLUMNS, GRID_ROWS = 10, 4
GRID_SEED = 0
"""Of the grids' noise, the same for all of a run, so that one watches the same samples improve."""
TRAINING_FLOPS_PER_MAC = 6
"""Two FLOPs a multiply-add, and a backward pass of twice the forward's."""
GIB = 2**30


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a run has come, as of its last line of the log.

    Attributes:
        step: Steps that lie behind.
        loss: Mean loss of the steps of the last line; NaN before the first.
        images_per_second: Likewise.
    """

    step: int
    loss: float = math.nan
    images_per_second: float = math.nan


def _lock(folder: Path) -> IO[str]:
    """Keep other processes out of a run's folder until the file is closed, or this process gone, however it ends."""
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"another process is training into {folder}; wait for it, or choose another folder") from None
    return file


def _macs(config: TrainConfig) -> int | None:
    """Multiply-adds of the model for one image; None, with a warning, where they can't be counted."""
    try:
        return model_macs(config.model)
    except UncountedError as error:
        logger.warning("the log has no share of the ceiling: %s", error)
        return None


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

    Attributes:
        step: Steps that lie behind.
        seconds: Time in training steps so far, over all of the run's processes, without saving and sampling, and
            without each process's first step, which compiles kernels and captures the graph.

    Raises:
        ValueError: The folder holds another run, another process is at it, or the model can't be built or can't run
            like this.
        CheckpointError: All checkpoints are damaged.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: DataSet,
        folder: Path,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        workers: int | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self._dataset = dataset
        self._decode = decode
        self._workers = workers
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        try:
            self._prepare()
        except BaseException:
            self._lock.close()
            raise

    def _prepare(self) -> None:
        """Build the model, load the newest checkpoint, open the logs."""
        config, folder = self.config, self.folder
        environment = describe_environment()
        self._check_folder(environment)
        if config.deterministic:
            use_deterministic_algorithms()
        torch.manual_seed(config.seed)
        device = torch.device(config.device)
        # Made on the CPU: its generator gives the same weights on every device.
        model = config.model.build().to(device)
        self._null_label = model.null_label
        self._macs = _macs(config)
        self._step = TrainingStep(config, model, build_loss(config.loss, device=device))
        self.step = 0
        self.seconds = 0.0
        self._pending = 0  # steps in the sums
        self._pending_timed = 0  # those of them whose time was taken
        self._pending_seconds = 0.0
        self._ceiling = None
        if config.device == "cuda":
            # Before the random states are restored: its operands are random too.
            self._ceiling = gpu_ceiling(config.dtype)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._resume()
        content = {"config": config.to_json(), "environment": environment}
        write_atomically(folder / CONFIG_NAME, (json.dumps(content, indent=1) + "\n").encode())
        remove_unfinished(folder / FOLDER)
        self.log = RunLog(folder, self.step)
        self.log.event("resumed" if self.step else "started", step=self.step, environment=environment)
        self.status = Status(step=self.step)

    @property
    def model(self) -> Backbone:
        """The model in training."""
        return self._step.model

    def _check_folder(self, environment: dict[str, Any]) -> None:
        """Raise ValueError if the folder is another run's; warn if it was begun with other versions."""
        path = self.folder / CONFIG_NAME
        if not path.is_file():
            if any(self.folder.glob(f"{FOLDER}/step-*")):
                raise ValueError(f"{self.folder} holds checkpoints but no {CONFIG_NAME}; choose another folder")
            return
        try:
            content = json.loads(path.read_bytes())
            theirs = TrainConfig.from_json(content["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); restore it, or choose another folder") from None
        if differences := self.config.differences(theirs):
            raise ValueError(
                f"{self.folder} holds another run ({'; '.join(differences[:5])}: asked for, there); repeat its options "
                "to go on with it, or choose another folder"
            )
        before = content.get("environment", {})
        changed = [name for name in ("torch", "triton", "gpu_name") if before.get(name) != environment.get(name)]
        if changed:
            logger.warning(
                "%s was begun with another %s; results may differ in their last bits from here on",
                self.folder,
                " and ".join(f"{name} ({before.get(name)}, now {environment.get(name)})" for name in changed),
            )

    def _resume(self) -> None:
        """Load the newest checkpoint that is whole, if there is one."""
        path = newest_checkpoint(self.folder / FOLDER)
        if path is None:
            return
        checkpoint = read_checkpoint(path)
        tensors = checkpoint.tensors
        torch.set_rng_state(tensors.pop("random.cpu"))
        if "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors.pop("random.cuda"))
        self._step.load(tensors)
        self.step = checkpoint.about["step"]
        self.seconds = checkpoint.about["seconds"]
        self._pending = checkpoint.about["pending"]
        self._pending_timed = checkpoint.about["pending_timed"]
        self._pending_seconds = checkpoint.about["pending_seconds"]

    def save(self) -> Path:
        """Write a checkpoint of this moment.

        Raises:
            TrainingError: A loss since the last line of the log was not finite.
        """
        self._check_finite()
        self.log.sync()
        random = {"random.cpu": torch.get_rng_state()}
        if self.config.device == "cuda":
            random["random.cuda"] = torch.cuda.get_rng_state()
        # The data's position is the step: which samples it takes is a function of that and the seed.
        about = {
            "seconds": self.seconds,
            "pending": self._pending,
            "pending_timed": self._pending_timed,
            "pending_seconds": self._pending_seconds,
            "samples_seen": self.step * self.config.batch,
            "config": self.config.to_json(),
        }
        return save_checkpoint(
            self.folder / FOLDER, self.step, self._step.tensors() | random, about, keep=self.config.keep
        )

    def run(self, *, stop: Callable[[], bool] = lambda: False, report: Callable[[Status], object] | None = None) -> int:
        """Train to the last step, or until ``stop`` says so, and save.

        Args:
            stop: Asked after every step.
            report: Called after every step.

        Returns:
            Steps that lie behind.

        Raises:
            TrainingError: The loss is no longer finite.
            DataError: The data can't be read any more.
        """
        config = self.config
        stream = InputStream(
            config,
            self._dataset,
            self._step.loss,
            null_label=self._null_label,
            first_step=self.step,
            workers=self._workers,
        )
        saved = self.step
        in_flight: deque[torch.cuda.Event] = deque()
        try:
            clock: float | None = None
            while self.step < config.steps and not stop():
                # The host may run ahead of the device, but not by more inputs than are worth their memory.
                if len(in_flight) > AHEAD:
                    in_flight.popleft().synchronize()
                self._step.run(next(stream), config.learning_rate_at(self.step))
                if config.device == "cuda":
                    event = torch.cuda.Event()
                    event.record()
                    in_flight.append(event)
                self.step += 1
                self._pending += 1
                logs, saves = self.step % config.log_every == 0, self.step % config.save_every == 0
                grids = config.grid_every > 0 and self.step % config.grid_every == 0
                if clock is None:
                    clock = self._now()
                else:
                    self._pending_timed += 1
                if logs or saves or grids:
                    self._account(clock)
                if logs:
                    self._log(len(stream.loader.unreadable))
                if grids:
                    self._draw_grid()
                # Last: a kill before it does the step again, with its line and its grid.
                if saves:
                    self.save()
                    saved = self.step
                if logs or saves or grids:
                    clock = time.perf_counter()
                self.status = Status(
                    step=self.step, loss=self.status.loss, images_per_second=self.status.images_per_second
                )
                if report is not None:
                    report(self.status)
            if clock is not None:
                self._account(clock)
            if self.step != saved:
                self.save()
        finally:
            stream.close()
            with suppress(OSError):
                self.log.event("finished" if self.step >= config.steps else "stopped", step=self.step)
            self.log.close()
            self._lock.close()
        return self.step

    def _now(self) -> float:
        """The time when the device has done what it was given, in seconds."""
        if self.config.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _account(self, clock: float) -> None:
        """Count the time since ``clock`` as training."""
        passed = self._now() - clock
        self.seconds += passed
        self._pending_seconds += passed

    def _check_finite(self) -> None:
        names = (*self._step.loss.terms, "grad_norm")
        finite = map(math.isfinite, self._step.sums.tolist())
        if wrong := [name for name, fine in zip(names, finite, strict=True) if not fine]:
            raise TrainingError(
                f"{', '.join(wrong)}: not finite in steps {self.step - self._pending + 1} to {self.step}; the "
                "checkpoints hold an earlier state. Try a lower learning rate, warm-up or clipping, in another folder"
            )

    def _log(self, unreadable: int) -> None:
        """Write the line of the steps since the last one."""
        sums, steps = self._step.sums, self._pending
        self._check_finite()
        means = [value / steps for value in sums.tolist()]
        names = (*self._step.loss.terms, "grad_norm")
        sums.zero_()
        rate = self._pending_timed * self.config.batch / self._pending_seconds if self._pending_timed else None
        share = None
        if rate and self._ceiling and self._macs:
            share = TRAINING_FLOPS_PER_MAC * self._macs * rate / self._ceiling
        memory = torch.cuda.max_memory_allocated() / GIB if self.config.device == "cuda" else None
        self.log.metrics(
            self.step,
            {
                **dict(zip(names, means, strict=True)),
                "learning_rate": self.config.learning_rate_at(self.step - 1),
                "epoch": self.step * self.config.batch / len(self._dataset),
                "images_per_second": rate,
                "ceiling_share": share,
                "memory_gib": memory,
                "seconds": self.seconds,
                "unreadable_images": unreadable,
            },
        )
        self._pending, self._pending_timed, self._pending_seconds = 0, 0, 0.0
        self.status = Status(step=self.step, loss=means[0], images_per_second=math.nan if rate is None else rate)

    def _draw_grid(self) -> None:
        """Sample a grid with the averaged weights: a column for each of the first ten classes."""
        config = self.config
        if config.data.latent_scale is not None and self._decode is None:
            return
        columns = min(GRID_COLUMNS, config.model.num_classes)
        y = torch.arange(columns * GRID_ROWS, device=config.device) % columns
        x = sample(
            self._step.ema,
            y,
            sampler="euler" if config.loss == "flow-matching" else "ddim",
            steps=config.grid_steps,
            cfg_scale=config.grid_cfg,
            cfg_channels="all",
            seed=GRID_SEED,
            dtype=torch.bfloat16 if config.dtype == "bf16" else None,
        )
        images = self._decode(x) if self._decode is not None else x
        grid = make_grid(to_pixels(images), columns)
        folder = self.folder / GRIDS_NAME
        folder.mkdir(exist_ok=True)
        write_png(folder / f"step-{self.step:08d}.png", grid)
        self.log.image(self.step, grid)

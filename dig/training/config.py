"""What a training run is: everything that its weights depend on, and what may change when it goes on.

Shapes: C channels, H rows, W columns of a sample.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from dig.diffusion import LossName, build_solver
from dig.family import BACKEND, closest
from dig.fields import INTEGERS, expected, fits
from dig.spec import ModelSpec
from dig.training.data import DataSet, LatentShards
from dig.training.identity import data_sha256

Execution = Literal["eager", "compile", "graph"]
LearningRateSchedule = Literal["constant", "cosine"]
Precision = Literal["bf16", "fp32"]
Device = Literal["cuda", "cpu"]
Logger = Literal["tensorboard", "jsonl", "wandb"]
BATCH = {"cuda": 256, "cpu": 8}
"""Images a step by default."""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What of a data set a run depends on, wherever its files lie.

    Attributes:
        samples: How many.
        shape: (C, H, W).
        class_names: Name of each label.
        mirror: Whether samples are mirrored half of the time.
        latent_scale: What latents were multiplied with; None for pixels.
        sha256: Of the content (`dig.training.identity`); None where a run of an earlier version didn't record it.
        vae_sha256: Of the weights of the VAE that made the latents, likewise; None for pixels.
    """

    samples: int
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mirror: bool
    latent_scale: float | None = None
    sha256: str | None = None
    vae_sha256: str | None = None

    def __post_init__(self) -> None:
        """Take lists as JSON gives them."""
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "class_names", tuple(self.class_names))

    @classmethod
    def of(cls, dataset: DataSet) -> DataSpec:
        """Describe an open data set, which is read for its checksum.

        Raises:
            DataError: It can't be read.
        """
        latents = dataset.encoding if isinstance(dataset, LatentShards) else None
        return cls(
            samples=len(dataset),
            shape=dataset.sample_shape,
            class_names=dataset.class_names,
            mirror=dataset.mirror,
            latent_scale=latents.scale if latents is not None else None,
            sha256=data_sha256(dataset),
            vae_sha256=latents.vae_sha256 if latents is not None else None,
        )


def _free(default: Any) -> Any:
    """A field that may differ when a run goes on: no weight depends on it."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: What is trained.
        data: What it is trained on.
        device: Kind of device; another one's arithmetic has other last bits.
        steps: Optimizer steps in all.
        batch: Images a step.
        accumulate: How many equal parts a step's batch goes through the model in.
        seed: Of the weights, the order of the data, mirroring, noise, timesteps and dropped labels.
        loss: ``hybrid`` (DiT's and DiG's) or ``flow-matching``.
        label_dropout: Share of labels replaced by the null label.
        learning_rate: At its highest.
        schedule: ``constant``, or ``cosine`` down to zero at the last step.
        warmup: Steps over which the learning rate rises linearly from zero.
        clip: Largest norm of the gradient; 0 for no clipping.
        weight_decay: AdamW's.
        ema: Decay of the moving average of the weights, a step, at its highest.
        ema_warmup: Whether that decay rises from the first step on (`dig.training.average`). Runs of earlier versions,
            which don't record it, began without, and go on so.
        dtype: ``bf16`` runs the model in autocast, over fp32 weights.
        execution: ``eager``; ``compile``, the model through torch.compile; ``graph``, the whole step as one CUDA graph.
        execution_reason: Why that one, as `choose_execution` says.
        checkpoint_blocks: Whether each block's activations are computed again in the backward pass.
        deterministic: Whether PyTorch is told to use deterministic algorithms, so that a resumed run on a GPU repeats
            bit for bit.
        init: SHA-256 of the file that the first weights are of; empty for weights that are drawn.
        freeze: Patterns of names of parameters that are not trained.
        lora: Rank of the adapters that are trained in place of the weights; 0 for none.
        lora_targets: Patterns of names of the linear layers that get one.
        lora_whole: Names of modules that are trained beside them, as a label table with new rows.
        log_every: Steps to a line of the log.
        save_every: Steps to a checkpoint.
        keep: Checkpoints that are kept.
        grid_every: Steps to a grid of samples; 0 for none.
        grid_steps: Sampling steps of a grid.
        grid_cfg: Guidance of a grid.
        log: Where the log goes: some of `Logger`.
    """

    model: ModelSpec
    data: DataSpec
    device: Device
    steps: int
    batch: int
    accumulate: int = 1
    seed: int = 0
    loss: LossName = "hybrid"
    label_dropout: float = 0.1
    learning_rate: float = 1e-4
    schedule: LearningRateSchedule = "constant"
    warmup: int = 0
    clip: float = 0.0
    weight_decay: float = 0.0
    ema: float = 0.9999
    ema_warmup: bool = True
    dtype: Precision = "bf16"
    execution: Execution = "eager"
    checkpoint_blocks: bool = False
    deterministic: bool = True
    init: str = ""
    freeze: tuple[str, ...] = ()
    lora: int = 0
    lora_targets: tuple[str, ...] = ()
    lora_whole: tuple[str, ...] = ()
    log_every: int = _free(50)
    save_every: int = _free(1000)
    keep: int = _free(3)
    grid_every: int = _free(0)
    grid_steps: int = _free(50)
    grid_cfg: float = _free(1.5)
    log: tuple[str, ...] = _free(("tensorboard", "jsonl"))
    execution_reason: str = _free("")

    def __post_init__(self) -> None:
        """Take lists as JSON gives them. Raise ValueError on a field that no run can have."""
        for name in ("freeze", "lora_targets", "lora_whole", "log"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, kind in (
            ("device", Device),
            ("loss", LossName),
            ("schedule", LearningRateSchedule),
            ("dtype", Precision),
            ("execution", Execution),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}")
        for name in ("steps", "batch", "accumulate", "log_every", "save_every", "keep", "grid_steps"):
            if not 1 <= getattr(self, name) < INTEGERS:
                raise ValueError(f"{name} must be at least 1 and below 2^63; got {getattr(self, name)}")
        for name in ("warmup", "grid_every"):
            if not 0 <= getattr(self, name) < INTEGERS:
                raise ValueError(f"{name} must be 0 or more and below 2^63; got {getattr(self, name)}")
        for name in ("clip", "weight_decay", "grid_cfg"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a finite number, 0 or more; got {getattr(self, name)}")
        if self.steps * self.batch >= INTEGERS:
            raise ValueError(f"steps times batch must be below 2^63; got {self.steps * self.batch}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be a finite number above 0; got {self.learning_rate}")
        for name in ("label_dropout", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1; got {getattr(self, name)}")
        for word in self.log:
            if word not in get_args(Logger):
                raise ValueError(f"unknown logger {word!r:.80}: {closest(word, get_args(Logger))}")
        if not self.log or len(set(self.log)) < len(self.log):
            raise ValueError(f"log must name one or more of {', '.join(get_args(Logger))}, each once")
        if not 0 <= self.lora < 2**16:
            raise ValueError(f"lora must be a rank, 1 or more, or 0 for no adapters; got {self.lora}")
        if self.lora and self.freeze:
            raise ValueError("lora freezes all but its adapters; leave out freeze")
        if self.lora and not self.init:
            raise ValueError("lora adapts weights that were trained: name them by --init")
        if self.batch % self.accumulate:
            raise ValueError(f"a batch of {self.batch} does not divide into {self.accumulate} equal parts")
        if not 0 <= self.seed < INTEGERS:
            raise ValueError(f"seed must be 0 or more and below 2^63; got {self.seed}")
        if self.grid_every:
            # Now, and not at the first grid, hours later.
            build_solver(self.grid_sampler, steps=self.grid_steps)
        if self.execution == "graph" and self.device != "cuda":
            raise ValueError("execution graph is a CUDA graph and needs an NVIDIA GPU; use eager or compile")
        if (self.model.sample_shape, self.model.num_classes) != (self.data.shape, len(self.data.class_names)):
            raise ValueError(
                f"the model takes {self.model.sample_shape} and {self.model.num_classes} classes, the data has "
                f"{self.data.shape} and {len(self.data.class_names)}"
            )

    @property
    def grid_sampler(self) -> Literal["ddim", "euler"]:
        """The sampler of the grids."""
        return "euler" if self.loss == "flow-matching" else "ddim"

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, 0 being the first."""
        rate = self.learning_rate * min(1.0, (step + 1) / self.warmup) if self.warmup else self.learning_rate
        if self.schedule == "cosine" and step >= self.warmup:
            done = (step - self.warmup) / max(1, self.steps - self.warmup)
            rate *= (1 + math.cos(math.pi * done)) / 2
        return rate

    def to_json(self) -> dict[str, Any]:
        """As plain values; `from_json` takes them back."""
        content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainConfig:
        """Read what `to_json` gave. Raises KeyError, TypeError or ValueError on anything else."""
        # Runs of earlier versions averaged without it.
        content = {"ema_warmup": False, **content}
        model, data = content["model"], content["data"]
        for kind, values in ((ModelSpec, model), (DataSpec, data)):
            check_types(kind, values)
        parts = {"model": ModelSpec(**model), "data": DataSpec(**data)}
        check_types(cls, content, without=tuple(parts))
        return cls(**{**content, **parts})

    def differences(self, other: TrainConfig, *, elsewhere: bool = False) -> list[str]:
        """``name: ours, theirs`` of everything that keeps a run from going on as the other one began.

        ``elsewhere`` it may go on on another device, backend or execution: with the same state, but other last bits.
        """
        free = set(_WHERE) if elsewhere else set()
        free |= {entry.name for entry in dataclasses.fields(self) if entry.metadata.get("free")}
        if self.schedule == "constant":
            free.add("steps")
        ours, theirs = _flat(self.to_json()), _flat(other.to_json())
        # What an earlier version didn't record can't be compared.
        free |= {name for name in _CHECKSUMS if ours.get(name) is None or theirs.get(name) is None}
        names = [name for name in sorted(ours.keys() | theirs.keys()) if name not in free]
        return [
            f"{_in_words(name)}: {str(ours.get(name))[:60]}, {str(theirs.get(name))[:60]}"
            for name in names
            if ours.get(name) != theirs.get(name)
        ]

    def moves(self, other: TrainConfig) -> list[str]:
        """``device (theirs, now ours)`` of what `differences` lets pass ``elsewhere``."""
        ours, theirs = _flat(self.to_json()), _flat(other.to_json())
        return [
            f"{word} ({theirs.get(name)}, now {ours.get(name)})"
            for name, word in _WHERE.items()
            if ours.get(name) != theirs.get(name)
        ]


def default_batch(device: str, begun: TrainConfig | None) -> int:
    """Images a step where nobody says: as the run began, else DiT's 256 on a GPU, and on a CPU what fits into one."""
    if begun is not None:
        return begun.batch
    return BATCH["cuda" if device == "cuda" else "cpu"]


def choose_execution(asked: str, *, device: str, begun: TrainConfig | None, redraws: bool = False) -> tuple[str, str]:
    """Which execution a run takes, and why.

    Args:
        asked: One by name, or ``auto``: the one that the run began with, else a CUDA graph on a GPU, eager on a CPU.
        device: Where it runs.
        begun: The run, if it has begun.
        redraws: Whether the backward pass draws random numbers of the model again, which no CUDA graph can.

    Raises:
        ValueError: There is no such execution.
    """
    if asked in get_args(Execution):
        return asked, "asked for"
    if asked != "auto":
        raise ValueError(f"execution must be one of auto, {', '.join(get_args(Execution))}; got {asked!r}")
    if device == "cuda" and redraws and (begun is None or begun.execution == "graph"):
        return "eager", "blocks that draw random numbers can't be computed again in a CUDA graph"
    if begun is not None and begun.device == device:
        return begun.execution, begun.execution_reason or "the run began with it"
    if device == "cuda":
        return "graph", "the default on a GPU, where it spares the launches; --execution eager does without"
    return "eager", "the default on a CPU, which has no CUDA graphs"


_WHERE = {"device": "device", f"model.options.{BACKEND}": "backend", "execution": "execution"}
"""What decides on a run's last bits and not on what it is."""
_CHECKSUMS = {"data.sha256": "content of the data", "data.vae_sha256": "VAE of the latents"}
_WORDS = {
    **_CHECKSUMS,
    "data.samples": "samples of the data",
    "data.shape": "shape of the data's samples",
    "data.class_names": "classes of the data",
    "data.mirror": "mirror",
    "data.latent_scale": "scale of the latents",
    "model.name": "model",
    "model.input_size": "size of the model's input",
    "model.in_channels": "channels of the model's input",
    "model.num_classes": "classes of the model",
    "model.source": "import path of the model",
}
"""What people call what `TrainConfig.differences` compares."""


def _in_words(name: str) -> str:
    return _WORDS.get(name, name.removeprefix("model.options."))


def check_types(kind: type, content: Any, without: tuple[str, ...] = ()) -> None:
    """Raise TypeError unless JSON's values are of the types of the fields of a dataclass; missing ones pass."""
    if not isinstance(content, dict):
        raise TypeError(f"a {kind.__name__} must be an object; got {type(content).__name__}")
    for name, hint in get_type_hints(kind).items():
        if name in content and name not in without and not fits(content[name], hint):
            raise TypeError(f"{name} must be {expected(hint)}; got {str(content[name])[:60]!r}")


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat

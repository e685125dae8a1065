"""A case: what is measured, everything that changes the number, and nothing else. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Mode = Literal["train", "forward"]


Execution = Literal["eager", "compile", "graph", "compiled-graph"]
COMPILED: tuple[Execution, ...] = ("compile", "compiled-graph")
CAPTURED: tuple[Execution, ...] = ("graph", "compiled-graph")
"""The executions that torch.compile, and that a CUDA graph, has a part in."""
Scope = Literal["", "block", "model"]
SCOPES = tuple(word for word in get_args(Scope) if word)
"""What a command line may say; the empty one is of executions that do not compile."""
Weights = Literal["fp32", "bf16"]


Dtype = Literal["bf16", "fp32"]


Device = Literal["cuda", "cpu"]


Parallel = Literal["", "ddp", "fsdp"]
Sending = Literal["", "collectives", "copies"]


MOST_COUNT = 2**31 - 1
_WORDS: Mapping[str, Any] = {
    "mode": Mode, "execution": Execution, "scope": Scope, "dtype": Dtype, "weights": Weights, "device": Device,
    "parallel": Parallel, "sending": Sending,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured: everything that changes the number, and nothing else.

    Attributes:
        model: Family, size and patch: ``DiG-S/2``.
        options: Of the family, sorted by name: ``(("backend", "fla"),)``; see `dig.spec.create_model`.
        resolution: Side of the square image in pixels; the latent is an eighth of it.
        batch: Images a step; of several processes, of each.
        mode: ``train`` (forward, backward, fused AdamW) or ``forward`` (no gradients).
        execution: ``eager``; ``compile`` (torch.compile); ``graph`` (the whole step replayed as one CUDA graph); or
            ``compiled-graph``, both together.
        scope: What one compilation covers: ``block`` (one serves all blocks of a kind) or ``model``; empty where
            nothing is compiled.
        max_autotune: Whether Inductor times tiles and libraries for each product.
        dtype: ``bf16`` or ``fp32``.
        weights: ``fp32`` (under autocast where dtype is bf16), or ``bf16``: a forward pass of a model that was cast.
        device: ``cuda`` or ``cpu``.
        source: The family's import path, where no installed package declares it: a worker finds it by that.
        processes: How many train one model together, each with a device of its own.
        parallel: How they do: ``ddp`` (every one has the whole model, gradients are averaged) or ``fsdp`` (each has a
            share of weights, gradients and moments); empty for one process.
        sending: How these send gradients and weights: ``collectives`` (of NCCL, or gloo), or ``copies``
            (`dig.training.parallel.copying`); empty for one process.
    """

    model: str
    options: tuple[tuple[str, str], ...] = ()
    resolution: int
    batch: int = 1
    mode: Mode = "train"
    execution: Execution = "eager"
    scope: Scope = ""
    max_autotune: bool = False
    dtype: Dtype = "bf16"
    weights: Weights = "fp32"
    device: Device = "cuda"
    source: str = ""
    processes: int = 1
    parallel: Parallel = ""
    sending: Sending = ""

    def __post_init__(self) -> None:
        """Raise ValueError on a field that no row may have."""
        object.__setattr__(self, "options", tuple(sorted((str(k), str(v)) for k, v in self.options)))
        for name, kind in _WORDS.items():
            if getattr(self, name) not in get_args(kind):
                words = ", ".join(word or "nothing" for word in get_args(kind))
                raise ValueError(f"{name} must be one of {words}; got {getattr(self, name)!r}")
        if self.compiles and not self.scope:
            object.__setattr__(self, "scope", "block")
        if not self.compiles and (self.scope or self.max_autotune):
            raise ValueError(f"scope and max_autotune are of compiled executions; this one is {self.execution}")
        if self.weights == "bf16" and (self.mode, self.dtype) != ("forward", "bf16"):
            raise ValueError("weights bf16 are for a forward pass in bf16; training keeps fp32 weights")
        for name in ("batch", "resolution", "processes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_COUNT:
                raise ValueError(f"{name} must be a whole number from 1 to {MOST_COUNT}; got {value!r:.40}")
        if (self.processes > 1) != bool(self.parallel):
            raise ValueError("several processes are parallel by ddp or fsdp, and one is by neither")
        if self.parallel and not self.sending:
            object.__setattr__(self, "sending", "collectives")
        if self.sending and not self.parallel:
            raise ValueError(f"one process sends nothing; sending is {self.sending}")
        if self.sending == "copies" and self.device != "cuda":
            raise ValueError(f"copies go between GPUs; device is {self.device}")
        if self.parallel and self.mode != "train":
            raise ValueError(f"{self.parallel} is of training; mode is {self.mode}")

    @property
    def family(self) -> str:
        """``DiG`` of ``DiG-S/2``, ``Flash-DiT`` of ``Flash-DiT-S/2``."""
        return self.model.rpartition("-")[0]

    @property
    def size(self) -> str:
        """``S`` of ``DiG-S/2``."""
        return self.model.rpartition("-")[2].partition("/")[0]

    @property
    def patch(self) -> int:
        """2 of ``DiG-S/2``."""
        return int(self.model.rpartition("/")[2])

    @property
    def compiles(self) -> bool:
        """Whether torch.compile has a part in it."""
        return self.execution in COMPILED

    @property
    def captures(self) -> bool:
        """Whether the step is replayed as a CUDA graph."""
        return self.execution in CAPTURED

    @property
    def precision(self) -> str:
        """``bf16``, ``fp32``, or ``bf16-weights``."""
        return "bf16-weights" if self.weights == "bf16" else self.dtype

    @property
    def way(self) -> str:
        """How it is run, in short: ``graph``, ``compiled-graph by block``, ``compile by model max-autotune``."""
        scope = f" by {self.scope}" if self.scope else ""
        return f"{self.execution}{scope}{' max-autotune' if self.max_autotune else ''}"

    @property
    def together(self) -> str:
        """How several processes train, in short: ``fsdp``, ``fsdp by copies``; empty for one."""
        return f"{self.parallel} by copies" if self.sending == "copies" else self.parallel

    def describe(self) -> str:
        """One line for people: ``DiG-S/2 (backend=fla) 1024px train graph bf16 batch 1``."""
        options = f" ({', '.join(f'{k}={v}' for k, v in self.options)})" if self.options else ""
        several = f", {self.processes} processes by {self.together}" if self.parallel else ""
        return (
            f"{self.model}{options} {self.resolution}px {self.mode} {self.way} {self.precision} "
            f"batch {self.batch} on {self.device}{several}"
        )

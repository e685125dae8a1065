"""A case: what is measured, everything that changes the number, and nothing else. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["train", "forward"]


Execution = Literal["eager", "graph", "compile"]


Dtype = Literal["bf16", "fp32"]


Device = Literal["cuda", "cpu"]


MOST_COUNT = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured: everything that changes the number, and nothing else.

    Attributes:
        model: Family, size and patch: ``DiG-S/2``.
        options: Of the family, sorted by name: ``(("backend", "fla"),)``; see `dig.registry.create_model`.
        resolution: Side of the square image in pixels; the latent is an eighth of it.
        batch: Images a step.
        mode: ``train`` (forward, backward, fused AdamW) or ``forward`` (no gradients).
        execution: ``eager``, ``graph`` (the whole step replayed as one CUDA graph) or ``compile`` (torch.compile).
        dtype: ``bf16`` (autocast over fp32 weights) or ``fp32``.
        device: ``cuda`` or ``cpu``.
        source: The family's import path, where no installed package declares it: a worker finds it by that.
    """

    model: str
    options: tuple[tuple[str, str], ...] = ()
    resolution: int
    batch: int = 1
    mode: Mode = "train"
    execution: Execution = "eager"
    dtype: Dtype = "bf16"
    device: Device = "cuda"
    source: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError on a field that no row may have."""
        object.__setattr__(self, "options", tuple(sorted((str(k), str(v)) for k, v in self.options)))
        for name, kind in (("mode", Mode), ("execution", Execution), ("dtype", Dtype), ("device", Device)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}")
        for name in ("batch", "resolution"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_COUNT:
                raise ValueError(f"{name} must be a whole number from 1 to {MOST_COUNT}; got {value!r:.40}")

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

    def describe(self) -> str:
        """One line for people: ``DiG-S/2 (backend=fla) 1024px train graph bf16 batch 1``."""
        options = f" ({', '.join(f'{k}={v}' for k, v in self.options)})" if self.options else ""
        return (
            f"{self.model}{options} {self.resolution}px {self.mode} {self.execution} {self.dtype} "
            f"batch {self.batch} on {self.device}"
        )

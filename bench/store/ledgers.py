"""The parts of a result row: memory, timing, clocks, and what was checked before its number counted. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.store.decoding import require


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes, from a pass of its own before anything is timed. None where the device has no such counter.

    Attributes:
        parameters: Weights, as stored.
        gradients: Gradients after a step, as stored; 0 for a forward pass.
        optimizer: The optimizer's state; 0 for a forward pass.
        resident: Allocated before the first step: weights, buffers, inputs.
        activations: allocator_peak − resident − optimizer: what lives only within a step, gradients included, for the
            step frees them at its start.
        allocator_peak: The most that torch's CUDA allocator handed out during the steps, the resident part included,
            and windows of ranks that copy (`dig.training.parallel.copying`).
        reserved_peak: The most that this allocator held from the driver.
        context: What the process took on the device before its first tensor: CUDA context and loaded modules.
        process_peak: The whole process: NVML's figure on a GPU (context and libraries included), resident set on a CPU.
        process_source: Where process_peak and context are from: ``nvml-process``, ``nvml-device-delta`` (where the
            container hides process ids: the device's used memory, less what was used before the process started) or
            ``vm-hwm``.
    """

    parameters: int
    gradients: int | None = None
    optimizer: int | None = None
    resident: int | None = None
    activations: int | None = None
    allocator_peak: int | None = None
    reserved_peak: int | None = None
    context: int | None = None
    process_peak: int | None = None
    process_source: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError on bytes that cannot be."""
        for name in ("parameters", "allocator_peak", "process_peak"):
            require((getattr(self, name) or 0) >= 0, f"memory.{name} must not be negative; got {getattr(self, name)}")

    @property
    def peak(self) -> int | None:
        """The figure that plots and tables show: the allocator's peak on a GPU, the process's on a CPU."""
        return self.allocator_peak if self.allocator_peak is not None else self.process_peak


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How the samples were taken, and where a step's time goes. Milliseconds are medians.

    Attributes:
        warmup: Why untimed steps ended: ``steady`` (three blocks in a row agreed) or ``bound`` (the time for it was
            up first).
        warmup_steps: Untimed steps after the first two.
        ci_low, ci_high: 95% interval of the median of this launch's samples, by order statistics: it decides when
            sampling may stop, and says nothing of other launches.
        host_ms: The host's time to issue one step, in the case's execution.
        eager_ms: The step launched kernel by kernel.
        graph_ms: The same step replayed as one CUDA graph.
        launch_share: 1 − graph_ms / eager_ms, not below 0: what launches take of an eager step.
        l2_flushed: Whether the L2 cache was overwritten before every sample.
    """

    warmup: str
    warmup_steps: int
    ci_low: float
    ci_high: float
    host_ms: float | None = None
    eager_ms: float | None = None
    graph_ms: float | None = None
    launch_share: float | None = None
    l2_flushed: bool = False


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """What NVML said while samples were taken, each time with steps in flight.

    Attributes:
        readings: How many times it was asked.
        sm_mhz_min, sm_mhz_median, sm_mhz_max: SM clock.
        temperature_max: Degrees Celsius.
        power_max: Watts.
        throttled: Reason → share of the readings in which the clock was held down for it, 0 to 1.
        others: Other processes on the GPU, at most, before and during the samples; None where NVML hides processes.
        foreign_bytes: Device memory that was in use before this process started, driver's own included.
    """

    readings: int
    sm_mhz_min: int | None = None
    sm_mhz_median: int | None = None
    sm_mhz_max: int | None = None
    temperature_max: int | None = None
    power_max: float | None = None
    throttled: Mapping[str, float] = field(default_factory=dict)
    others: int | None = None
    foreign_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a launch of a run over several GPUs was measured, and what ran beside it.

    Attributes:
        gpu: Index of the GPU, as ``--gpus`` counts; its UUID is ``environment.gpu_uuid``.
        beside: Phase of the launch → on how many other GPUs of the host the run was at work meanwhile, at most. Phases
            are those of `bench.cases.jobs.Phase`, ``starting``, and ``preparing`` (parity check, matmul ceiling).
    """

    gpu: int
    beside: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError on numbers that count nothing."""
        require(self.gpu >= 0, f"placement.gpu must not be negative; got {self.gpu}")
        require(all(count >= 0 for count in self.beside.values()), "placement.beside must not be negative")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One process of several that train one model together.

    Attributes:
        median_ms: Its median step.
        peak: Bytes at most, as `Memory.peak`; None where the device has no such counter.
        gpu_uuid: Its GPU.
    """

    median_ms: float
    peak: int | None = None
    gpu_uuid: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Of a launch of ``bench scaling``.

    Attributes:
        run: When the run began: throughputs of one run compare.
        backend: What communicates, ``nccl`` or ``gloo``; empty for one process.
        ranks: Each process.
        silent_ms: The same step on every rank with nothing sent: every timed one, the slowest rank's; what the step
            takes beyond it is communication that nothing hides.
        gradient_error: How far the step's gradient is off the mean of the gradients that the ranks compute alone, by
            projections of every parameter's.
        gradient_bound: What that may be.
    """

    run: str
    backend: str = ""
    ranks: tuple[Rank, ...] = ()
    silent_ms: tuple[float, ...] = ()
    gradient_error: float | None = None
    gradient_bound: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError on times that are none."""
        times = (*self.silent_ms, *(rank.median_ms for rank in self.ranks))
        require(all(1e-6 <= ms <= 1e12 for ms in times), "scaling's times must lie between 1 ns and 31 years")


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What the parity check found.

    Attributes:
        inputs: SHA-256 of latents, noise, timesteps and labels: equal for all models of a comparison.
        tokens: Patches of one image: equal too.
        kernels: Kernels (a GPU) or operators (a CPU) that ran the family's heart in the very step that was timed.
        reference: The implementation that the output was compared with.
        reference_error: ‖output − reference‖ / ‖reference‖ on a small input, the reference in fp32.
        reference_bound: What the error may be.
        gradients_off: Share of the parameters whose gradient was beyond its bound there, the middle one of all draws;
            None for a forward pass.
        gradient_draws: How many draws of weights settled that; None for a forward pass, and in older rows.
        operation_error: Of the family's operation alone at the case's own shape (`dig.operation`): the largest relative
            error of any output or gradient, or of any stretch of its tokens; None where the family names none.
        operation_bound: What that may be.
        recheck_error: After the timed steps, on other inputs: what was timed against the same step run eagerly.
    """

    inputs: str
    tokens: int
    kernels: tuple[str, ...] = ()
    reference: str | None = None
    reference_error: float | None = None
    reference_bound: float | None = None
    gradients_off: float | None = None
    gradient_draws: int | None = None
    operation_error: float | None = None
    operation_bound: float | None = None
    recheck_error: float | None = None

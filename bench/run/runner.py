"""Runs cases one after the other, each in a process of its own, and stores every row as it comes. No torch here."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from bench.cases.case import Case
from bench.cases.jobs import BUDGETS, Budget, CaseJob, CeilingJob, Limits, ParityJob, Phase
from bench.run.gpus import Card
from bench.run.process import Worker, WorkerError
from bench.store.identity import measurement_key
from bench.store.ledgers import Checks, Placement
from bench.store.lines import LinesWriter
from bench.store.rows import Row, utc_now
from dig.nvml import POWER_CAP, Gpu

FINAL = frozenset({"ok", "oom", "unsupported"})
"""Statuses that a resumed run does not measure again; a timeout or an error may have been the moment's."""

PHASES: Mapping[Phase, str] = {
    "building": "building the model",
    "compiling": "building and tuning kernels",
    "measuring": "measuring",
    "checking": "checking what was measured",
}
"""What a worker does, in words for people."""
STARTING = "starting and importing"
"""The same before it can say anything."""
PREPARING: frozenset[Phase] = frozenset({"building", "compiling"})
"""The phases of `Limits.prepare`."""

SLACK = 64 << 20
"""Bytes by which a GPU's used memory may differ from before, when nothing of ours is left on it."""


def run_job(
    job: Any,
    *,
    limits: Limits,
    on_phase: Callable[[Phase], None] = lambda phase: None,
    entry: str = "bench.run.worker:worker_main",
    variables: Mapping[str, str] | None = None,
) -> Any:
    """Do a job in a process of its own.

    Args:
        job: What to do: a `bench.cases.jobs.Job`, or what another entry takes.
        limits: After which the process and its children are killed.
        on_phase: Told what the worker does, as it begins.
        entry: Where the process begins; it says what it does and answers as `bench.run.worker.worker_main` does.
        variables: Environment variables of the process, beside those that it inherits.

    Returns:
        The worker's answer.

    Raises:
        WorkerError: Time ran out, or the process died; the message holds the end of its stderr.
    """
    with Worker(entry, job, variables=variables) as worker:
        return _wait(worker, limits, on_phase)


def _wait(worker: Worker, limits: Limits, on_phase: Callable[[Phase], None]) -> Any:
    # What comes before the steps that count: a worker with another job than a case says nothing of itself.
    limit, since, doing = limits.prepare, time.monotonic(), ""
    preparing = True
    while True:
        kind, value = worker.answer(limit, since=since, doing=doing)
        if kind == "answer":
            return value
        on_phase(value)
        doing = PHASES[value]
        if preparing and value not in PREPARING:
            limit, since, preparing = limits.measure, time.monotonic(), False


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One process launch of a case."""

    case: Case
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A run over cases.

    Attributes:
        cases: What to measure, in order.
        launches: How often, each in a process of its own.
        done: Addresses (`key`) and numbers of launches that need no measuring, being in the results file already.
        limits: How long a case may take.
        budget: How long to sample, or None for the device's own.
        code: Content of the code that measures, by `bench.store.identity.code_hash`.
        environment: By `dig.environment.describe_environment`.
        built: Cases whose kernels were built ahead.
        again_s: Seconds after which no throttled launch is measured again (`run_sweep`).
        card: The GPU to measure on; CUDA's first where none is named.
    """

    cases: tuple[Case, ...]
    launches: int = 1
    done: frozenset[tuple[str, int]] = frozenset()
    limits: Limits = field(default_factory=Limits)
    budget: Budget | None = None
    code: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    built: frozenset[Case] = frozenset()
    again_s: float = 30.0
    card: Card | None = None

    def budget_of(self, case: Case) -> Budget:
        """How long a case is sampled."""
        return self.budget or BUDGETS[case.device]

    def job(self, launch: Launch, card: Card | None) -> CaseJob:
        """What a worker is told of a launch on a card."""
        case = launch.case
        return CaseJob(
            case=case,
            budget=self.budget_of(case),
            environment={**self.environment, **(card.environment if card is not None else {})},
            matmul_ceiling=None,
            launch=launch.number,
            key=self.key(case),
            built=case in self.built,
        )

    def key(self, case: Case) -> str:
        """The case's content address."""
        return measurement_key(case, code=self.code, environment=self.environment, budget=self.budget_of(case))

    @property
    def remaining(self) -> tuple[Launch, ...]:
        """The launches to measure: one of each case, in order; then, where there are more, rounds in random order.

        So launches of one case are far apart, and see the machine at different times.
        """
        rounds = []
        for number in range(self.launches):
            order = list(self.cases)
            if number:
                random.Random(number).shuffle(order)
            rounds += [Launch(case=case, number=number) for case in order]
        return tuple(launch for launch in rounds if (self.key(launch.case), launch.number) not in self.done)


def finished_launches(rows: Iterable[Row]) -> frozenset[tuple[str, int]]:
    """The launches that a resumed run leaves alone, by address and number; the last row of each counts."""
    latest = {(row.key, row.launch): row.status for row in rows if row.key}
    return frozenset(launch for launch, status in latest.items() if status in FINAL)


def run_sweep(
    sweep: Sweep,
    writer: LinesWriter[Row],
    *,
    on_start: Callable[[Case, str], None],
    findings: Findings | None = None,
) -> Iterator[Row]:
    """Measure the remaining launches; each row is on the disk before it is yielded.

    ``on_start`` is told the case, and what is done with it, as that begins; ``findings`` are what is known before.

    Before the first launch of a model, the parity check compares it with its reference; where that fails, the launch
    is a row with the check's message, and nothing is timed.

    A throttled launch is measured once more after all others, when the card is another's heat away from it, as far as
    `Sweep.again_s` goes: its second row counts, marked ``measured-again``, and marked throttled if it still is. Those
    held down by heat come first, for a card that is at its power cap under a case will be there again. A second look
    that fails leaves the first row as it was.
    """
    referee = Referee(limits=sweep.limits, card=sweep.card, findings=findings)

    def measure(launch: Launch) -> Row:
        referee.on_phase = lambda phase: on_start(launch.case, phase)
        return referee.measure(sweep.job(launch, sweep.card))

    throttled: list[tuple[Row, Launch]] = []
    for launch in sweep.remaining:
        row = measure(launch)
        writer.write(row)
        if "throttled" in row.marks:
            throttled.append((row, launch))
        yield row
    yield from measure_again(throttled, measure, writer, within=sweep.again_s)


L = TypeVar("L")


def measure_again(
    throttled: Iterable[tuple[Row, L]], measure: Callable[[L], Row], writer: LinesWriter[Row], *, within: float
) -> Iterator[Row]:
    """Measure throttled launches once more, one after the other, as `run_sweep` says.

    Args:
        throttled: Each row, and what it was measured by.
        measure: Measures it.
        writer: Gets the rows before they are yielded.
        within: Seconds after which none is begun.
    """

    def at_the_cap(entry: tuple[Row, L]) -> bool:
        clocks = entry[0].clocks
        return clocks is not None and set(clocks.throttled) == {POWER_CAP}

    deadline = time.monotonic() + within
    for _, launch in sorted(throttled, key=at_the_cap):
        if time.monotonic() >= deadline:
            return
        row = measure(launch)
        if row.status == "ok":
            row = replace(row, marks=(*row.marks, "measured-again"))
            writer.write(row)
            yield row


def agreement_of(case: Case) -> tuple[Any, ...]:
    """What an agreement with the reference is of; its last part, the mode, counts for both where it is training."""
    return case.model, case.options, case.dtype, case.device, case.mode


class Findings:
    """What was found once for all launches of a run, whichever card they run on; threads may share it."""

    def __init__(self) -> None:
        self.agreements: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.inputs: dict[tuple[Any, ...], tuple[Case, str, int]] = {}
        self._first = threading.Lock()
        self._locks: defaultdict[tuple[Any, ...], threading.Lock] = defaultdict(threading.Lock)

    def lock_of(self, key: tuple[Any, ...]) -> threading.Lock:
        """Held by whoever finds out about an agreement, so that nobody does it twice."""
        with self._first:
            return self._locks[key]


class Referee:
    """Measures launches on one GPU, and checks that their numbers compare.

    Keeps the card's ceilings, and the memory that it had in use before anything ran.

    Args:
        limits: How long a worker may take.
        ceilings: Whether the matmul ceiling is measured.
        card: The GPU; CUDA's first if not given.
        findings: Agreement with the references and each comparison's inputs, where several referees share them.
    """

    def __init__(
        self,
        *,
        limits: Limits,
        ceilings: bool = True,
        card: Card | None = None,
        findings: Findings | None = None,
    ) -> None:
        self.limits = limits
        self.on_phase: Callable[[str], None] = lambda phase: None
        self._with_ceilings = ceilings
        self._ceilings: dict[tuple[str, str], float | None] = {}
        self._findings = findings or Findings()
        self._card = card
        self._gpu = Gpu.open() if card is None else Gpu.open(card.uuid)
        self._idle = self._gpu.used() if self._gpu is not None else None

    def measure(self, job: CaseJob) -> Row:
        """Measure one launch; returns its row, also where it fails."""
        case, started_at = job.case, utc_now()
        key = (case.device, case.dtype)
        if key not in self._ceilings:
            self.on_phase("measuring the matmul ceiling")
            self._ceilings[key] = self._ceiling(case) if self._with_ceilings else None

        def failed(status: Any, message: str) -> Row:
            return Row(
                case=case,
                status=status,
                message=message,
                started_at=started_at,
                environment=dict(job.environment),
                launch=job.launch,
                key=job.key,
                placement=self._placement,
            )

        parity = self.agreement(case)
        if "message" in parity:
            missing = parity["status"] == "unsupported"
            return failed(parity["status"], parity["message"] if missing else f"parity: {parity['message']}")
        try:
            self.on_phase(STARTING)
            job = replace(job, matmul_ceiling=self._ceilings[key])
            row = replace(Row.from_json(self._run(job, on_phase=self._told)), placement=self._placement)
        except WorkerError as error:
            row = failed(error.status, str(error))
        returned = self.wait_for_memory()
        if row.status != "ok" or row.checks is None:
            return row
        if message := self._other_inputs(row.case, row.checks):
            return failed("error", f"parity: {message}")
        checks = replace(
            row.checks,
            reference=parity.get("reference"),
            reference_error=parity.get("error"),
            reference_bound=parity.get("bound"),
            gradients_off=parity.get("gradients_off") if case.mode == "train" else None,
            gradient_draws=parity.get("draws") if case.mode == "train" else None,
        )
        return replace(row, checks=checks, marks=row.marks if returned else (*row.marks, "memory-kept"))

    def _told(self, phase: Phase) -> None:
        self.on_phase(PHASES[phase])

    @property
    def _placement(self) -> Placement | None:
        return None if self._card is None else Placement(gpu=self._card.index)

    def _run(self, job: Any, **more: Any) -> Any:
        """`run_job` on this referee's card."""
        if self._card is not None:
            more["variables"] = self._card.variables
        return run_job(job, limits=self.limits, **more)

    def _ceiling(self, case: Case) -> float | None:
        try:
            return float(self._run(CeilingJob(device=case.device, dtype=case.dtype)))
        except WorkerError:
            return None  # Rows then say null: no share of a ceiling that was not measured.

    def agreement(self, case: Case) -> dict[str, Any]:
        """What the parity check found for this model and mode; a training step's comparison holds the outputs' too."""
        key = agreement_of(case)
        model = key[:-1]
        with self._findings.lock_of(model):
            known = self._findings.agreements
            trained = known.get((*model, "train"))
            if trained is not None and "message" not in trained:
                return trained
            if key not in known:
                try:
                    self.on_phase("comparing with its reference")
                    known[key] = self._run(ParityJob(case=case))
                except WorkerError as error:
                    known[key] = {"status": error.status, "message": str(error)}
                self.wait_for_memory()
            return known[key]

    def _other_inputs(self, case: Case, checks: Checks) -> str:
        """Why this row does not compare with the first of its comparison; empty where it does."""
        key = (case.resolution, case.batch, case.patch, case.dtype, case.device)
        first, inputs, tokens = self._findings.inputs.setdefault(key, (case, checks.inputs, checks.tokens))
        if checks.inputs != inputs:
            return f"its latents, noise, timesteps or labels are not those of {first.describe()}"
        return "" if checks.tokens == tokens else f"{checks.tokens} tokens; {first.describe()} has {tokens}"

    def wait_for_memory(self, patience: float = 20.0) -> bool:
        """Wait until the GPU's memory is back to what was in use before; say whether it came back."""
        if self._gpu is None or self._idle is None:
            return True
        deadline = time.monotonic() + patience
        while (used := self._gpu.used()) is not None and used > self._idle + SLACK:
            if time.monotonic() > deadline:
                self._idle = used  # Somebody else's by now, or lost: say so once, and measure from there.
                return False
            time.sleep(0.1)
        return True

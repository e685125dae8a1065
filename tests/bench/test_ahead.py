"""Kernels built ahead: side by side, in processes of their own, and none of it decides what is measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from bench.cases.case import Case
from bench.cases.jobs import Budget, BuildJob, CaseJob, Limits, ParityJob
from bench.measure import build as building
from bench.measure.case import measure_case
from bench.run import ahead
from bench.run.ahead import build_ahead, compared, gains, longest_first
from bench.run.gpus import Card
from bench.run.process import WorkerError
from bench.run.runner import Findings, Referee, agreement_of

COMPILED = Case(model="DiT-S/8", resolution=64, execution="compile", dtype="fp32", device="cpu", mode="forward")
SHORT = Budget(settle_s=0, settle_max_s=0, min_samples=3, least_s=0, target_s=0, max_samples=3)


def test_what_is_compiled_gains_but_not_what_tunes_itself() -> None:
    assert gains(COMPILED)
    assert not gains(replace(COMPILED, execution="eager", scope=""))
    assert not gains(replace(COMPILED, max_autotune=True))
    assert not gains(replace(COMPILED, model="DiG-S/8", options=(("backend", "fla"),)))


def test_the_longest_builds_begin_first() -> None:
    block = replace(COMPILED, scope="block")
    whole, training = replace(COMPILED, scope="model"), replace(COMPILED, mode="train")
    longest = replace(COMPILED, scope="model", mode="train")
    assert longest_first([block, training, whole, longest]) == [longest, whole, training, block]


class FakeWorker:
    """Answers after a while; those alive at a time are counted."""

    alive = most = 0

    given: ClassVar[list[Any]] = []

    def __init__(self, entry: str, job: Any, *, variables: Any) -> None:
        self.case, self.began = job.case, time.monotonic()
        FakeWorker.given.append(variables)
        FakeWorker.alive += 1
        FakeWorker.most = max(FakeWorker.most, FakeWorker.alive)

    def answered(self) -> bool:
        return self.case.resolution != 512 and time.monotonic() - self.began > 0.05

    def status(self) -> str:
        return "oom" if self.case.resolution == 256 else "ok"

    def end(self) -> None:
        FakeWorker.alive -= 1


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    FakeWorker.alive = FakeWorker.most = 0
    config = pytest.importorskip("torch._inductor.config")
    before = config.compile_threads
    yield
    config.compile_threads = before


def test_so_many_run_at_once_and_a_slow_or_failing_one_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "Worker", FakeWorker)
    cases = [replace(COMPILED, resolution=64 * n) for n in (1, 2, 3, 4, 8)]
    began: list[Case] = []
    FakeWorker.given.clear()
    cards = (Card(index=0, uuid="GPU-a"), Card(index=1, uuid="GPU-b"))
    went = build_ahead(
        cases, at_once=2, limits=Limits(prepare=0.4), on_start=lambda case, doing: began.append(case), cards=cards
    )
    assert FakeWorker.given == [{"CUDA_VISIBLE_DEVICES": f"GPU-{which}"} for which in "ababa"]
    assert began == cases
    assert [went[case] for case in cases] == ["ok", "ok", "ok", "oom", "timeout"]
    assert (FakeWorker.most, FakeWorker.alive) == (2, 0)


def test_a_model_is_compared_once_by_a_training_case_where_there_is_one() -> None:
    train = replace(COMPILED, mode="train", resolution=128)
    other = replace(COMPILED, model="DiT-B/8")
    assert compared([COMPILED, train, replace(COMPILED, batch=2), other]) == [train, other]
    assert compared([train, COMPILED]) == [train]


def test_comparisons_are_made_ahead_but_a_refusal_is_left_to_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    agreed, refused, died = (replace(COMPILED, model=f"DiT-{size}/8") for size in ("S", "B", "L"))
    answers = {agreed: {"reference": "r"}, refused: {"status": "oom", "message": "no room beside the others"}}

    class Comparing(FakeWorker):
        def __init__(self, entry: str, job: Any, *, variables: Any) -> None:
            super().__init__(entry, job, variables=variables)
            jobs.append(job)

        def answer(self, limit: float) -> Any:
            if self.case not in answers:
                raise WorkerError("error", "died")
            return "answer", answers[self.case]

    jobs: list[Any] = []
    said: list[str] = []
    findings = Findings()
    monkeypatch.setattr(ahead, "Worker", Comparing)
    cases = [agreed, replace(agreed, resolution=128), refused, died]
    limits = Limits(prepare=5)
    went = build_ahead(cases, at_once=2, limits=limits, on_start=lambda c, doing: said.append(doing), findings=findings)
    assert [job.case for job in jobs if isinstance(job, ParityJob)] == [agreed, refused, died]
    assert list(went) == [job.case for job in jobs if isinstance(job, BuildJob)] == cases
    assert said.count("comparing with its reference") == 3
    assert findings.agreements == {agreement_of(agreed): {"reference": "r"}}
    # The one that was kept is not made again; those that were not are.
    asked: list[Case] = []
    referee = Referee(limits=limits, findings=findings)
    monkeypatch.setattr(referee, "_run", lambda job: asked.append(job.case) or {"reference": "again"})
    assert [referee.agreement(case)["reference"] for case in (agreed, refused)] == ["r", "again"]
    assert asked == [refused]


def test_an_interrupt_ends_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "Worker", FakeWorker)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_ahead([replace(COMPILED, resolution=512)], at_once=2, limits=Limits(), on_start=lambda case, doing: None)
    assert FakeWorker.alive == 0


@pytest.mark.parametrize("built", [False, True])
def test_what_was_built_ahead_is_read_by_one_process(built: bool) -> None:
    config = pytest.importorskip("torch._inductor.config")
    config.compile_threads = 7
    case = replace(COMPILED, execution="eager", scope="")
    row = measure_case(CaseJob(case=case, budget=SHORT, environment={}, matmul_ceiling=None, built=built))
    assert row.status == "ok"
    assert config.compile_threads == (1 if built else 7)


def test_cases_built_side_by_side_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("torch._inductor.config")
    config.compile_threads = 7
    monkeypatch.setattr(building, "keep_no_tuning", lambda: None)
    assert building.build(replace(COMPILED, execution="eager", scope=""), threads=3) == "ok"
    assert config.compile_threads == 3
    jobs: list[BuildJob] = []

    class Told(FakeWorker):
        def __init__(self, entry: str, job: Any, *, variables: Any) -> None:
            super().__init__(entry, job, variables=variables)
            jobs.append(job)

    monkeypatch.setattr(ahead, "Worker", Told)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    build_ahead([COMPILED], at_once=5, limits=Limits(), on_start=lambda case, doing: None)
    assert [job.threads for job in jobs] == [3]


def test_what_a_build_raises_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "keep_no_tuning", lambda: None)
    assert building.build(replace(COMPILED, execution="eager", scope="")) == "ok"

    def full(case: Case) -> None:
        raise MemoryError

    monkeypatch.setattr(building, "build_step", full)
    assert building.build(COMPILED) == "oom"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_real_processes_build_a_case() -> None:
    case = replace(COMPILED, scope="block")  # One of twelve equal ones: the others find it compiled.
    assert build_ahead([case], at_once=1, limits=Limits(), on_start=lambda case, doing: None) == {case: "ok"}

"""A sweep without its processes: what is left to do, in which order, what is measured again, what must agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.cases.case import Case
from bench.cases.jobs import CaseJob, Limits, ParityJob
from bench.run import runner
from bench.run.runner import Referee, Sweep, finished_launches, run_sweep
from bench.store.ledgers import Checks, Clocks, Memory
from bench.store.rows import ResultsWriter, Row, read_results
from tests.bench.harness import QUICK, small


def test_resume_repeats_what_failed_for_the_moment_and_what_other_code_measured() -> None:
    cases = [small(resolution=64 * i) for i in (1, 2, 3, 4, 5)]
    statuses = ["ok", "oom", "unsupported", "timeout", "error"]
    sweep = Sweep(cases=tuple(cases), code="a", environment={"torch": "2.13", "commit": "1"})
    rows = [
        Row(
            case=case,
            status=status,
            started_at="",
            samples_ms=(1.0,) if status == "ok" else (),
            key=sweep.key(case),
        )
        for case, status in zip(cases, statuses, strict=True)
    ]
    done = finished_launches([*rows, replace(rows[0], key="")])

    def left(**changes: object) -> list[Case]:
        return [launch.case for launch in replace(sweep, done=done, **changes).remaining]

    assert left() == cases[3:]
    assert left(environment={"torch": "2.13", "commit": "2"}) == cases[3:]
    assert left(code="b") == cases
    assert left(environment={"torch": "2.14"}) == cases
    assert left(budget=QUICK) == cases
    assert len(left(launches=2)) == 7


def test_rounds_hold_every_case_once_in_an_order_of_their_own() -> None:
    cases = tuple(small(resolution=64 * i) for i in range(1, 9))
    order = Sweep(cases=cases, launches=3).remaining
    rounds = [[launch.case for launch in order if launch.number == number] for number in range(3)]
    assert [launch.number for launch in order] == [0] * 8 + [1] * 8 + [2] * 8
    assert rounds[0] == list(cases)
    assert all(set(found) == set(cases) for found in rounds)
    assert rounds[1] != rounds[0] != rounds[2] != rounds[1]


HOT = Clocks(readings=4, throttled={"hw-thermal": 1.0})
CAPPED = Clocks(readings=4, throttled={"sw-power-cap": 1.0})


def again(
    path: Path, monkeypatch: pytest.MonkeyPatch, looks: dict[int, list[tuple[Clocks | None, str]]], seconds: float = 60
) -> list[Row]:
    """Runs a sweep over cases of these resolutions, whose launches are written down: clocks and status of each look."""
    cases = tuple(small(resolution=resolution) for resolution in looks)

    def look(self: Referee, job: CaseJob) -> Row:
        clocks, status = looks[job.case.resolution].pop(0)
        good = status == "ok"
        return Row(
            case=job.case,
            status=status,
            started_at="",
            samples_ms=(1.0,) if good else (),
            marks=("throttled",) if clocks is not None and good else (),
            clocks=clocks,
        )

    monkeypatch.setattr(Referee, "measure", look)
    with ResultsWriter(path) as writer:
        rows = list(run_sweep(Sweep(cases=cases, again_s=seconds), writer, on_start=lambda case, doing: None))
    assert read_results(path).rows == tuple(rows)
    return rows


def test_throttled_launches_are_measured_once_more_and_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = {64: [(CAPPED, "ok"), (CAPPED, "ok")], 128: [(None, "ok")], 192: [(HOT, "ok"), (None, "ok")]}
    rows = again(tmp_path / "a.jsonl", monkeypatch, looks)
    assert [row.case.resolution for row in rows] == [64, 128, 192, 192, 64]
    assert [row.marks for row in rows[3:]] == [("measured-again",), ("throttled", "measured-again")]
    assert looks == {64: [], 128: [], 192: []}


def test_a_second_look_that_fails_or_comes_too_late_leaves_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = again(tmp_path / "a.jsonl", monkeypatch, {64: [(HOT, "ok"), (HOT, "error")]})
    assert [(row.status, row.marks) for row in rows] == [("ok", ("throttled",))]
    rows = again(tmp_path / "b.jsonl", monkeypatch, {64: [(HOT, "ok"), (None, "ok")]}, seconds=0)
    assert [(row.status, row.marks) for row in rows] == [("ok", ("throttled",))]


def test_parity_in_training_holds_for_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    answers = {"train": {"reference": "r", "gradients_off": 0.0}, "forward": {"reference": "r"}}

    def answer(job: ParityJob, *, limits: Limits) -> dict:
        asked.append(job.case.mode)
        return answers[job.case.mode]

    monkeypatch.setattr(runner, "run_job", answer)
    referee = Referee(limits=Limits())
    for mode in ("forward", "train", "forward", "train"):
        assert referee.agreement(small(mode=mode)) == (answers["train"] if "train" in asked else answers["forward"])
    assert asked == ["forward", "train"]
    answers["train"] = {"status": "error", "message": "gradients"}
    referee = Referee(limits=Limits())
    assert "message" in referee.agreement(small(mode="train"))
    assert "message" not in referee.agreement(small(mode="forward"))


def test_models_of_a_comparison_are_given_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of other inputs, or of another number of tokens, is an error and no time."""
    given = {"DiT-S/8": ("aa", 4), "DiG-S/8": ("aa", 4), "DiS-S/8": ("bb", 4), "Flash-DiT-S/8": ("aa", 5)}

    def answer(job: ParityJob | CaseJob, **limits: object) -> object:
        if isinstance(job, ParityJob):
            return {}
        inputs, tokens = given[job.case.model]
        checks, memory = Checks(inputs=inputs, tokens=tokens), Memory(parameters=1)
        row = Row(case=job.case, status="ok", started_at="", samples_ms=(1.0,), memory=memory, checks=checks)
        return row.to_json()

    monkeypatch.setattr(runner, "run_job", answer)
    referee = Referee(limits=Limits(), ceilings=False)

    def measured(model: str, **changes: object) -> Row:
        job = CaseJob(case=small(model, **changes), budget=QUICK, environment={}, matmul_ceiling=None, key="k")
        return referee.measure(job)

    rows = [measured(model) for model in given]
    assert [row.status for row in rows] == ["ok", "ok", "error", "error"]
    assert "latents, noise, timesteps or labels are not those of DiT-S/8" in rows[2].message
    assert rows[3].message.startswith("parity: 5 tokens; DiT-S/8")
    assert all((row.samples_ms, row.key) == ((), "k") for row in rows[2:])
    assert measured("DiS-S/8", resolution=128).status == "ok"  # Of another comparison.

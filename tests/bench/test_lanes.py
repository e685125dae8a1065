"""Lanes: which GPU of a host takes which case, what runs beside what, and how a run of several ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.cases.case import Case
from bench.cases.jobs import CaseJob
from bench.cli import main as cli
from bench.run import lanes
from bench.run.lanes import Board, Neighbours, Plan, comparison, homes_of, marks_beside, run_on_cards
from bench.run.process import Worker
from bench.run.runner import Launch, Referee, Sweep, finished_launches
from bench.store.ledgers import Clocks, Placement
from bench.store.rows import ResultsWriter, Row, read_results
from dig.environment import ROOT
from tests.bench.harness import QUICK, alive, children, small
from tests.bench.test_gpus import CARDS


def test_a_board_keeps_a_comparison_on_one_card() -> None:
    models, sides = ("DiT-S/8", "DiG-S/8", "DiS-S/8"), (64, 128, 192)
    launches = [Launch(case=small(model, resolution=side)) for side in sides for model in models]
    board = Board(launches, spread="comparisons")
    first, second = CARDS
    order = [(one, board.take(one)) for one in (first, second, second, second, second, second, first, first, first)]
    assert [(one.index, launch.case.resolution) for one, launch in order if launch] == [
        (0, 64), (1, 128), (1, 128), (1, 128), (1, 192), (1, 192), (0, 64), (0, 64),
    ]  # fmt: skip
    assert order[-1] == (first, None)
    assert board.take(second) == launches[-1]
    board = Board(launches, spread="cases")
    assert [board.take(one) for one in (first, second) * 5] == [*launches, None]
    board = Board(launches, spread="comparisons", homes={comparison(launches[0].case, "comparisons"): second})
    assert board.take(first) == launches[3]


def test_other_launches_of_a_comparison_follow_it_in_a_resumed_run_too() -> None:
    rows = [
        Row(case=small(model, resolution=r), status="ok", started_at="", samples_ms=(1.0,), environment={"gpu_uuid": u})
        for model, r, u in (("DiT-S/8", 64, "GPU-0"), ("DiG-S/8", 64, "GPU-1"), ("DiT-S/8", 128, "GPU-other"))
    ]
    assert homes_of(rows, CARDS, "comparisons") == {comparison(rows[0].case, "comparisons"): CARDS[1]}
    assert homes_of(rows, CARDS, "cases") == {(rows[0].case,): CARDS[0], (rows[1].case,): CARDS[1]}


def test_what_ran_beside_a_launch_is_known_by_phase() -> None:
    first, second = CARDS
    seen = Neighbours()
    seen.enter(first, "starting")
    seen.enter(first, "compiling")
    seen.enter(second, "starting")
    seen.enter(second, "compiling")
    seen.enter(first, "measuring")
    assert seen.leave(second) == {"starting": 1, "compiling": 1}
    seen.enter(first, "checking")
    assert seen.leave(first) == {"compiling": 1, "measuring": 1}
    seen.enter(second, "measuring")
    assert seen.leave(second) == {}


@pytest.mark.parametrize(
    ("execution", "beside", "marks"),
    [
        ("eager", {"measuring": 1}, ("host-shared",)),
        ("compile", {"measuring": 1, "compiling": 1}, ("host-shared", "built-beside")),
        ("graph", {"measuring": 2}, ("beside-another",)),
        ("compiled-graph", {"compiling": 1}, ("built-beside",)),
        ("eager", {"starting": 1, "checking": 1, "building": 1}, ()),
    ],
)
def test_marks_say_what_is_doubtful(execution: Any, beside: dict[str, int], marks: tuple[str, ...]) -> None:
    case = small(execution=execution, device="cpu" if execution in ("eager", "compile") else "cuda")
    assert marks_beside(case, beside) == marks


class Cards:
    """Stands for the referees' work: which launches were at work at a time, on which card, and their rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, seconds: float = 0.05, hot: tuple[int, ...] = ()) -> None:
        self.lock, self.seconds, self.hot = threading.Lock(), seconds, list(hot)
        self.at_work: set[str] = set()
        self.together: list[frozenset[str]] = []
        self.began: list[tuple[int, Case]] = []

        def measure(referee: Referee, job: CaseJob) -> Row:
            return self.look(referee, job)

        monkeypatch.setattr(Referee, "measure", measure)

    def look(self, referee: Referee, job: CaseJob) -> Row:
        where = referee._card
        assert where is not None
        me = f"{where.index}: {job.case.resolution} {job.case.execution}"
        with self.lock:
            self.began.append((where.index, job.case))
            self.at_work.add(me)
            self.together.append(frozenset(self.at_work))
        for doing in ("building the model", "building and tuning kernels", "measuring"):
            referee.on_phase(doing)
            time.sleep(self.seconds)
        with self.lock:
            self.at_work.discard(me)
            hot = job.case.resolution in self.hot
            if hot:
                self.hot.remove(job.case.resolution)
        return Row(
            case=job.case,
            status="ok",
            started_at="",
            samples_ms=(1.0,),
            key=job.key,
            launch=job.launch,
            environment=job.environment,
            marks=("throttled",) if hot else (),
            clocks=Clocks(readings=2, throttled={"hw-thermal": 1.0}) if hot else None,
        )


def gpu_case(resolution: int, execution: Any = "graph", model: str = "DiT-S/8") -> Case:
    return Case(model=model, resolution=resolution, mode="forward", execution=execution)


def run(path: Path, cases: list[Case], told: list[str] | None = None, **plan: Any) -> list[Row]:
    sweep_options = {name: plan.pop(name) for name in ("launches", "done") if name in plan}
    sweep = Sweep(cases=tuple(cases), budget=QUICK, environment={"commit": "abc"}, **sweep_options)
    with ResultsWriter(path) as writer:
        whole = Plan(sweep=sweep, cards=CARDS, **plan)
        said = [] if told is None else told
        return list(run_on_cards(whole, writer, on_start=lambda case, doing: said.append(doing)))


def test_cases_run_side_by_side_and_rows_say_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards, told = Cards(monkeypatch), list[str]()
    path = tmp_path / "r.jsonl"
    cases = [gpu_case(r, model=m) for r in (64, 128, 192, 256) for m in ("DiT-S/8", "DiG-S/8")]
    rows = run(path, cases, told)
    assert read_results(path).rows == tuple(rows)
    assert {row.case for row in rows} == set(cases)
    assert len(rows) == 8
    assert max(map(len, cards.together)) == 2
    assert all(len({name[0] for name in names}) == len(names) for names in cards.together)  # One a card at a time.
    for row in rows:
        assert row.placement is not None
        assert row.environment["gpu_uuid"] == f"GPU-{row.placement.gpu}"
        assert row.environment["commit"] == "abc"
    assert {row.placement.gpu for row in rows if row.placement} == {0, 1}
    homes = {(row.case.resolution, row.placement.gpu) for row in rows if row.placement}
    assert len(homes) == 4
    marked = [row for row in rows if "beside-another" in row.marks]
    assert len(marked) >= 6  # The first and the last of them may have had a moment alone.
    assert {row.placement.beside["measuring"] for row in marked if row.placement} == {1}
    assert not any("host-shared" in row.marks for row in rows)
    assert any("measuring on GPU 0 | GPU 1: D" in line for line in told)


def test_what_the_host_launches_has_it_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [gpu_case(r, execution) for r in (64, 128) for execution in ("eager", "graph", "compile")]
    cards = Cards(monkeypatch)
    rows = run(tmp_path / "a.jsonl", cases)
    bound = [row for row in rows if row.case.execution != "graph"]
    assert rows[-4:] == bound
    assert all(row.marks == () and row.placement and row.placement.beside == {} for row in bound)
    assert all(len(names) == 1 for names in cards.together if not any(name.endswith("graph") for name in names))
    homes = {(row.case.resolution, row.placement.gpu) for row in rows if row.placement}
    assert len(homes) == 2
    cards = Cards(monkeypatch)
    rows = run(tmp_path / "b.jsonl", cases, alone="none")
    assert any("host-shared" in row.marks for row in rows)
    assert all(("host-shared" in row.marks) <= (row.case.execution != "graph") for row in rows)


def test_a_run_goes_on_where_it_was_on_the_same_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards, path = Cards(monkeypatch, seconds=0.01), tmp_path / "r.jsonl"
    cases = [gpu_case(r, model=m) for r in (64, 128, 192) for m in ("DiT-S/8", "DiG-S/8")]
    first = run(path, cases[:3])
    cards.began.clear()
    before = read_results(path).rows
    rest = run(path, cases, done=finished_launches(before), before=before)
    assert {row.case for row in rest} == set(cases[3:])
    where = {row.case: row.placement.gpu for row in (*first, *rest) if row.placement}
    assert where[cases[2]] == where[cases[3]]


def test_throttled_launches_are_measured_again_on_their_card_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = Cards(monkeypatch, hot=(128,))
    rows = run(tmp_path / "r.jsonl", [gpu_case(64), gpu_case(128)])
    (again,) = rows[2:]
    assert (again.case.resolution, again.marks) == (128, ("measured-again",))
    assert [where for where, case in cards.began if case.resolution == 128] == [again.placement.gpu] * 2  # type: ignore[union-attr]


def test_an_error_in_a_lane_ends_the_run_and_the_other_lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = threading.Event()

    def measure(referee: Referee, job: CaseJob) -> Row:
        if referee._card is CARDS[0]:
            began.wait(60)
            raise ZeroDivisionError("a mistake of the harness")
        with Worker("idle_worker:begin") as worker:
            began.set()
            worker.answer(600)
        raise AssertionError

    (tmp_path / "idle_worker.py").write_text("import time\n\ndef begin(connection):\n    time.sleep(600)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Referee, "measure", measure)
    before, started = threading.active_count(), time.monotonic()
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "r.jsonl", [gpu_case(64), gpu_case(128)])
    assert time.monotonic() - started < 60
    assert threading.active_count() == before


def test_two_real_cases_side_by_side(tmp_path: Path) -> None:
    """On a CPU, whose cards are names only: workers, parity and rows are real."""
    rows = run(tmp_path / "r.jsonl", [small(), small(resolution=128)], alone="none")
    assert [row.status for row in rows] == ["ok", "ok"], [row.message for row in rows]
    assert {(row.placement.gpu, row.environment["gpu_uuid"]) for row in rows if row.placement} == {
        (0, "GPU-0"),
        (1, "GPU-1"),
    }
    assert all(Row.from_json(row.to_json()) == row for row in rows)


INTERRUPTED = """
import signal
import sys
from pathlib import Path

from bench.run.lanes import Plan, run_on_cards
from bench.run.runner import Sweep
from bench.store.rows import ResultsWriter
from tests.bench.harness import small
from tests.bench.test_gpus import CARDS

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cases = tuple(small("DiT-S/2", resolution=side, mode="train") for side in (512, 768, 1024))
    plan = Plan(sweep=Sweep(cases=cases), cards=CARDS, alone="none")
    try:
        with ResultsWriter(Path(sys.argv[1])) as writer:
            for row in run_on_cards(plan, writer, on_start=lambda case, doing: print(doing, flush=True)):
                print(row.status, flush=True)
    except KeyboardInterrupt:
        print("stopped", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_lane_at_work(how: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    command = [sys.executable, str(script), str(tmp_path / "r.jsonl")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    harness = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert harness.stdout is not None
    while "GPU 0" not in (line := harness.stdout.readline()) or "kernels" not in line:
        assert line, "it ended before both lanes were at work"
    descendants = children(harness.pid)
    harness.send_signal(how)
    rest, _ = harness.communicate(timeout=60)
    assert ("stopped" in rest) == (how == signal.SIGINT)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(alive(pid) for pid in descendants):
        time.sleep(0.1)
    assert len(descendants) >= 3
    assert [pid for pid in descendants if alive(pid)] == []


def test_fewer_comparisons_than_cards_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "gpu_present", lambda: True)
    monkeypatch.setattr(cli, "visible_cards", lambda: list(CARDS))
    Cards(monkeypatch, seconds=0.0)
    words = ["run", "--gpus", "0,1", "--models", "DiG:triton", "--resolution", "64", "--modes", "forward"]
    said = CliRunner().invoke(cli.app, [*words, "--out", str(tmp_path / "a.jsonl")])
    assert said.exit_code == 0, said.output
    assert "1 of 2 GPUs will be used: no comparison is spread over several; --spread cases uses more" in said.output
    said = CliRunner().invoke(cli.app, [*words, "--out", str(tmp_path / "b.jsonl"), "--spread", "cases"])
    assert "1 of 2 GPUs will be used: no case is spread over several" in said.output
    assert [row.placement for row in read_results(tmp_path / "b.jsonl").rows] == [Placement(gpu=0)]


def test_every_doing_has_its_phase() -> None:
    from bench.run.runner import PHASES

    assert {lanes._DOING[words] for words in PHASES.values()} == set(PHASES)

"""What a command waits for is said without a terminal too: a line for each thing, few lines, and how long it takes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench.cases.case import Case
from bench.cases.jobs import Budget
from bench.cli import main as cli
from bench.cli import regression as regression_command
from bench.cli.waiting import AGAIN, PAUSE, Waiting
from bench.judge import regression as gate
from bench.store.ledgers import Memory
from bench.store.rows import Row


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40, soft_wrap=True)


def test_each_thing_is_a_line_with_how_long_it_took_and_what_is_left(console: Console, clock: Clock) -> None:
    waiting = Waiting(console, total=4, clock=clock)
    waiting.show("base, DiT [red]: importing")
    clock.now += 65
    waiting.show("base, DiT: measuring", 1, 4)
    clock.now += 3600
    waiting.show("change, DiT: importing", 2)
    assert lines(console) == [
        "[0 of 4 done] base, DiT [red]: importing (0:00 elapsed)",
        "[1 of 4 done] base, DiT: measuring (1:05 elapsed, about 3:15 left)",
        "[2 of 4 done] change, DiT: importing (1:01:05 elapsed, about 1:01:05 left)",
    ]


def test_what_takes_longer_than_those_before_says_nothing_of_those_to_come(console: Console, clock: Clock) -> None:
    waiting = Waiting(console, total=12, clock=clock)
    waiting.show("comparing side by side")
    clock.now += 100
    waiting.begin()
    clock.now += 10
    waiting.advance()
    waiting.show("fla's first")
    for _ in range(2):
        clock.now += 200
        waiting.tick()
    assert lines(console)[1:] == [
        "[1 of 12 done] fla's first (1:50 elapsed, about 1:50 left)",
        "[1 of 12 done] fla's first (5:10 elapsed, about 1:40 left)",
        "[1 of 12 done] fla's first (8:30 elapsed, about 1:40 left)",
    ]


def test_of_what_comes_after_all_nothing_is_estimated(console: Console, clock: Clock) -> None:
    waiting = Waiting(console, total=1, clock=clock)
    waiting.advance()
    waiting.show("measured again")
    assert lines(console) == ["[1 of 1 done] measured again (0:00 elapsed)"]


def test_of_what_comes_fast_the_last_is_said_and_of_what_lasts_that_it_lasts(console: Console, clock: Clock) -> None:
    waiting = Waiting(console, clock=clock)
    for text in ("first", "second", "third"):
        waiting.show(text)
        clock.now += PAUSE / 10
    waiting.tick()
    assert lines(console) == ["first (0:00 elapsed)"]
    clock.now += PAUSE
    waiting.tick()
    waiting.tick()
    clock.now += AGAIN - 1
    waiting.tick()
    assert lines(console)[1:] == ["third (0:03 elapsed)"]
    clock.now += 1
    waiting.tick()
    assert lines(console)[2:] == ["third (0:23 elapsed)"]


def test_nobody_need_call_for_a_line_to_come(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.cli.waiting.PAUSE", 0.01)
    monkeypatch.setattr("bench.cli.waiting.AGAIN", 0.02)
    with Waiting(console) as waiting:
        waiting.show("a long compilation")
        for _ in range(1000):
            if len(lines(console)) >= 3:
                break
            waiting._over.wait(0.01)
    assert len(lines(console)) >= 3
    assert not waiting._thread.is_alive()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_no_lines() -> None:
    console = Console(file=Terminal(), force_terminal=True, width=100, force_interactive=True)
    with Waiting(console, total=2) as waiting:
        waiting.show("measuring", 1)
        waiting._bar.refresh()  # type: ignore[union-attr]
        shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "measuring" in shown
    assert "1/2" in shown
    assert "elapsed" not in shown


class Fake:
    """A side that says what it does and measures nothing."""

    parse = staticmethod(Row.from_json)

    def __init__(self, checkout: object, *, time_limit: float) -> None:
        pass

    def measure(self, case: Case, *, budget: Budget, launch: int, tell: object) -> Row:
        for doing in ("importing", "measuring"):
            tell(doing)  # type: ignore[operator]
        memory = Memory(parameters=1, process_peak=10**9)
        return Row(case=case, status="ok", started_at="", samples_ms=(10.0,), memory=memory, launch=launch)

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def test_the_regression_gate_says_what_it_waits_for_on_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.cli.waiting.PAUSE", 0.0)
    monkeypatch.setattr(Waiting, "_run", lambda self: None)  # Only what is told, each once.
    monkeypatch.setattr(regression_command, "Side", Fake)
    monkeypatch.setattr(gate, "Side", Fake)
    words = [
        "regression",
        "--case",
        "DiT-S/8@64:forward",
        "--device",
        "cpu",
        "--against-itself",
        "1",
        "--launches",
        "5",
    ]
    result = CliRunner().invoke(cli.app, [*words, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    said = [line for line in result.stderr.splitlines() if "elapsed" in line]
    assert len(said) == 2 * 2 * 6
    assert {line.split("]")[0] for line in said} == {f"[{done} of 12 done" for done in range(12)}
    case = "case 1 of 1, DiT-S/8 (backend=materialized) 64px forward eager fp32 batch 1 on cpu"
    assert f", untimed launch, {case}: importing (" in said[0]
    assert f", launch 5 of 5, {case}: measuring (" in said[-1]
    assert sum(line.startswith(f"[{done} of 12 done] base, ") for line in said for done in range(12)) == 12
    assert " left)" in said[-1]
    assert "elapsed" not in result.stdout

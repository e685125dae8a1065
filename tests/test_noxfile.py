"""What the bench session of noxfile.py does at a run's end; in nox's place stands the little of it that it uses."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


class CommandFailed(Exception):  # noqa: N818
    """As nox raises it."""


@pytest.fixture
def noxfile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    nox = ModuleType("nox")
    nox.options = SimpleNamespace()
    nox.project = SimpleNamespace(load_toml=lambda _: {"dependency-groups": {}})
    nox.command = SimpleNamespace(CommandFailed=CommandFailed)
    nox.virtualenv = SimpleNamespace(PassthroughEnv=type(None))
    nox.session = lambda function: function
    monkeypatch.setitem(sys.modules, "nox", nox)
    spec = importlib.util.spec_from_file_location("noxfile_under_test", ROOT / "noxfile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


class Session:
    """A session without an environment of its own, whose commands do what a test says."""

    virtualenv = None

    def __init__(self, *posargs: str, measure: Callable[[], Any], draw: Callable[[], Any] = lambda: True) -> None:
        self.posargs = list(posargs)
        self.does = {"bench": measure, "reports": draw}
        self.ran: list[tuple[str, ...]] = []
        self.timeouts: list[dict[str, float]] = []

    def run(self, *command: str, **how: float) -> None:
        self.ran.append(command[2:])
        self.timeouts.append(how)
        self.does[command[2]]()


def rows_and(error: BaseException | None) -> Callable[[], None]:
    def measure() -> None:
        Path("out").mkdir()
        Path("out/results.jsonl").write_text("{}\n")
        if error is not None:
            raise error

    return measure


def status(noxfile: ModuleType, session: Session) -> int:
    try:
        noxfile.bench(session)
    except SystemExit as end:
        return int(end.code)
    except (KeyboardInterrupt, CommandFailed) as error:
        pytest.fail(f"the session ended by {error!r}")
    return 0


REPORT = ("reports", "out/results.jsonl", "--out", "out/report")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, 0),
        (KeyboardInterrupt(), 130),  # Ctrl-C at a terminal
        (CommandFailed("Returned code 130"), 130),  # SIGTERM to the run alone
        (CommandFailed("Returned code 2"), 2),
        (CommandFailed("Returned code -9"), 137),
    ],
)
def test_what_was_measured_is_drawn_and_the_session_ends_as_the_run_did(noxfile, error, expected):
    session = Session(measure=rows_and(error))
    assert status(noxfile, session) == expected
    assert session.ran[-1] == REPORT


def test_nothing_is_drawn_of_a_run_that_left_no_rows(noxfile):
    def refuse() -> None:
        raise CommandFailed("Returned code 2")

    session = Session("--suite", "nonsense", measure=refuse)
    assert status(noxfile, session) == 2
    assert [command[0] for command in session.ran] == ["bench"]


def test_a_report_that_fails_fails_the_session_but_hides_no_earlier_status(noxfile, tmp_path, monkeypatch):
    def fail() -> None:
        raise CommandFailed("Returned code 2")

    assert status(noxfile, Session(measure=rows_and(None), draw=fail)) == 2
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert status(noxfile, Session(measure=rows_and(KeyboardInterrupt()), draw=fail)) == 130


@pytest.mark.parametrize(
    ("given", "passed"), [((), ("--suite", "auto")), (("--resolution", "1024"), ("--resolution", "1024"))]
)
def test_the_run_always_goes_on_where_it_was(noxfile, given, passed):
    session = Session(*given, measure=rows_and(None))
    assert status(noxfile, session) == 0
    assert session.ran[0] == ("bench", "run", "--out", "out/results.jsonl", "--resume", *passed)


def test_a_stopped_run_has_seconds_to_write_what_it_has(noxfile):
    session = Session(measure=rows_and(None))
    status(noxfile, session)
    assert all(how["interrupt_timeout"] >= 10 and how["terminate_timeout"] >= 10 for how in session.timeouts)


def test_sigterm_to_nox_stops_the_run_and_draws(noxfile):
    before = signal.getsignal(signal.SIGTERM)
    write = rows_and(None)

    def measure() -> None:
        write()
        os.kill(os.getpid(), signal.SIGTERM)

    session = Session(measure=measure)
    # Should the session leave SIGTERM alone, let it raise here and not end the tests.
    signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM was nobody's"))
    try:
        assert status(noxfile, session) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert session.ran[-1] == REPORT


@pytest.mark.parametrize("words", [("--out", "x"), ("--out=x",)])
def test_another_place_is_refused(noxfile, words):
    session = Session(*words, measure=rows_and(None))

    def error(message: str) -> None:
        raise RuntimeError(message)

    session.error = error
    with pytest.raises(RuntimeError, match="writes into out/"):
        noxfile.bench(session)
    assert not session.ran


@pytest.mark.parametrize(
    ("ends", "printed", "status"),
    [(None, True, 0), (CommandFailed("exit code 1"), True, 1), (CommandFailed("exit code 2"), False, 2)],
)
def test_scaling_prints_what_each_number_of_gpus_gave(
    noxfile: ModuleType, ends: Exception | None, printed: bool, status: int
) -> None:
    def measure() -> None:
        if ends is not None:
            raise ends

    session = Session("--gpus", "0,1", measure=measure)
    session.does["reports.scaling"] = lambda: True
    if status:
        with pytest.raises(SystemExit) as raised:
            noxfile.scaling(session)
        assert raised.value.code == status
    else:
        noxfile.scaling(session)
    assert session.ran[0] == ("bench", "scaling", "--out", "out/scaling.jsonl", "--resume", "--gpus", "0,1")
    assert [command[0] for command in session.ran[1:]] == (["reports.scaling"] if printed else [])
    assert all((ROOT / path).exists() for command in session.ran[1:] for path in command[1:-1])

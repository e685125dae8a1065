"""One side of a comparison, in a process that runs in the side's own checkout: jobs come in, rows go out.

``python -m bench.run.side`` reads one JSON object a line from stdin and answers each with a result row on stdout; it
ends with its input. Each launch is a worker process of its own, as in any run. No torch in this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from bench.cases.case import Case
from bench.cases.jobs import Budget, CaseJob, Limits
from bench.run.checkouts import Checkout
from bench.run.lifeline import die_with_parent
from bench.run.runner import Referee
from bench.store.decoding import decode_dataclass
from bench.store.identity import code_hash, measurement_key
from bench.store.rows import ResultError, Row
from dig.environment import COMMIT_VARIABLE, ROOT, describe_environment
from dig.registry import load_source


class SideError(RuntimeError):
    """A side's process ended, or answered something else than a row; the message holds the end of its stderr."""


def without_checkouts(path: str) -> str:
    """PYTHONPATH without folders that hold this project: a side must find its own, and the packages of all."""
    folders = [folder for folder in path.split(os.pathsep) if folder]
    return os.pathsep.join(folder for folder in folders if not Path(folder, "bench", "run", "side.py").exists())


DOING = "doing: "
"""Begins the lines in which a side says what it does; an answer begins with a brace."""

C = TypeVar("C")
R = TypeVar("R")


class SideOf(Generic[C, R]):
    """The process of one side, seen from the harness. A context manager: leaving it ends the process.

    Args:
        checkout: Where it runs.
        time_limit: Seconds a launch may take.
        module: What runs there; it answers by `answer_questions`.
        ask: What it is asked about a case, as JSON has it.
        parse: Reads its answer.
    """

    def __init__(
        self,
        checkout: Checkout,
        *,
        time_limit: float,
        module: str,
        ask: Callable[[C], dict[str, Any]],
        parse: Callable[[str], R],
    ) -> None:
        self.checkout, self.parse = checkout, parse
        self._time_limit, self._ask = time_limit, ask
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        environment = {**os.environ, COMMIT_VARIABLE: checkout.name, "PYTHONHASHSEED": "0"}
        # Where the harness was started, a family of one's own may lie, as may any package on the path.
        given = os.pathsep.join([environment.get("PYTHONPATH", ""), os.getcwd()])
        environment["PYTHONPATH"] = without_checkouts(given)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=checkout.root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )

    def measure(self, case: C, *, budget: Budget, launch: int, tell: Callable[[str], None] = lambda doing: None) -> R:
        """One launch of a case.

        Args:
            case: Which.
            budget: How long it is sampled.
            launch: Its number.
            tell: Told what the side does, as it begins.

        Raises:
            SideError: The side's process is gone.
        """
        question = {
            "case": self._ask(case),
            "budget": dataclasses.asdict(budget),
            "launch": launch,
            "time_limit": self._time_limit,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            while (line := self._process.stdout.readline()).startswith(DOING):
                tell(line.removeprefix(DOING).strip())
            return self.parse(line)
        except (OSError, ResultError) as error:
            self._log.seek(0)
            tail = self._log.read()[-600:].decode(errors="replace").strip()
            raise SideError(
                f"the side {self.checkout.name} stopped ({error}); {tail or 'it printed nothing'}"
            ) from None

    def close(self) -> None:
        """End the process with everything it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Side(SideOf[Case, Row]):
    """A side that measures whole steps.

    Args:
        checkout: Where it runs.
        time_limit: Seconds a launch may take.
    """

    def __init__(self, checkout: Checkout, *, time_limit: float) -> None:
        super().__init__(
            checkout,
            time_limit=time_limit,
            module="bench.run.side",
            ask=lambda case: dataclasses.asdict(case) | {"options": dict(case.options)},
            parse=Row.from_json,
        )


class Question(NamedTuple):
    """What a side is asked: a launch of a case.

    Attributes:
        case: As JSON has it.
        budget: How long it is sampled.
        launch: Its number.
        time_limit: Seconds it may take.
    """

    case: dict[str, Any]
    budget: Budget
    launch: int
    time_limit: float


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


Answer = Callable[[Question, Callable[[str], None]], str]
"""Answers a question; its second argument is told what is done, as it begins."""


def answer_questions(start: Callable[[], Answer]) -> None:
    """Answer each question from stdin with a line on stdout, until the input ends: all that a side does.

    Before the answer come lines that begin with `DOING`.

    Args:
        start: Makes ready, once nothing that is printed can pass for an answer any more; gives what answers.
    """
    die_with_parent()  # Its input ends with the harness too, but a launch takes its time.
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a worker prints must not pass for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(doing: str) -> None:
        answers.write(f"{DOING}{doing}\n")
        answers.flush()

    tell("importing")
    answer = start()
    for line in sys.stdin:
        asked = json.loads(line)
        question = Question(**{**asked, "budget": decode_dataclass(Budget, asked["budget"], "budget")})
        answers.write(answer(question, tell) + "\n")
        answers.flush()


def _start() -> Answer:
    environment, code = describe_environment(), code_hash(Path(ROOT))
    referee = Referee(limits=Limits(), ceilings=False)

    def answer(question: Question, tell: Callable[[str], None]) -> str:
        case = Case(**{**question.case, "options": tuple(question.case["options"].items())})
        load_source(case.source)
        referee.on_phase = tell
        referee.limits = Limits(prepare=question.time_limit, measure=question.time_limit)
        job = CaseJob(
            case=case,
            budget=question.budget,
            environment=environment,
            matmul_ceiling=None,
            launch=question.launch,
            key=measurement_key(case, code=code, environment=environment, budget=question.budget),
        )
        return referee.measure(job).to_json()

    return answer


if __name__ == "__main__":
    answer_questions(_start)

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
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

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


class Side:
    """The process of one side, seen from the harness. A context manager: leaving it ends the process.

    Args:
        checkout: Where it runs.
        time_limit: Seconds a launch may take.
    """

    def __init__(self, checkout: Checkout, *, time_limit: float) -> None:
        self.checkout = checkout
        self._time_limit = time_limit
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        environment = {**os.environ, COMMIT_VARIABLE: checkout.name, "PYTHONHASHSEED": "0"}
        # Where the harness was started, a family of one's own may lie, as may any package on the path.
        given = os.pathsep.join([environment.get("PYTHONPATH", ""), os.getcwd()])
        environment["PYTHONPATH"] = without_checkouts(given)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.run.side"],
            cwd=checkout.root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )

    def measure(self, case: Case, *, budget: Budget, launch: int) -> Row:
        """One launch of a case.

        Raises:
            SideError: The side's process is gone.
        """
        options = {"options": dict(case.options)}
        question = {
            "case": dataclasses.asdict(case) | options,
            "budget": dataclasses.asdict(budget),
            "launch": launch,
            "time_limit": self._time_limit,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            return Row.from_json(self._process.stdout.readline())
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

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _read_job(line: str, environment: Mapping[str, Any], code: str) -> tuple[CaseJob, float]:
    question = json.loads(line)
    case_fields = question["case"]
    case = Case(**{**case_fields, "options": tuple(case_fields["options"].items())})
    load_source(case.source)
    budget = decode_dataclass(Budget, question["budget"], "budget")
    key = measurement_key(case, code=code, environment=environment, budget=budget)
    job = CaseJob(
        case=case, budget=budget, environment=environment, matmul_ceiling=None, launch=question["launch"], key=key
    )
    return job, float(question["time_limit"])


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    """Answer until the input ends."""
    die_with_parent()  # Its input ends with the harness too, but a launch takes its time.
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a worker prints must not pass for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    environment, code = describe_environment(), code_hash(Path(ROOT))
    referee = Referee(limits=Limits(), ceilings=False)
    for line in sys.stdin:
        job, seconds = _read_job(line, environment, code)
        referee.limits = Limits(prepare=seconds, measure=seconds)
        answers.write(referee.measure(job).to_json() + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

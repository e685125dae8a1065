"""Several gloo ranks on this machine, for the tests: ``python -m tests.dig.parallel_job PLAN`` is one of them.

To start a process takes seconds, so each does many commands, one after the other, in a job of its own each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from tests.dig.tiny import TINY, app, using


def free_port() -> int:
    """A port of this host that nobody listens on, and none that the system gives others: tests beside this one too."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    while True:
        port = 20_000 + 1_500 * worker + random.SystemRandom().randrange(1_500)
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def start(
    folder: Path, commands: Sequence[Sequence[str]], *, ranks: int = 2, setup: str = "", tiny: bool = True
) -> list[Any]:
    """Processes, one a rank, that do the commands; ``setup`` is Python that each runs first, ``tiny`` makes DiG small.

    A word ``@one|other`` is another one for each rank.
    What a rank prints is in ``rank-N.log`` in the folder; the commands' exit statuses, in the end, in ``rank-N.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan: dict[str, Any] = {
        "ports": [free_port() for _ in commands],
        "commands": [list(words) for words in commands],
        "setup": setup,
    }
    plan["tiny"] = tiny
    (folder / "plan.json").write_text(json.dumps(plan))
    started = []
    for rank in range(ranks):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        with (folder / f"rank-{rank}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.dig.parallel_job", str(folder)],
                    env={**os.environ, "OMP_NUM_THREADS": "1", **{name: str(one) for name, one in variables.items()}},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return started


def end(started: list[Any], seconds: float = 120) -> list[int]:
    """Wait for the processes; their exit statuses."""
    try:
        return [process.wait(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()


def printed(folder: Path, rank: int) -> str:
    return (folder / f"rank-{rank}.log").read_text()


def at_step(number: int, rank: int, then: str) -> str:
    """Setup that lets one rank do something before it takes the data of a step of the process."""
    return f"""
import os, signal, time
from dig.training import inputs
take, taken = inputs.InputStream.take, [0]
def taking(self, stop):
    taken[0] += 1
    if taken[0] == {number} and os.environ["RANK"] == "{rank}":
        {then}
    return take(self, stop)
inputs.InputStream.take = taking
"""


def main(folder: Path) -> None:
    # Started in the background of a shell, it would ignore what is to be sent to it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    plan = json.loads((folder / "plan.json").read_text())
    statuses = []
    exec(plan["setup"], {"__name__": "setup"})
    for port, given in zip(plan["ports"], plan["commands"], strict=True):
        os.environ["MASTER_PORT"] = str(port)
        words = [word[1:].split("|")[int(os.environ["RANK"])] if word[0] == "@" else word for word in given]
        with using(TINY) if plan["tiny"] else nullcontext():
            try:
                app(words, prog_name="dig")
            except SystemExit as stopped:
                statuses.append(stopped.code or 0)
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

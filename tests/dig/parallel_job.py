"""Several gloo ranks on this machine, for the tests: ``python -m tests.dig.parallel_job PLAN`` is one of them.

To start a process takes seconds, so each does many commands, one after the other, in a job of its own each.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from tests.dig.tiny import TINY, app, using


def free_ports(count: int) -> list[int]:
    """Ports of this host that nobody listens on, none twice, and none that the system gives others.

    A job that finds the store of the one before it at its port waits for ranks that are gone.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    first = 20_000 + 1_500 * worker
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(first, first + 1_500), 1_500):
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError(f"{count} free ports from {first} on are not to be had: {len(ports)} are")


def free_port() -> int:
    """One of `free_ports`."""
    return free_ports(1)[0]


def start(
    folder: Path, commands: Sequence[Sequence[str]], *, ranks: int = 2, setup: str = "", tiny: bool = True
) -> list[Any]:
    """Processes, one a rank, that do the commands; ``setup`` is Python that each runs first, ``tiny`` makes DiG small.

    A word ``@one|other`` is another one for each rank.
    What a rank prints is in ``rank-N.log`` in the folder; the commands' exit statuses, in the end, in ``rank-N.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan: dict[str, Any] = {
        "ports": free_ports(len(commands)),
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
    """Wait for the processes; their exit statuses.

    Raises:
        TimeoutError: Some did not end; it says where each of their threads was, and what all ranks had printed.
    """
    until = time.monotonic() + seconds
    try:
        return [process.wait(timeout=max(until - time.monotonic(), 0)) for process in started]
    except subprocess.TimeoutExpired:
        hung = [process for process in started if process.poll() is None]
        for process in hung:
            # Each says where it is, and dies (`main`).
            process.send_signal(signal.SIGABRT)
        for process in hung:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
        folder = Path(started[0].args[-1])
        said = "\n".join(f"rank {rank}:\n{printed(folder, rank)[-6000:]}" for rank in range(len(started)))
        raise TimeoutError(f"{len(hung)} of {len(started)} ranks did not end within {seconds:g} s\n{said}") from None
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
    faulthandler.enable()
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

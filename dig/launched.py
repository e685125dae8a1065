"""What a launcher (torchrun) says of this process in its environment. No torch here."""

from __future__ import annotations

import os
import signal
import threading
import time

QUIET_SECONDS = 5.0
"""How long a rank leaves it to the first one of its machine to say what ends them both."""
APART_SECONDS = 0.5
"""How much longer each next rank does: of those that met an error the first one says it, and the launcher ends the
others meanwhile."""


def place_in_job() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine), as torchrun says; (0, 1, 0) of a process that nobody launched.

    Raises:
        ValueError: The environment says something else than numbers that go together.
    """
    rank, world_size, local_rank = (
        from_environment(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if not launched():
        return 0, 1, 0
    if not rank < world_size:
        raise ValueError(f"RANK must be below WORLD_SIZE, as torchrun sets them; got {rank} and {world_size}")
    return rank, world_size, local_rank


def launched() -> bool:
    """Whether a launcher started this process: as one of several, or as the only one of a job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def follows() -> bool:
    """Whether this process is one of several and not the first, which speaks for all."""
    return launched() and os.environ["RANK"] != "0"


def speaks() -> bool:
    """Whether this process is to say what ends it, while the ranks of its job don't know one another yet.

    A wrong option ends all of them alike. So the first rank of a machine says it, at once. Another one waits for the
    launcher to end it, as it does when the first one has ended, and speaks where that doesn't happen: then the error is
    its own. Returns within `QUIET_SECONDS`, and `APART_SECONDS` a rank.
    """
    try:
        local_rank = place_in_job()[2]
    except ValueError:
        return True
    # Only a process' first thread may listen to signals.
    if local_rank == 0 or threading.current_thread() is not threading.main_thread():
        return True
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: told.append(number))
    try:
        deadline = time.monotonic() + QUIET_SECONDS + APART_SECONDS * local_rank
        while not told and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGTERM, before)
    return not told


def from_environment(name: str, default: int) -> int:
    """A variable as a number.

    Raises:
        ValueError: It is something else.
    """
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"the environment variable {name} must be a number, as torchrun sets it; got {text!r}")
    return int(text)

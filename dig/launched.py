"""What a launcher (torchrun) says of this process in its environment. No torch here."""

from __future__ import annotations

import os


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


def from_environment(name: str, default: int) -> int:
    """A variable as a number.

    Raises:
        ValueError: It is something else.
    """
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"the environment variable {name} must be a number, as torchrun sets it; got {text!r}")
    return int(text)

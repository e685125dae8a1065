"""A rank that dies or hangs ends the job, with one message that says which, where and why.

Collectives alone don't: over NCCL the other ranks wait for whoever is gone, and a launcher on another machine may not
notice for minutes. So a thread of every rank writes a beat into the job's store each second, and reads those of all.

A beat counts what the rank has begun. All ranks begin the same things in the same order, so of a job that stands still
the rank with the lowest count is the one that the others wait for.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch.distributed as dist

from dig.messages import describe, one_line
from dig.training.parallel.ranks import MEETING_SECONDS, Ranks

BEAT_SECONDS = 1.0
LOST_SECONDS = 20.0
"""A rank of which nothing was heard for so long is gone, or its machine or network is."""
LEAVE_SECONDS = 10.0
"""How long the first rank waits at the end for the others to be done with the store."""
RECORD_SECONDS = 5.0
"""For the end of the job to be recorded, on a disk that may be what hangs."""
GRACE_SECONDS = 2.0
"""For a rank that ends to say why, before others say that it is gone."""
STATUS = 2
"""Exit status of a job that failed."""

Sign = Literal["gone", "silent"]


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        tick: Counts the beats: one that stands still is of a process that does.
        count: Things that it has begun.
        doing: The last of them.
        step: The training step that it is of; None outside of training.
        seconds: How long it has been at it.
        host: Its machine.
        process: Its number there.
        waits: Whether it only waits for other ranks.
        left: Whether it is done, and may go.
    """

    tick: int
    count: int
    doing: str
    step: int | None
    seconds: float
    host: str
    process: int
    waits: bool
    left: bool

    def where(self) -> str:
        """``at step 7, waiting for data``."""
        return f"at step {self.step}, {self.doing}" if self.step is not None else self.doing


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Why a job ended.

    Attributes:
        rank: That died, hangs or failed; the first of several.
        step: The training step that it was at; None outside of training.
        message: What is said of it.
    """

    rank: int
    step: int | None
    message: str


class Watch:
    """Tells the other ranks that this one lives, and ends it where another one does not.

    Args:
        ranks: The job.
        remedy: What to do about a job that failed, for its message: ``go on with the same command``; empty while
            nothing has been made that it could go on with. Or what gives it then.
        leave: Ends the process.

    Attributes:
        step: The training step that is under way.
        remedy: As above; may be changed at any time.
        record: Called by the rank that says why the job ended, and by no other one; may be changed at any time.
    """

    def __init__(
        self, ranks: Ranks, *, remedy: str | Callable[[], str] = "", leave: Callable[[int], object] = os._exit
    ) -> None:
        self.remedy = remedy
        self.record: Callable[[Lost], object] = lambda _lost: None
        self._ranks = ranks
        self._leave = leave
        self._beat = Beat(
            tick=0,
            count=0,
            doing="starting",
            step=None,
            seconds=0.0,
            host=socket.gethostname(),
            process=os.getpid(),
            waits=False,
            left=False,
        )
        self._since = time.monotonic()
        self._counts: list[int] = []
        self._moved = self._since  # when any rank last began something
        self._heard: dict[int, tuple[int, float]] = {}
        self._missed: dict[int, float] = {}
        self._claimed = False
        self._ends = threading.Event()
        self._lock = threading.Lock()  # one thread of this process speaks
        self._send()
        # So that all beats are there to be read.
        ranks.meet()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def doing(self, what: str, step: int | None = None, *, waits: bool = False) -> None:
        """This rank begins something that all ranks begin, or ``waits`` for them; the job has its time-out for it."""
        self._beat = replace(self._beat, count=self._beat.count + 1, doing=what, step=step, waits=waits)
        self._since = time.monotonic()

    def stop(self, status: int) -> None:
        """End this process at once, without a word: another one may be waited for that never comes."""
        self._leave(status)

    def stopped(self, status: int) -> None:
        """End the job because this rank was told to stop: with a message, if no other rank has one before."""
        with self._lock:
            self._end(self._own(f"rank {self._ranks.rank} was told to stop"), claimed=self._claims(), status=status)

    def leave(self) -> None:
        """This rank is done: nobody waits for it, and it for nobody."""
        self._beat = replace(self._beat, left=True)
        self._ends.set()
        self._thread.join()
        with suppress(dist.DistError, RuntimeError):
            self._send()
            # Its process may hold the store, which the others still read.
            deadline = time.monotonic() + LEAVE_SECONDS
            while self._ranks.leads and not all(beat.left for beat in self._beats().values()):
                if time.monotonic() > deadline:
                    break
                time.sleep(MEETING_SECONDS)

    def fail(self, error: BaseException, message: str | None) -> None:
        """End this process because of an error: with a message, if no other rank has one that comes before.

        Args:
            error: What ended it.
            message: What to say of it; None where it is a fault of the program, whose traceback is then printed.
        """
        if _is_of_others(error):
            # Another rank is gone, which the thread finds out: it ends this process.
            time.sleep(LOST_SECONDS + 2 * BEAT_SECONDS + 2 * GRACE_SECONDS)
        at = "" if self._beat.step is None else f" at step {self._beat.step}"
        with self._lock:
            if self._claims() and message is None:
                traceback.print_exception(error)
            self._end(self._own(f"rank {self._ranks.rank}{at}: {message or describe(error)}"), claimed=self._claimed)

    def _run(self) -> None:
        try:
            while not self._ends.wait(BEAT_SECONDS):
                self._send()
                self._look()
        except (dist.DistError, RuntimeError) as error:
            if not self._ends.is_set():
                # The store went with whoever held it: torchrun, or rank 0. Each rank says so; one record is enough.
                if not self._ranks.leads:
                    self.record = lambda _lost: None
                lost = self._own(f"rank {self._ranks.rank} lost the job's store ({describe(error)[:200]})")
                with self._lock:
                    self._end(lost, claimed=True)

    def _send(self) -> None:
        self._beat = beat = replace(
            self._beat, tick=self._beat.tick + 1, seconds=round(time.monotonic() - self._since, 1)
        )
        self._ranks.store.set(f"beat/{self._ranks.rank}", json.dumps(vars(beat)))

    def _beats(self) -> dict[int, Beat]:
        ranks = range(self._ranks.world_size)
        found = self._ranks.store.multi_get([f"beat/{rank}" for rank in ranks])
        return {rank: Beat(**json.loads(text)) for rank, text in zip(ranks, found, strict=True)}

    def _look(self) -> None:
        """Look after the others, and this rank's own progress."""
        if self._ranks.store.check(["failed"]):
            # It has been told. What this rank itself may have to say, its main thread says now or never.
            time.sleep(GRACE_SECONDS)
            with self._lock:
                self._end(None, claimed=False)
        beats = self._beats()
        for rank, beat in beats.items():
            if rank != self._ranks.rank and not beat.left and (sign := self._sign(rank, beat)):
                with self._lock:
                    self._end(self._lost(rank, beat, sign), claimed=self._claims())
        counts = [beat.count for beat in beats.values()]
        if counts != self._counts:
            self._counts, self._moved = counts, time.monotonic()
        if time.monotonic() - self._moved > self._ranks.hang_seconds:
            with self._lock:
                self._end(self._hung(beats), claimed=self._claims())

    def _sign(self, rank: int, beat: Beat) -> Sign | None:
        """Why a rank counts as lost, if it does."""
        now = time.monotonic()
        if beat.host == self._beat.host and not _lives(beat.process):
            # Not at once: it may have said why, or that it is done, after its beats were read.
            return "gone" if now - self._missed.setdefault(rank, now) > GRACE_SECONDS else None
        tick, heard = self._heard.get(rank, (-1, now))
        if tick != beat.tick:
            self._heard[rank] = beat.tick, now
            return None
        return "silent" if now - heard > LOST_SECONDS else None

    def _own(self, message: str) -> Lost:
        return Lost(rank=self._ranks.rank, step=self._beat.step, message=message)

    def _lost(self, rank: int, beat: Beat, sign: Sign) -> Lost:
        who = f"rank {rank} (process {beat.process} on {beat.host})"
        if sign == "gone":
            message = (
                f"{who} is gone, last heard of {beat.where()}: its process ended without a word, as one does that is "
                "killed, for want of memory perhaps"
            )
        else:
            message = (
                f"{who} is silent, last heard of {beat.where()}: nothing came of it for {LOST_SECONDS:.0f} s; its "
                "process is stopped, or its machine or network is down"
            )
        return Lost(rank=rank, step=beat.step, message=message)

    def _hung(self, beats: dict[int, Beat]) -> Lost:
        beats = {rank: beat for rank, beat in beats.items() if not beat.left} or beats
        waiting_for = {rank: beat for rank, beat in beats.items() if not beat.waits} or beats
        last = min(beat.count for beat in waiting_for.values())
        behind = {rank: beat for rank, beat in waiting_for.items() if beat.count == last}
        rank, beat = next(iter(behind.items()))
        names = ", ".join(map(str, list(behind)[:8])) + (", ..." if len(behind) > 8 else "")
        who = f"rank {rank} hangs" if len(behind) == 1 else f"ranks {names} hang"
        waiting = f", and {len(beats) - len(behind)} wait for it" if len(beats) > len(behind) else ""
        # A process that is stopped says no more how long it has been at it.
        seconds = max(beat.seconds, time.monotonic() - self._moved)
        so_long = "if that may take so long, give a larger --hang-timeout"
        message = f"{who} {beat.where()}: for {seconds:.0f} s{waiting}; {so_long}"
        return Lost(rank=rank, step=beat.step, message=message)

    def _claims(self) -> bool:
        """Whether this rank is the first one that has something to say of the end of the job."""
        if not self._claimed:
            with suppress(dist.DistError, RuntimeError):
                self._claimed = self._ranks.store.add("told", 1) == 1
        return self._claimed

    def _what_to_do(self) -> str:
        if isinstance(self.remedy, str):
            return self.remedy
        try:
            return self.remedy()
        except OSError:  # Of a folder that can't be read any more there is nothing to say.
            return ""

    def _record(self, lost: Lost) -> None:
        with suppress(OSError):  # A full disk, say: it is said, and the job ends all the same.
            self.record(lost)

    def _end(self, lost: Lost | None, *, claimed: bool, status: int = STATUS) -> None:
        """End this process, with the message and its record if they are this rank's to make."""
        if lost is not None and claimed:
            remedy = self._what_to_do()
            remedy = f"; {remedy}" if remedy else ""
            print(f"error: {one_line(lost.message)}{remedy}", file=sys.stderr, flush=True)
            recording = threading.Thread(target=self._record, args=(lost,), daemon=True)
            recording.start()
            with suppress(dist.DistError, RuntimeError):
                self._ranks.store.set("failed", lost.message)
                # The store may be this process' own: who reads it should have the time.
                time.sleep(2 * BEAT_SECONDS if self._ranks.world_size > 1 else 0)
            recording.join(RECORD_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        self._leave(status)


def _is_of_others(error: BaseException) -> bool:
    """Whether an error is no more than the sign that another rank is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text or "Connection closed" in text)
    )


def _lives(process: int) -> bool:
    """Whether a process of this machine is there, and no zombie."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            state: Any = file.read().rpartition(b")")[2].split()[:1]
        return state != [b"Z"]
    except FileNotFoundError:
        # A system without /proc tells less, but as surely that a process is gone.
        if os.path.isdir("/proc/self"):
            return False
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        return True
    except OSError:
        return True

"""Commands as one of several processes that torchrun started: one voice, one end. No torch before it is needed."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from dig.commands.common import explain, one_device
from dig.launched import follows, place_in_job

if TYPE_CHECKING:
    from dig.sampling.sharing import Sharing
    from dig.training.parallel import Kind, Ranks, Sending
    from dig.training.parallel.watching import Watch

ParallelOption = Annotated[
    str,
    typer.Option(
        help="Under torchrun: ddp (each GPU holds the model), fsdp (the GPUs share weights, gradients and moments), or "
        "auto: ddp where there are several processes."
    ),
]
SendingOption = Annotated[
    str,
    typer.Option(
        help="How several processes send gradients and weights: collectives (NCCL, or gloo on a CPU), copies (by the "
        "GPUs' copy engines, within one host), or auto: copies where they can."
    ),
]
HangOption = Annotated[
    float, typer.Option(help="Seconds that several processes may stand still before that is an error.")
]
HANG_SECONDS = 600.0
MOST_SECONDS = 30 * 24 * 3600
LONG_SECONDS = 3600.0
"""The same where a process works alone for longer: sampling and encoding."""
END_SECONDS = 8.0
"""After SIGTERM, for another rank's end to be noticed: torchrun sends it to those that are left."""
PARTING_SECONDS = 60.0
"""For PyTorch to take its process groups down, once a command is done."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Several processes at one command, of which this is one.

    Attributes:
        ranks: All of them.
        kind: How they share a model in training.
        sending: How they send: see `dig.training.parallel.wrap`.
        watch: Ends this process where another one is gone or hangs.
    """

    ranks: Ranks
    kind: Kind
    sending: Sending
    watch: Watch


def shared(job: Job | None) -> Sharing:
    """What of a command's work is this process': all of it where it is alone."""
    from dig.sampling.sharing import ALONE

    if job is None:
        return ALONE
    from dig.training.parallel.sharing import SharedWork

    return SharedWork(job.ranks, job.watch)


@contextmanager
def working_together(
    device: str,
    *,
    parallel: str = "auto",
    sending: str = "collectives",
    hang_seconds: float = LONG_SECONDS,
    trains: bool = False,
) -> Iterator[Job | None]:
    """Be one of the job's processes within; None where this process is alone.

    An error within ends the whole job with one message (`dig.training.parallel.watching`).

    Args:
        device: As typed.
        parallel: Likewise; ``ddp`` and ``fsdp`` make a job of one process alone, too.
        sending: Likewise.
        hang_seconds: Likewise.
        trains: Whether gradients are exchanged, over NCCL.

    Raises:
        ValueError: An option or the environment says what can't be.
    """
    if parallel not in ("auto", "ddp", "fsdp"):
        raise ValueError(f"parallel must be auto, ddp or fsdp; got {parallel!r}")
    if sending not in ("auto", "collectives", "copies"):
        raise ValueError(f"sending must be auto, collectives or copies; got {sending!r}")
    if not 1 <= hang_seconds <= MOST_SECONDS:
        raise ValueError(f"--hang-timeout must be 1 to {MOST_SECONDS:,} seconds; got {hang_seconds}")
    if parallel == "auto" and place_in_job()[1] == 1:
        yield None
        return
    # Before torch is imported: what is to be said of a lost connection is said here, without a stack of C++ calls.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dig.training.parallel import joined
    from dig.training.parallel.watching import Watch

    with (
        _logged_once(),
        _parting() as parts,
        joined(one_device(device), hang_seconds=hang_seconds, trains=trains) as ranks,
        parts(),
    ):
        watch = Watch(ranks)
        kind = cast(Literal["ddp", "fsdp"], "ddp" if parallel == "auto" else parallel)
        with _patient(watch):
            try:
                yield Job(ranks=ranks, kind=kind, sending=cast(Any, sending), watch=watch)
                watch.doing("waiting for the others to end", waits=True)
                ranks.meet()
            except (typer.Exit, SystemExit, GeneratorExit):
                raise
            except KeyboardInterrupt:
                watch.stop(130)
            except BaseException as error:
                watch.fail(error, explain(error))
            watch.leave()


@contextmanager
def _logged_once() -> Iterator[None]:
    """Within, what each rank would log is logged by the first; what one alone knows, of its own data, it logs."""
    levels = {"dig": logging.ERROR, "dig.training.data": logging.WARNING} if follows() else {}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _parting() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """End this process where the groups that were made within don't end: nothing watches it any more, and all is done.

    Gives what is to be entered once they are there, and tells how the command went.
    """
    timers: list[threading.Timer] = []

    @contextmanager
    def parts() -> Iterator[None]:
        status = 1
        try:
            yield
            status = 0
        except typer.Exit as stopped:
            status = stopped.exit_code
            raise
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
            raise
        finally:
            timer = threading.Timer(PARTING_SECONDS, _part, (status,))
            timer.daemon = True
            timer.start()
            timers.append(timer)

    try:
        yield parts
    finally:
        for timer in timers:
            timer.cancel()


def _part(status: int) -> None:
    done = ". What this command did is done and saved" if status == 0 else ""
    typer.echo(
        f"PyTorch has not taken its process groups down in {PARTING_SECONDS:g} s; the process ends without it, with "
        f"status {status}{done}",
        err=True,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def _patient(watch: Watch) -> Iterator[None]:
    """At SIGTERM, let the watch see first whether another rank is gone: then that is what there is to say."""
    timers: list[threading.Timer] = []

    def receive(_number: int, _frame: object) -> None:
        timer = threading.Timer(END_SECONDS, watch.stopped, (128 + signal.SIGTERM,))
        timer.daemon = True
        timer.start()
        timers.append(timer)

    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for timer in timers:
            timer.cancel()

"""A process of its own for what may crash, hang or fill the memory: started, asked, ended with all of its children.

No torch here; it is in the server that processes fork from.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

from bench.run.lifeline import die_with_parent, end_group, end_with_parent, give_way, scratch_folder
from dig.environment import COMPILES_VARIABLE, HARNESS_VARIABLE


class WorkerError(RuntimeError):
    """A worker process gave no answer; ``status`` is what its row says."""

    def __init__(self, status: Any, message: str) -> None:
        super().__init__(message)
        self.status = status


def expect_compiling() -> None:
    """Let the server import what a first ``torch.compile`` does, seconds of each compiled case; before any worker."""
    os.environ[COMPILES_VARIABLE] = "1"


def _context() -> ForkServerContext | SpawnContext:
    """Worker processes fork from a server that has imported torch once, and never touched CUDA."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.run.preload"])
    os.environ[HARNESS_VARIABLE] = str(os.getpid())
    _start_server()
    return context


QUIET_TRACKER = "ignore:resource_tracker:UserWarning"
"""Of what compilers' processes leave that are ended with their worker, it removes all, and would warn of it."""


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """What is started within has this environment variable."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _start_server() -> None:
    """Start the server unless it runs; Ctrl-C, which a terminal sends to it too, is blocked from its first instruction.

    `bench.run.preload` has it ignored from then on, by all that is forked from the server too.
    """
    # The server's start asks for it, and its own start unblocks SIGINT here.
    with _variable("PYTHONWARNINGS", QUIET_TRACKER):
        resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class Worker:
    """A process that runs one function. A context manager: leaving it ends the process.

    Args:
        entry: ``module:function``, imported in the process; it is called with its end of a connection, then
            ``arguments``.
        *arguments: For the function.
        variables: Environment variables that the process is given before it imports anything more.
    """

    def __init__(self, entry: str, *arguments: Any, variables: Mapping[str, str] | None = None) -> None:
        # With what the process prints to stderr, for the message of a crash.
        self._folder = tempfile.TemporaryDirectory(dir=scratch_folder())
        self._errors = Path(self._folder.name) / "stderr"
        self._errors.touch()
        context = _context()
        self._connection, theirs = context.Pipe()
        target: Callable[..., None] = _enter
        given = (theirs, str(self._errors), entry, arguments, dict(variables or {}))
        self._process = context.Process(target=target, args=given, daemon=False)
        try:
            self._process.start()
            _living.add(self)
        except BaseException:
            self._connection.close()
            self._folder.cleanup()
            raise
        finally:
            theirs.close()

    def tell(self, word: Any) -> None:
        """Send the function something. Raises WorkerError where the process is gone."""
        try:
            self._connection.send(word)
        except OSError:
            raise self._death() from None

    def answer(self, time_limit: float, *, since: float | None = None, doing: str = "") -> Any:
        """The next thing that the function sends.

        Args:
            time_limit: Seconds to wait.
            since: From when they count, by `time.monotonic`; from now on without.
            doing: What the function is at, in words, for the message of a limit that is reached.

        Raises:
            WorkerError: Time ran out, and the process is to be ended; or it died: the message holds the end of its
                stderr.
        """
        waited = 0.0 if since is None else time.monotonic() - since
        if not self._connection.poll(max(0.0, time_limit - waited)):
            of = f" of {doing}" if doing else ""
            raise WorkerError("timeout", f"no result after {time_limit:g} s{of}; the process was killed")
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise self._death() from None

    def answered(self) -> bool:
        """Whether there is something to read, or the process is gone; at once."""
        return self._connection.poll(0)

    def status(self) -> str:
        """The answer of a job that answers with a word; ``error`` of a process that is gone."""
        try:
            return str(self.answer(0)[1])
        except WorkerError as error:
            return str(error.status)

    def _death(self) -> WorkerError:
        self._process.join()
        return WorkerError("error", _post_mortem(self._process.exitcode, _tail(self._errors)))

    def kill(self) -> None:
        """Kill the process with its children and wait for nothing; whoever waits for its answer is told of its death.

        From another thread than the one that waits.
        """
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the process with its children, so that their memory is free, and wait until they are gone."""
        _living.discard(self)
        end_group(self._process)
        self._connection.close()
        self._folder.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()


_living: set[Worker] = set()


def kill_workers() -> None:
    """Kill every worker of this process that has not ended (`Worker.kill`)."""
    for worker in tuple(_living):
        worker.kill()


def _enter(
    connection: Connection, errors: str, entry: str, arguments: tuple[Any, ...], variables: dict[str, str]
) -> None:
    """Where the process begins."""
    os.environ.update(variables)  # CUDA reads its own when it starts, which is later; nothing before has started it.
    end_with_parent()  # In a group of its own, which a time limit ends too.
    die_with_parent()
    give_way()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the harness's to handle; the server has it ignored before.
    try:
        with open(errors, "ab", buffering=0) as stderr:
            os.dup2(stderr.fileno(), 2)
    except FileNotFoundError:
        return  # The harness was interrupted while this process started, and has removed the folder: nobody waits.
    module, _, name = entry.partition(":")
    getattr(importlib.import_module(module), name)(connection, *arguments)


def _tail(path: Path, characters: int = 600) -> str:
    return path.read_text(errors="replace").strip()[-characters:]


def _post_mortem(exit_code: int | None, stderr: str) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = " (most often: the host ran out of memory)" if -exit_code == signal.SIGKILL else ""
        return f"the process was ended by {name}{hint}; {stderr or 'it printed nothing'}"
    return f"the process ended with status {exit_code}; {stderr or 'it printed nothing'}"

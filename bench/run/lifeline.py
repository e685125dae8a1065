"""Processes that do not outlive the harness, and temporary folders that its next start removes. No torch here.

A harness may be killed: SIGKILL, a host out of memory, a closed terminal. What it started must end with it: a worker
that went on would run beside the next run's.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import shutil
import signal
import stat
import tempfile
from functools import cache
from multiprocessing import util
from multiprocessing.process import BaseProcess
from pathlib import Path

PREFIX = "dig-scratch-"
_ELSEWHERE = "elsewhere"
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """In a process of multiprocessing: have the kernel kill its process group once whoever started it is gone.

    The process becomes the leader of a group of its own, in which its children are too. The kernel sends the signal
    itself, when the pipe closes whose other end only the starter holds: a thread that is deep in a product cannot put
    it off. (The signal for a dead parent says nothing here, for a worker's parent is the server that forked it.)
    """
    os.setsid()
    parent = multiprocessing.parent_process()
    set_signal = getattr(fcntl, "F_SETSIG", None)
    if parent is None or set_signal is None:
        return  # Not Linux: the harness's own clean-up is all there is.
    pipe = parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(pipe, set_signal, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if not parent.is_alive():  # It was gone before: no signal will come.
        os.killpg(os.getpgrp(), signal.SIGKILL)


def end_group(process: BaseProcess) -> None:
    """Kill a process that leads its group (`end_with_parent`) with all that it started, and wait until it is gone."""
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux for this signal when the process that forked this one is gone; 0: for none any more."""
    with contextlib.suppress(OSError, AttributeError):  # Not Linux.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def give_way() -> None:
    """Have a host that runs out of memory end this process, and nobody else's."""
    with contextlib.suppress(OSError):  # Not Linux.
        Path("/proc/self/oom_score_adj").write_text("1000")


@cache
def scratch_folder() -> Path:
    """This process' temporary folder, removed when it ends; those that killed processes left are removed now."""
    _remove_leftovers()
    made = Path(tempfile.mkdtemp(prefix="dig-new-"))
    # The lock ends with the process, whatever ends that. The name comes last, so that nobody finds it unlocked.
    fcntl.flock(os.open(made, os.O_RDONLY), fcntl.LOCK_EX)
    # Where multiprocessing keeps its sockets; it removes that itself, if it can.
    (made / _ELSEWHERE).symlink_to(util.get_temp_dir())
    folder = made.rename(made.with_name(made.name.replace("dig-new-", PREFIX)))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _remove_leftovers() -> None:
    """Remove this user's scratch folders that no process holds the lock of."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree((folder / _ELSEWHERE).resolve(), ignore_errors=True)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)

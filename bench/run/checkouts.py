"""The two sides of a comparison as folders: the working tree as it is, and its base. No torch here.

Both are copies, so that editing the tree while it is measured changes nothing. Both are measured by the change's
harness: the base's copy gets the change's ``bench``, and keeps what describes its models, which is in ``dig`` and
``baselines``. What differs between the sides is then what they compute, never how it is timed.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

MEASURED = ("dig", "baselines")
DECLARATION = "pyproject.toml"
"""Says which modules declare models (`dig.discovery`): each side keeps its own."""
REGISTRY = Path("dig", "family.py")
"""What the harness asks of a side's models; a base from before it has none."""


class CheckoutError(ValueError):
    """A side cannot be put together; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """A folder with ``dig``, ``baselines`` and ``bench``, and the name of what is in it (``<commit>`` or such)."""

    root: Path
    name: str


def _git(root: Path, *arguments: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True, timeout=60).stdout
    except FileNotFoundError:
        raise CheckoutError("git is not installed; give the base as a folder") from None
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        raise CheckoutError(said.splitlines()[-1] if said else str(error)) from None


def _copy_sources(source: Path, target: Path, folder: str) -> None:
    if not (source / folder).is_dir():
        raise CheckoutError(f"{source} has no folder {folder}; it is not a checkout of this project")
    shutil.copytree(source / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def _copy_declaration(source: Path, target: Path) -> None:
    try:
        shutil.copy(source / DECLARATION, target / DECLARATION)
    except OSError as error:
        raise CheckoutError(
            f"{source} has no {DECLARATION} ({error.strerror}); give a checkout of the project"
        ) from None


def copy_tree(source: Path, target: Path, name: str) -> Checkout:
    """Copy a tree's sources, uncommitted changes and untracked files included."""
    for folder in (*MEASURED, "bench"):
        _copy_sources(source, target, folder)
    _copy_declaration(source, target)
    return Checkout(root=target, name=name)


def check_out_base(repository: Path, base: str, target: Path) -> Checkout:
    """The base's sources, measured by the repository's own harness.

    Args:
        repository: The change's tree.
        base: A revision, or a folder that holds another checkout.
        target: A folder that does not exist yet.

    Raises:
        CheckoutError: No such revision, or not a checkout of this project.
    """
    if Path(base).is_dir():
        name = base
        for folder in MEASURED:
            _copy_sources(Path(base), target, folder)
        _copy_declaration(Path(base), target)
    else:
        try:
            # --end-of-options: a branch whose name begins with a dash is no option.
            name = _git(repository, "rev-parse", "--verify", "--end-of-options", f"{base}^{{commit}}").decode().strip()
        except CheckoutError as error:
            raise CheckoutError(f"--base {base!r} is neither a revision nor a folder here ({error})") from None
        content = _git(repository, "archive", "--format=tar", name, *MEASURED, DECLARATION)
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            # Python 3.11.3 and older know no filter. The archive is git's, of this repository.
            if hasattr(tarfile, "data_filter"):
                archive.extractall(target, filter="data")
            else:
                archive.extractall(target)
    if not (target / REGISTRY).is_file():
        raise CheckoutError(
            f"--base {base} is older than {REGISTRY.as_posix()}, which this harness asks for models; measure both with "
            "their own (python -m bench run --launches 6 in each checkout), then python -m bench compare"
        )
    _copy_sources(repository, target, "bench")
    return Checkout(root=target, name=name)


def describe_tree(repository: Path) -> str:
    """The change's name: its commit, ``-dirty`` where the tree differs from it; ``working tree`` without git."""
    try:
        commit = _git(repository, "rev-parse", "HEAD").decode().strip()
        changed = _git(repository, "status", "--porcelain", "--", "*.py")
    except CheckoutError:
        return "working tree"
    return f"{commit}-dirty" if changed else commit


SLOWED = """

def _slow_down(call, milliseconds, megahertz):
    import time

    def slowed(self, x, *rest, **named):
        if x.is_cuda:
            torch.cuda._sleep(int(milliseconds * megahertz * 1000))
        else:
            end = time.perf_counter() + milliseconds / 1000
            while time.perf_counter() < end:
                pass
        return call(self, x, *rest, **named)

    return slowed


Backbone.__call__ = _slow_down(Backbone.__call__, {milliseconds!r}, {megahertz!r})
"""
"""Appended to a copy's ``dig/layers.py``: on a GPU, one more kernel in every forward pass, which spins."""


def slow_down(checkout: Checkout, *, milliseconds: float, megahertz: float) -> Checkout:
    """Change a copy's model code so that every forward pass takes longer: what the regression gate must notice.

    Args:
        checkout: A copy made for this.
        milliseconds: To add to a forward pass.
        megahertz: The GPU's SM clock, which its spinning is counted in; without meaning on a CPU.
    """
    path = checkout.root / "dig" / "layers.py"
    path.write_text(path.read_text() + SLOWED.format(milliseconds=float(milliseconds), megahertz=float(megahertz)))
    return Checkout(root=checkout.root, name=f"{checkout.name} slowed by {milliseconds:.3g} ms")

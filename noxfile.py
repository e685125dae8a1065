"""Everything that is run on this project, by name: ``nox -l`` lists it, ``nox -s NAME -- OPTIONS`` runs it."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True

CPU_TORCH = "torch==2.13.0"
"""What CPU sessions test with, so that they all test the same."""
GROUPS = nox.project.load_toml("pyproject.toml")["dependency-groups"]
SKIP_BUILDS = "DIG_SKIP_BUILDS"
HAS_GPU = shutil.which("nvidia-smi") is not None


def install(session: nox.Session, *groups: str, extras: str = "", gpu: bool = False) -> None:
    """Install the project, editable, with extras and dependency groups; torch first, so that nothing else picks it."""
    if gpu:
        session.install("torch>=2.11", "wheel", "packaging", "ninja", "setuptools>=77")
    else:
        session.install(CPU_TORCH)
    session.install(
        "-e", f".[{extras}]" if extras else ".", *(requirement for group in groups for requirement in GROUPS[group])
    )


def install_peers(session: nox.Session) -> None:
    """Install the gpu extras, package by package: one that does not build costs its model, not the run."""
    extras = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
    built = sorted(extras["gpu-built"])  # causal-conv1d before mamba-ssm, which uses it
    if os.environ.get(SKIP_BUILDS):
        session.log(f"{SKIP_BUILDS} is set: {', '.join(built)} are left out, and their models will be unsupported")
        built = []
    for requirement in [*extras["gpu"], *built]:
        if requirement in built:
            session.log(
                f"{requirement}: where there is no wheel, it compiles for minutes; {SKIP_BUILDS}=1 leaves it out"
            )
        try:
            session.install("--no-build-isolation", requirement)
        except nox.command.CommandFailed:
            session.warn(f"{requirement} could not be installed: its models will be reported as unsupported")


def may_install(session: nox.Session) -> bool:
    """Say whether the session has an environment of its own; with --no-venv it uses what is there."""
    return not isinstance(session.virtualenv, nox.virtualenv.PassthroughEnv)


def in_parallel(beyond: int = 0) -> tuple[str, ...]:
    """The options of pytest that share tests out among processes: one a core, and so many beyond."""
    cores = max(1, min(4, os.cpu_count() or 1))
    return "-n", str(cores + beyond), "--dist", "worksteal"


def without_pin(requirement: str) -> str:
    """A requirement that takes any version where it asked for one; its marker stays."""
    return re.sub(r"^([\w.-]+)==[^;]*", r"\1", requirement)


STOPPED = 130
"""Exit status of a run that Ctrl-C or SIGTERM stopped."""
PATIENCE = 20.0
"""Seconds for a command that was stopped to end by itself; nox's third of one would cost it what it is writing."""


def status_of(session: nox.Session, *command: str) -> int:
    """Run a command to its end and return its exit status; one that was stopped has written what it had first."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    # Else SIGTERM would end nox alone, and leave the command running.
    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        session.run(*command, interrupt_timeout=PATIENCE, terminate_timeout=PATIENCE)
    except nox.command.CommandFailed as error:
        found = re.search(r"-?\d+", str(error))
        code = int(found.group()) if found else 1
        return code if code >= 0 else 128 - code  # A signal's number, as shells say it.
    except KeyboardInterrupt:
        return STOPPED
    finally:
        signal.signal(signal.SIGTERM, former)
    return 0


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format of every file."""
    if may_install(session):
        session.install(*GROUPS["lint"])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    if may_install(session):
        install(session, "types", "test", extras="train")
    session.run("mypy")


def run_tests(session: nox.Session, *chosen: str, beyond: int = 0) -> None:
    """Run tests side by side, those chosen or those that the command line names."""
    # Without bytecode on the disk every process would compile the tests anew, with pytest's rewriting of assertions.
    env = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": None}
    session.run("pytest", *in_parallel(beyond), *(session.posargs or chosen), env=env)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests that need no GPU, but for the slow ones: with options, whatever those choose."""
    if may_install(session):
        install(session, "test", extras="train,lora")
    run_tests(session, "-m", "not slow")


@nox.session
def tests_slow(session: nox.Session) -> None:
    """Run the slow tests: real processes, killed and gone on with; and those on drawn inputs, with more of them."""
    if may_install(session):
        install(session, "test", extras="train")
    # Half of their time they wait for processes of their own.
    run_tests(session, "-m", "(slow or hypothesis) and not tables", "--hypothesis-profile", "many", beyond=1)


@nox.session
def tests_tables(session: nox.Session) -> None:
    """Compile every kernel at every tile choice of every architecture, without a GPU: after a change of a table."""
    if may_install(session):
        install(session, "test", extras="train")
    run_tests(session, "-m", "tables")


@nox.session
def tests_newest(session: nox.Session) -> None:
    """Run the tests that need no GPU on the newest torch, Triton and tools that pip finds, which are gigabytes."""
    if may_install(session):
        project = nox.project.load_toml("pyproject.toml")["project"]
        wanted = [*project["dependencies"], *project["optional-dependencies"]["train"], *GROUPS["test"]]
        session.install("--upgrade", "--upgrade-strategy", "eager", *(without_pin(each) for each in wanted))
        session.install("--no-deps", "-e", ".")
    session.run("python", "-m", "pip", "list")
    run_tests(session)


@nox.session
def tests_oldest(session: nox.Session) -> None:
    """Run the tests that need no GPU on the oldest torch that the project takes, which is gigabytes."""
    if may_install(session):
        dependencies = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
        (oldest,) = (each.replace(">=", "==") + ".*" for each in dependencies if each.startswith("torch>="))
        session.install(oldest)
        session.install("-e", ".[train,lora]", *GROUPS["test"])
    session.run("python", "-m", "pip", "list")
    run_tests(session)


@nox.session
def tests_gpu(session: nox.Session) -> None:
    """Run the tests that need a GPU: kernels and peers against the references, the harness on the device."""
    if may_install(session):
        install(session, "test", extras="train", gpu=True)
        install_peers(session)
    session.run("python", "-m", "pytest", "-m", "gpu", *session.posargs)
    if not session.posargs:
        # Those of the kernels run in both places: here compiled, and with larger shapes.
        cores = str(max(1, min(12, os.cpu_count() or 1)))
        session.run("python", "-m", "pytest", "-m", "not gpu", "tests/ops", "-n", cores)


@nox.session
def memcheck(session: nox.Session) -> None:
    """Run the operations' tests under compute-sanitizer's memcheck on a GPU; needs the CUDA toolkit. Exit 1: an error.

    Every tensor has an allocation of its own, so that reading past one is reading past an allocation; that leaves out
    CUDA graphs, whose memory must not go back, and torch.compile, which brings kernels of its own.
    """
    if may_install(session):
        install(session, "test", extras="train", gpu=True)
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "1")
    chosen = session.posargs or ["tests/ops", "-q"]
    session.run(
        *(*sanitizer, "python", "-m", "pytest", "-k", "not graph", "-p", "no:cacheprovider", *chosen),
        env={"DIG_SMALL_SHAPES": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        external=True,
    )


@nox.session
def bench(session: nox.Session) -> None:
    """Measure this machine and draw the paper's plots: both figures, or what the options of bench run choose.

    It goes on where it was (--no-resume: all anew). A run that is stopped is drawn too, and ends with its status.
    """
    if may_install(session):
        install(session, gpu=HAS_GPU)
        if HAS_GPU:
            install_peers(session)
    if any(word == "--out" or word.startswith("--out=") for word in session.posargs):
        session.error("nox -s bench writes into out/; for another place call python -m bench run and python -m reports")
    results = Path("out/results.jsonl")
    chosen = session.posargs or ["--suite", "auto"]
    status = status_of(session, "python", "-m", "bench", "run", "--out", str(results), "--resume", *chosen)
    # Of a run that was stopped, or failed half-way, what is there is drawn; the session ends as the run did.
    if results.is_file() and results.stat().st_size:
        drawn = status_of(session, "python", "-m", "reports", str(results), "--out", str(results.parent / "report"))
        status = status or drawn
    if status:
        raise SystemExit(status)


@nox.session
def scaling(session: nox.Session) -> None:
    """Train one model on 1, 2, 4 GPUs and more, as many as there are, and print what each gives: -- --gpus 0,1.

    It goes on where it was, in out/scaling.jsonl.
    """
    if may_install(session):
        install(session, gpu=HAS_GPU)
    results = "out/scaling.jsonl"
    status = status_of(session, "python", "-m", "bench", "scaling", "--out", results, "--resume", *session.posargs)
    if status not in (2, STOPPED):
        published = [f"results/h100/{name}.jsonl" for name in ("rows", "extra", "best")]
        session.run("python", "-m", "reports.scaling", *published, results)
    if status:
        raise SystemExit(status)


@nox.session
def bench_ops(session: nox.Session) -> None:
    """Time the recurrence, adaptive norm, SwiGLU and SREM alone on a GPU, beside references, peers and a copy's rate.

    ``python -m bench ops compare`` times these and the other operations, each against a base.
    """
    if may_install(session):
        install(session, "test", gpu=True)
        install_peers(session)
    options = session.posargs or ["--benchmark-json", "out/ops.json", "--benchmark-columns", "median,iqr,rounds"]
    Path("out").mkdir(exist_ok=True)
    session.run("python", "-m", "pytest", "bench/ops/suite.py", "--benchmark-only", *options)


@nox.session
def profile(session: nox.Session) -> None:
    """Profile one step into out/profile (page, Chrome trace, every figure): -- --model DiG-S/2:triton --mode train."""
    if may_install(session):
        install(session, gpu=HAS_GPU)
        if HAS_GPU:
            install_peers(session)
    session.run("python", "-m", "bench", "profile", *(session.posargs or ["--model", "DiG-S/2"]))


@nox.session
def regression(session: nox.Session) -> None:
    """Measure the working tree against --base REVISION, in turns: exits 0 (no regression), 1 (one) or 3 (undecided)."""
    if may_install(session):
        install(session, gpu=HAS_GPU)
        if HAS_GPU:
            install_peers(session)
    # Its exit status says more than success or failure.
    if status := status_of(session, "python", "-m", "bench", "regression", *session.posargs):
        raise SystemExit(status)


@nox.session
def report(session: nox.Session) -> None:
    """Draw the published rows, hold every claim against them, and make out/published/index.html.

    With options it is ``python -m reports`` with these alone.
    """
    if may_install(session):
        install(session, extras="report")
    options = session.posargs or ["results/h100/rows.jsonl", "--out", "results/h100"]
    session.run("python", "-m", "reports", *options)
    if not session.posargs:
        session.run("python", "-m", "reports.claims", "--out", "results")
        claims = ("--claims", "results/claims.json")
        session.run("python", "-m", "reports.page", "results/h100", "results/h200", *claims, "--out", "out/published")

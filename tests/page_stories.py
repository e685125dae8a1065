"""How each command of the pages is run in small: beside which others, on which files, and with what put in its place.

A new command needs no entry here where its block is in a story already. See ``tests/test_commands.py``.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from dig.environment import ROOT
from tests.dig.parallel_job import free_port
from tests.dig.tiny import TINY, TINY_DIT, make_class_folders, make_fashion, make_vae, using
from tests.page_commands import kind, split

ELSEWHERE = {
    "pip install nox": ".github/workflows/ci.yml",
    "pip install torch": "noxfile.py::tests",
    "pip install -e '.[train]'": "noxfile.py::tests",
    "pip install -e '.[lora]'": "noxfile.py::tests",
    'pip install "torch>=2.11" wheel packaging ninja setuptools': "noxfile.py::tests_gpu",
    "pip install -e '.[gpu]'": "noxfile.py::tests_gpu",
    "pip install --no-build-isolation -e '.[gpu-built]'": "noxfile.py::tests_gpu",
    "nox -s bench": ".github/workflows/ci.yml",
    "nox -s lint types": ".github/workflows/ci.yml",
    "nox -s tests": ".github/workflows/ci.yml",
    "nox -s tests_slow": ".github/workflows/ci.yml",
    "nox -s tests tests_slow": ".github/workflows/ci.yml",
    "nox -s tests_tables": ".github/workflows/ci.yml",
    "nox -s tests_newest": ".github/workflows/versions.yml",
    "nox -s tests_oldest": ".github/workflows/versions.yml",
    "nox -s tests_gpu": ".github/workflows/gpu.yml",
    "nox -s regression": ".github/workflows/regression.yml",
    "bash examples/first-hour.sh out/hour": "tests/test_first_hour.py::test_the_first_hour",
    "bash examples/follow.sh fashion-mnist out/follow": "tests/reports/test_report_follow.py::test_the_script",
    "bash examples/fashion.sh fashion-mnist out/fashion": (
        "tests/reports/test_report_fashion.py::test_the_script_goes_on_from_its_report"
    ),
    "python -m reports.fashion out/fashion/report": (
        "tests/reports/test_report_fashion.py::test_the_script_goes_on_from_its_report"
    ),
    "python examples/ablation.py fashion-mnist out/ablation --steps 800": (
        "tests/reports/test_report_ablation.py::test_the_script_makes_what_is_missing"
    ),
    "python -m reports.ablation out/ablation/ablation.jsonl --out out/ablation": (
        "tests/reports/test_report_ablation.py::test_the_command_writes_its_files_or_says_one_line"
    ),
    "python -m bench run --models DiG,my_package.conv:ConvNet --resolutions 64,128 --device cpu --out out/mine.jsonl": (
        "tests/test_extending.py::test_the_example_is_measured_beside_dig_and_drawn"
    ),
}
"""Commands as printed, and who runs them: a test, a session of noxfile.py, or a workflow, which calls nox."""

IN_SENTENCES = {
    "bench kernels": "tests/bench/test_cli.py::test_kernels_of_a_step",
    "bench first-step": "tests/bench/test_first_step.py::test_it_says_what_the_steps_take",
    "bench coverage": "tests/bench/test_coverage.py::test_the_command_prints_a_line_for_each_and_refuses_too_few",
    "bench ops registers": "tests/bench/test_ops_registers.py::test_each_kernel_may_run",
    "nox -s scaling": "tests/test_noxfile.py::test_scaling_prints_what_each_number_of_gpus_gave",
    "reports.follow": "tests/reports/test_report_follow.py::test_the_script",
}
"""Commands that no block has, only sentences and tables, by what they start; and who runs them."""

IN_SENTENCES_GPU = (
    "python -m bench ops gla",
    "python -m bench ops rowwise",
    "python -m bench ops srem",
    "python -m bench ops products",
    "python -m bench ops prepare",
    "python -m bench ops variants --set dig.config.EPS=0.5",
    "python -m bench ops shapes",
)
"""Such as need a GPU; docs/extending.md says so of them."""

TRAIN = "--steps 2 --batch 4 --workers 0 --save-every 1 --log-every 1"
JUDGED = "--launches 5 --least-effect 50% --seconds 1"
SMALL = {
    "dig train": f"{TRAIN} --device cpu",
    "dig train --resume run": "--device cpu",
    "dig train --resume run --steps": "--device cpu --steps 3",
    "dig train --config": "--device cpu",
    "dig sample": "--steps 2 --samples 4 --device cpu",
    "dig encode": "--device cpu",
    "dig evaluate": "--device cpu",
    "dig evaluate --checkpoint": "--steps 2 --device cpu",
    "dig classifier": "--epochs 1 --batch 20 --device cpu",
    "torchrun dig train": f"{TRAIN} --hang-timeout 60 --device cpu",
    "torchrun dig sample": "--steps 2 --samples 4 --device cpu",
    "torchrun dig encode": "--device cpu",
    "bench run": "--device cpu",
    "bench run --launches": "--launches 2 --resolutions 64 --patch 8 --modes forward --device cpu",
    "bench scaling": "--patch 8 --resolution 64 --parallel ddp --device cpu",
    "bench regression": f"{JUDGED} --device cpu",
    "bench ops compare": f"{JUDGED} --model DiG-S/8 --resolution 64 --mode forward --device cpu",
    "nox -s bench": "--models DiG --resolutions 64 --modes forward --device cpu",
    "nox -s regression": f"{JUDGED} --case DiT-S/8@64:forward --device cpu",
}
"""What is appended, by what a command starts, or by how it begins (the longest counts).

Of an option given twice the last one counts.
"""

STATUSES = {"bench compare": (0, 1, 3), "bench regression": (0, 1, 3), "bench ops compare": (0, 1, 3)}
STATUSES["nox -s regression"] = STATUSES["bench regression"]
"""Exit statuses that are no failure, of what judges: two measurements here are far apart or not, as it comes."""

OUTPUTS = ("--out", "--npz", "--grid", "--append")
"""Options whose file or folder a command has to write."""

LIMIT = 300
"""Seconds that a command of a shell may take."""


@dataclass(frozen=True)
class Story:
    """Blocks whose commands run one after the other in one folder, so that files of one feed the next."""

    blocks: tuple[str, ...]
    given: tuple[Callable[[Path], object], ...] = ()
    """What the reader has before the first of them."""
    instead: dict[str, str] = field(default_factory=dict)
    """Parts of a command's text that others stand for."""
    processes: bool = False
    """Whether a shell runs the commands, in a copy of the project; else they run in this process, with tiny models."""


def fashion(folder: Path) -> None:
    make_fashion(folder / "fashion-mnist", train=60, test=20)


def others(folder: Path) -> None:
    make_fashion(folder / "others", train=20, test=10)


def images(folder: Path) -> None:
    make_class_folders(folder / "images" / "train", (*"abcdefghi", "golden retriever"), each=2)


def vae(folder: Path) -> None:
    """Under the hub's name a folder of this name, which is taken before the hub is asked."""
    make_vae(folder / "stabilityai" / "sd-vae-ft-ema", halvings=3)


def latents(folder: Path) -> None:
    give_by("python -m dig encode images/train --out latents --vae stabilityai/sd-vae-ft-ema", folder)


def run_of_a_dit(folder: Path) -> None:
    latents(folder)
    give_by("python -m dig train --model DiT-S/2 --data latents --out run", folder)


def classifier(folder: Path) -> None:
    give_by("python -m dig classifier --data images/train --image-size 64 --out classifier.safetensors", folder)


def published(folder: Path) -> None:
    """A DiT of ImageNet's classes, as Meta's file and as diffusers' folder under the hub's name."""
    (folder / "facebook").mkdir()
    torch.manual_seed(0)
    model = TINY_DIT.build("XL", input_size=(32, 32), in_channels=4, patch_size=2, num_classes=1000)
    torch.save(model.state_dict(), folder / "DiT-XL-2-256x256.pt")
    words = "--data latents --out published --init DiT-XL-2-256x256.pt --model DiT-XL/2"
    give_by(f"python -m dig train {words}", folder)
    to = "--out facebook/DiT-XL-2-256 --format diffusers --vae stabilityai/sd-vae-ft-ema"
    give_by(f"python -m dig export published {to}", folder)


def results(folder: Path) -> None:
    if not (folder / "results").exists():
        shutil.copytree(ROOT / "results", folder / "results")


def rows(name: str, *sources: str) -> Callable[[Path], None]:
    """A file of published rows under the name of the reader's."""

    def give(folder: Path) -> None:
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / name).write_bytes(b"".join((ROOT / "results" / source).read_bytes() for source in sources))

    return give


def forget_the_last_checkpoint(folder: Path) -> None:
    """As a kill between the first and the last leaves a run."""
    for path in (folder / "run" / "checkpoints").glob("step-00000002.*"):
        path.unlink()


BEFORE: dict[str, Callable[[Path], object]] = {
    "python -m dig train --resume run": forget_the_last_checkpoint,
    "torchrun --nproc-per-node 8 -m dig encode images/train --out latents --vae stabilityai/sd-vae-ft-ema": (
        lambda folder: shutil.rmtree(folder / "latents")
    ),
}
"""What is undone before a command, so that something is left to do."""

TINY_RANKS = {"--nproc-per-node 8": "--master-port PORT --nproc-per-node 2", "-m dig": "-m tests.dig.tiny"}
STORIES = {
    "README: training": Story(("README.md#training-and-sampling",), (images, classifier)),
    "README: reports": Story(("README.md#measuring",), (rows("mine.jsonl", "h100/rows.jsonl"),)),
    "README: measuring": Story(
        ("README.md#measuring/2",),
        (
            rows("a.jsonl", "cpu/regression/itself-0/base.jsonl", "h100/rows.jsonl"),
            rows("b.jsonl", "cpu/regression/itself-0/change.jsonl"),
        ),
        {" ...": " --models DiG", "nox -s": "nox --no-venv -s"},
        processes=True,
    ),
    "CONTRIBUTING": Story(("CONTRIBUTING.md#set-up",), processes=True),
    "start": Story(
        ("start.md#five-minutes", "start.md#five-minutes/2"), instead={"nox -s": "nox --no-venv -s"}, processes=True
    ),
    "extending": Story(
        ("extending.md#a-backbone-of-your-own-measured-beside-dig",), (rows("mine.jsonl", "h100/rows.jsonl"),)
    ),
    "a run on Fashion-MNIST": Story(
        (
            "training.md#training-sampling-measuring",
            "training.md#from-images-to-samples",
            "training.md#stopping-and-resuming",
            "training.md#fine-tuning",
            "training.md#how-good-samples-are",
            "training.md#how-good-samples-are/2",
        ),
        (fashion, others),
        # Idx files have Fashion-MNIST's names only where their labels are Fashion-MNIST's.
        {"Sneaker": "7", "--samples 10000 --data": "--samples 4 --data"},
    ),
    "a run on latents": Story(("training.md#from-images-to-samples/2",), (images, vae)),
    "weights for others": Story(("training.md#weights-for-others",), (images, vae, run_of_a_dit)),
    "published checkpoints": Story(("training.md#published-checkpoints",), (images, vae, latents, published)),
    "several processes": Story(
        ("training.md#several-gpus",),
        (images, vae, latents),
        # The page's second run has the first one's folder, and would find it finished.
        {**TINY_RANKS, "--parallel fsdp --steps 2": "--parallel fsdp --steps 3"},
        processes=True,
    ),
    "two machines": Story(
        ("training.md#several-gpus/2",),
        (images, vae, latents),
        {**TINY_RANKS, "--nproc-per-node 8": "--nproc-per-node 1", "FIRST_MACHINE:29500": "localhost:PORT"},
        processes=True,
    ),
    "samples a second": Story(
        ("training.md#how-fast-models-sample",), (rows("sampling.jsonl", "h100/sampling.jsonl"),)
    ),
    "fashion and ablation": Story(
        (
            "training.md#do-the-kernels-learn-what-the-reference-learns",
            "training.md#the-runs-on-fashion-mnist",
            "training.md#srem-size-and-tokens-trained-small",
        )
    ),
    "verdicts": Story(("method.md#from-launches-to-a-verdict",), processes=True),
    "the report": Story(
        ("report.md#the-report",),
        (results, rows("results.jsonl", "h100/rows.jsonl")),
        {"nox -s": "nox --no-venv -s"},
        processes=True,
    ),
    "scaling": Story(("scaling.md#measuring-it",), (results,), processes=True),
}


def small(command: str, instead: dict[str, str]) -> str:
    """The command as it is run."""
    what = kind(command)
    text = command
    begun = [key for key in SMALL if key == what or command.removeprefix("python -m ").startswith(f"{key} ")]
    more = SMALL[max(begun, key=len)] if begun and "--help" not in command else ""
    if more:
        text += f" {more}" if not what.startswith("nox") or " -- " in command else f" -- {more}"
    for part, other in instead.items():
        text = text.replace(part, other)
    return text


def run_here(command: str, folder: Path, instead: dict[str, str] | None = None) -> tuple[object, str]:
    """Run ``python -m MODULE ...`` in this process, as Python would; a DiG or DiT of any size is tiny.

    Returns the exit status and what it printed.
    """
    words = split(small(command, instead or {}), folder)
    assert words[:2] == ["python", "-m"], f"a shell has to run {command}: set processes in its story"
    status: object = 0
    said = io.StringIO()
    with contextlib.ExitStack() as around:
        if words[2] == "dig":
            around.enter_context(using(TINY))
            around.enter_context(using(TINY_DIT))
        around.enter_context(contextlib.chdir(folder))
        around.enter_context(contextlib.redirect_stdout(said))
        around.enter_context(contextlib.redirect_stderr(said))
        patch = around.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", words[2:])
        around.enter_context(warnings.catch_warnings())
        # A test may have imported it before.
        warnings.filterwarnings("ignore", r".* found in sys\.modules", RuntimeWarning)
        try:
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            status = ended.code or 0
    return status, said.getvalue()


def check(command: str, status: object, said: str) -> None:
    """A command has to succeed, and to have done something."""
    assert status in STATUSES.get(kind(command), (0,)), f"{command}\nended with status {status}:\n{said[-3000:]}"
    signs = ["is finished already", "nothing to "]
    if "--nnodes" not in command:
        # Of several machines' torchruns the one that the others meet at may be gone when another one takes its leave,
        # which then says so by a traceback, and ends with 0.
        signs.append("Traceback")
    for sign in signs:
        assert sign not in said, f"{command}\n{said[-3000:]}"
    if kind(command) in STATUSES:
        # A verdict on no launch has the same status as one that is not sure.
        assert re.search(r"\| [1-9]\d* \+ [1-9]\d* \|", said), f"{command} compared nothing:\n{said[-3000:]}"


def give_by(command: str, folder: Path) -> None:
    """Make what the reader has by a command that no page need show."""
    check(command, *run_here(command, folder))


def copy_project(folder: Path) -> None:
    """The files that commands need, as a repository whose one commit is the branch main."""
    for name in ("dig", "baselines", "bench", "reports", "tests/dig"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("noxfile.py", "pyproject.toml", "README.md", "tests/__init__.py"):
        shutil.copy(ROOT / name, folder / name)
    who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    for words in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "base"]):
        subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def environment(folder: Path) -> dict[str, str]:
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": programs, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def run_in_shell(command: str, folder: Path, instead: dict[str, str]) -> tuple[int, str]:
    text = small(command, instead).replace("PORT", str(free_port()))
    copies = 2 if "--nnodes 2" in text else 1  # each machine starts the same
    started: list[subprocess.Popen[str]] = []
    try:
        for _ in range(copies):
            started.append(
                subprocess.Popen(
                    ["bash", "-c", text],
                    cwd=folder,
                    env=environment(folder),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )
        said = "".join(process.communicate(timeout=LIMIT)[0] for process in started)
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    # One that a signal ended has a status below 0.
    return next((process.returncode for process in started if process.returncode), 0), said

"""Every option of the commands, driven through values that it can't have: one line, status 2, nothing in the way.

A command falls under this by an entry in `COMMANDS`. What an option takes is read from the command itself, so that a
new option is driven as soon as it is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.models import OptionInfo
from typer.testing import CliRunner

from dig.cli import app
from dig.packages import is_installed
from tests.dig.test_data_images import make_folder
from tests.dig.tiny import make_fashion, make_vae

pytestmark = pytest.mark.usefixtures("tiny_dig")
runner = CliRunner()


@dataclass(frozen=True, kw_only=True)
class Bed:
    """What a command is tried in.

    Attributes:
        folder: A new one.
        data: Idx files.
        run: A finished run.
        samples: Samples of it.
        classifier: Of the data.
        images: Class folders.
        vae: For them; nothing is there where diffusers is not installed.
    """

    folder: Path
    data: Path
    run: Path
    samples: Path
    classifier: Path
    images: Path
    vae: Path


COMMANDS: dict[str, Callable[[Bed], dict[str, str]]] = {
    "train": lambda bed: {
        **{"--data": str(bed.data), "--out": str(bed.folder / "out"), "--model": "DiG-S/8", "--steps": "2"},
        **{"--batch": "4", "--device": "cpu", "--grid-every": "2", "--grid-steps": "1", "--save-every": "1"},
    },
    "sample": lambda bed: {
        **{"--checkpoint": str(bed.run), "--npz": str(bed.folder / "o.npz"), "--grid": str(bed.folder / "g.png")},
        **{"--samples": "2", "--steps": "1", "--device": "cpu"},
    },
    "classifier": lambda bed: {
        **{"--data": str(bed.data), "--out": str(bed.folder / "c.safetensors"), "--epochs": "0.1", "--batch": "4"},
        **{"--device": "cpu"},
    },
    "evaluate": lambda bed: {
        **{"--samples": str(bed.samples), "--data": str(bed.data), "--classifier": str(bed.classifier)},
        **{"--append": str(bed.folder / "rows.jsonl"), "--device": "cpu"},
    },
    "consolidate": lambda bed: {"": str(bed.run), "--out": str(bed.folder / "c.safetensors")},
    "encode": lambda bed: {
        **{"": str(bed.images), "--out": str(bed.folder / "out"), "--vae": str(bed.vae), "--image-size": "16"},
        **{"--device": "cpu"},
    },
}
"""The options of a call that works, of each command; an argument without a name stands under none."""

INTEGERS = [0, -1, -(2**31), -(2**63) - 1, 2**31, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400]
FLOATS = ["nan", "inf", "-inf", "-1", "-1e-300", "1e39", "1e308", "1e400", "1e-320", "-0.0", "0"]
WORDS = [
    "",
    " ",
    "[red]",
    "[/]",
    "[bold",
    ":smile:",
    "\x1b[31m",
    "a\nb",
    "é" * 200,
    "x" * 5000,
    "../..",
    "-",
    "--",
    "@",
]
WORDS += ["null", "auto", "cuda", "cuda:99", "0x10", "1_000", "\N{FULLWIDTH DIGIT ONE}", "\udc80", "{}", "%s"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of a command: its name on the command line, and the types that it takes."""

    name: str
    kinds: frozenset[type]


def options_of(command: str) -> list[Option]:
    """All of a command's that take a value."""
    (callback,) = (entry.callback for entry in app.registered_commands if entry.name == command)
    assert callback is not None
    found = []
    for name, hint in get_type_hints(callback, include_extras=True).items():
        about = next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, OptionInfo)), None)
        kinds = _types(hint)
        if about is not None and bool not in kinds:
            found.append(Option(name=(about.param_decls or [f"--{name.replace('_', '-')}"])[0], kinds=kinds))
    return found


def _types(hint: Any) -> frozenset[type]:
    parts = [part for part in get_args(hint) if not isinstance(part, OptionInfo)]
    return frozenset().union(*map(_types, parts)) if parts else frozenset({hint})


def values(option: Option, odd: list[str]) -> st.SearchStrategy[str]:
    """Values to try: of the option's own type at its ends and beyond, and of none."""
    words = st.sampled_from(WORDS) | st.text(st.characters(exclude_characters="\0"), max_size=20)
    if int in option.kinds:
        return st.sampled_from(INTEGERS).map(str) | st.integers(-(2**70), 0).map(str) | words
    if float in option.kinds:
        return st.sampled_from(FLOATS) | st.floats(max_value=0).map(repr) | words
    return words | st.sampled_from(odd)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    """Data, a run, and files and folders of the wrong kinds."""
    folder = tmp_path_factory.mktemp("bed")
    bed = Bed(
        folder=folder / "work",
        data=make_fashion(folder / "data", train=20),
        run=folder / "run",
        samples=folder / "samples.npz",
        classifier=folder / "classifier.safetensors",
        images=make_folder(folder / "images", {"cat": 3, "dog": 2}, side=20),
        vae=folder / "vae",
    )
    for name, replaced in (
        ("train", {"--out": str(bed.run)}),
        ("sample", {"--npz": str(bed.samples), "--grid": str(folder / "grid.png"), "--samples": "4"}),
        ("classifier", {"--out": str(bed.classifier)}),
    ):
        result = call(name, {**COMMANDS[name](bed), **replaced})
        assert result.exit_code == 0, result.output
    if is_installed("diffusers"):
        make_vae(bed.vae)
    odd = folder / "odd [red]"
    odd.mkdir()
    (odd / "page.pt").write_text("<!DOCTYPE html><html></html>")
    (odd / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (odd / "empty.npz").write_bytes(b"")
    (odd / "folder.npz").mkdir()
    (odd / "folder.png").mkdir()
    (odd / "link").symlink_to(odd / "nowhere")
    return bed


def call(name: str, words: dict[str, str]) -> Any:
    arguments = [word for option, value in words.items() for word in _given(option, value)]
    return runner.invoke(app, [name, *arguments])


def _given(option: str, value: str) -> list[str]:
    if not option:
        return [value]
    return [f"{option}={value}"] if value else [option, ""]


def check(result: Any) -> None:
    """Refused by one line and with status 2, or taken; never a traceback, never half of each."""
    told = f"{result.output}\n{result.exception!r}"
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    assert result.exit_code in (0, 2), told
    assert "Traceback" not in result.output, told
    if result.exit_code == 2:
        lines = [line for line in result.output.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, told
        assert "Usage:" not in result.output, told
        assert "\x1b[31m" not in result.output, told


@pytest.mark.parametrize("name", COMMANDS)
def test_the_calls_that_are_spoilt_here_work(name: str, made: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "encode":
        pytest.importorskip("diffusers")
    without_work(monkeypatch)
    shutil.rmtree(made.folder, ignore_errors=True)
    made.folder.mkdir()
    result = call(name, COMMANDS[name](made))
    assert result.exit_code == 0, result.output


CASES = [pytest.param(name, option, id=f"{name}{option.name}") for name in COMMANDS for option in options_of(name)]


@pytest.mark.hypothesis
@pytest.mark.parametrize(("name", "option"), CASES)
def test_values_that_an_option_cannot_have(
    name: str, option: Option, made: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is taken is not worked on: a training of 2^62 steps is right to begin, and would not end."""
    if name == "encode":
        pytest.importorskip("diffusers")
    without_work(monkeypatch)
    odd = [str(path) for path in sorted((made.run.parent / "odd [red]").iterdir())]
    odd += [str(made.data), "/dev/null/x"]

    @settings(
        max_examples=settings.default.max_examples // 5,  # of a command each
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(value=values(option, odd))
    def drive(value: str) -> None:
        shutil.rmtree(made.folder, ignore_errors=True)
        made.folder.mkdir()
        monkeypatch.chdir(made.folder)
        words = COMMANDS[name](made)
        result = call(name, {**words, option.name: value})
        check(result)
        if result.exit_code == 2 and any(made.folder.iterdir()):
            again = call(name, words)
            assert again.exit_code == 0, (value, result.output, again.output)

    drive()


def without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes time once a command has taken its options."""
    from dig.evaluation import classifier
    from dig.sampling.runner import BatchSampler
    from dig.training.trainer import Trainer

    whole = classifier.train_classifier

    def run(self: Any, **_: Any) -> int:
        self.log.close()
        self._lock.close()
        return int(self.config.steps)

    def batch(self: Any, number: int) -> Any:
        return np.zeros((self.plan.model_batch, 32, 32, 3), dtype=np.uint8)

    def shortened(*arguments: Any, epochs: float, **named: Any) -> Any:
        return whole(*arguments, epochs=min(epochs, 0.1) if epochs <= classifier.MAX_EPOCHS else epochs, **named)

    monkeypatch.setattr(classifier, "train_classifier", shortened)
    monkeypatch.setattr(Trainer, "run", run)
    monkeypatch.setattr(BatchSampler, "batch", batch)

"""The first step of a model where nothing is compiled: in a process of its own, which is what it measures."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bench.cli import main as cli
from dig.environment import ROOT

WORDS = ["first-step", "--device", "cpu", "--mode", "forward", "--resolution", "64"]


@pytest.mark.slow
def test_it_says_what_the_steps_take() -> None:
    command = [sys.executable, "-m", "bench", *WORDS, "--model", "DiT-S/8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"model and inputs \d+\.\d s, first step \d+\.\d s, second step \d+\.\d{3} s", done.stdout)
    assert "DiT-S/8" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "DiT-S8"], "is not a model name"),
        (["--model", "DiT-S/8", "--batch", "0"], "--batch must be at least 1"),
    ],
)
def test_bad_input(options: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.app, [*WORDS, *options])
    assert result.exit_code == 2
    assert message in result.output

"""What docs/training.md shows of `dig.capture` runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import dig
from tests.dig.fake_graph import capture_fake

PAGE = Path(dig.__file__).parents[1] / "docs" / "training.md"
SECTION = "## A loop of your own, as one CUDA graph\n"


def snippets() -> list[str]:
    section = PAGE.read_text().split(SECTION)[1].split("\n## ")[0]
    found = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(found) == 3  # training, a schedule, inference
    return found


def run(codes: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for code in codes:
        exec(compile(code, PAGE.name, "exec"), names)  # a page of this repository
    return names


def check(names: dict[str, Any]) -> None:
    assert names["loss"].isfinite()
    assert names["optimizer"].param_groups[0]["lr"].item() == pytest.approx(3e-6)
    assert names["first"].shape == names["second"].shape == (8, 4, 8, 8)
    steps = {state["step"].item() for state in names["optimizer"].state.values()}
    assert steps == {6}


def on_a_cpu() -> list[str]:
    """With a quarter of the tokens, too."""
    codes = [code.replace('"cuda"', '"cpu"').replace('"DiG-S/2"', '"DiG-S/4"') for code in snippets()]
    assert '"DiG-S/4"' in codes[0]
    return codes


@pytest.mark.usefixtures("shallow")
def test_snippets_on_a_cpu_with_a_graph_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dig.graphs.capture", capture_fake)
    check(run(on_a_cpu()))


def test_snippets_on_a_cpu_are_refused_by_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so nothing is refused; the tests marked gpu run the snippets on it")
    with pytest.raises(dig.CaptureError, match="needs an NVIDIA GPU"):
        run(on_a_cpu())


@pytest.mark.gpu
def test_snippets_on_a_gpu() -> None:
    check(run(snippets()))

"""The simulation that docs/method.md quotes: it counts what it says, and what it simulates is what it says."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from bench.cli.main import app
from bench.judge.coverage import NOISES, simulate


def test_intervals_of_normal_noise_hold_the_truth_and_equal_code_is_the_same() -> None:
    found = simulate(NOISES["normal"], 6, paired=True, trials=40)
    assert found.covered >= 0.85
    assert found.verdicts["same"] >= 0.9
    assert sum(found.verdicts.values()) == pytest.approx(1)
    assert found == simulate(NOISES["normal"], 6, paired=True, trials=40)


def test_a_side_that_is_faster_is_counted_as_not_covered_and_wrong() -> None:
    sides: list[int] = []

    def slower_base(rng: np.random.Generator, n: int) -> np.ndarray:
        sides.append(n)
        return 0.1 * (len(sides) % 2) + 0.001 * rng.standard_normal(n)

    found = simulate(slower_base, 6, paired=True, trials=10)
    assert found.covered == 0
    assert found.verdicts == {"faster": 1.0}


def test_noises_are_what_they_are_called() -> None:
    rng = np.random.default_rng(0)
    drawn = {name: noise(rng, 4000) for name, noise in NOISES.items()}
    assert drawn["normal"].std() == pytest.approx(0.005, rel=0.1)
    assert np.mean(drawn["held up"] > 0.03) == pytest.approx(0.085, abs=0.02)
    assert np.mean(drawn["two speeds"] > 0.015) == pytest.approx(0.5, abs=0.05)


def test_the_command_prints_a_line_for_each_and_refuses_too_few() -> None:
    found = CliRunner().invoke(app, ["coverage", "--trials", "2", "--launches", "5"])
    assert found.exit_code == 0, found.output
    assert len(found.output.splitlines()) == 2 + 2 * len(NOISES)
    for words, message in (
        (("--launches", "4"), "--launches must be at least 5"),
        (("--launches", "6,201"), "--launches must be at most 200"),
        (("--trials", "0"), "--trials must be at least 1"),
    ):
        found = CliRunner().invoke(app, ["coverage", *words])
        assert (found.exit_code, found.output.count("\n")) == (2, 1), found.output
        assert message in found.output

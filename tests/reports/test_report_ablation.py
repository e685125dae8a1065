"""The ablations: which orders hold, from planted runs; and the script that makes the runs, on tiny models."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dig.environment import ROOT
from reports.ablation import (
    SIZES,
    TOKENS,
    app,
    arms_of,
    compare,
    compare_seconds,
    data,
    draw,
    estimate,
    orders,
    page,
)
from reports.ablation_runs import read_ablation, repeating_runs
from reports.cells import number
from reports.logs import RunError
from tests.dig.tiny import make_fashion

DISTANCES = {
    "causal": 170.0,
    "bidirectional": 70.0,
    "default-init": 95.0,
    "identity-init": 64.0,
    "crisscross": 62.0,
    "u-shape": 61.0,
    "u-shape-zero": 62.0,
    "attention": 68.0,
}
WOBBLE = (0.3, -0.2, 0.1)


def line(arm: str, seed: int, distance: float, experiment: str = "srem", **changes: Any) -> str:
    """A run; its loss follows its distance."""
    model = {"attention": "Flash-DiT-S/4"}.get(arm, f"DiG-{arm}" if "/" in arm else "DiG-S/4")
    record = {
        "experiment": experiment, "arm": arm, "model": model, "seed": seed, "steps": 800, "batch": 128,
        "seconds": 6.5, "ready_seconds": 3.0, "loss": distance / 1000, "frechet": distance, "failed": "",
        "parameters": {"B": 130_000_000, "L": 460_000_000}.get(arm[0], 33_000_000), "samples": 2500,
        "sampling_steps": 25, "gpu_name": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "commit": "0123456789abcdef",
    }  # fmt: skip
    return json.dumps({**record, **changes})


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(text + "\n" for text in lines))
    return path


def srem(distances: dict[str, float], seeds: int = 3) -> list[str]:
    """Seeds differ by more than arms of the later orders do, and all arms of a seed alike but for a little."""
    return [
        line(arm, seed, distance + 10 * seed + WOBBLE[(seed + place) % 3])
        for seed in range(seeds)
        for place, (arm, distance) in enumerate(distances.items())
    ]


def verdicts(path: Path) -> dict[tuple[str, str], str]:
    return {(order.worse, order.better): order.verdict for order in orders(read_ablation(path), "frechet")["srem"]}


def test_orders_are_told_seed_by_seed(tmp_path: Path) -> None:
    """Ten between two seeds hide nothing of the two between two arms."""
    found = verdicts(write(tmp_path / "a.jsonl", srem(DISTANCES)))
    assert found[("causal", "bidirectional")] == "holds"
    assert found[("default-init", "identity-init")] == "holds"
    assert found[("identity-init", "crisscross")] == "holds"
    assert found[("crisscross", "u-shape-zero")] == "not told apart"


def test_an_order_that_is_the_wrong_way_round_is_said_so(tmp_path: Path) -> None:
    planted = {**DISTANCES, "default-init": 50.0}
    file = write(tmp_path / "a.jsonl", srem(planted))
    assert verdicts(file)[("default-init", "bidirectional")] == "reversed"
    told = page(read_ablation(file))
    row = next(row for row in told.splitlines() if "identity init | + 3×3 convolution, default init" in row)
    assert row.count("reversed") == 2


def test_one_seed_tells_nothing_apart(tmp_path: Path) -> None:
    found = verdicts(write(tmp_path / "a.jsonl", srem(DISTANCES, seeds=1)))
    assert set(found.values()) == {"one seed: not told apart"}


def test_an_interval_is_students() -> None:
    """Of 1, 2, 3: t of 2 degrees of freedom is 4.303, the standard error 1 over the root of 3."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.low, found.high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    assert str(estimate([2.0])) == "2.00"


def test_runs_of_different_length_are_not_compared(tmp_path: Path) -> None:
    lines = [line("causal", 0, 170.0, steps=800), line("bidirectional", 0, 70.0, steps=400)]
    with pytest.raises(RunError, match="trained for 800 and 400 steps"):
        orders(read_ablation(write(tmp_path / "a.jsonl", lines)), "frechet")


def test_a_run_that_diverged_is_none_and_a_repeated_one_counts_once(tmp_path: Path) -> None:
    lines = [
        line("causal", 0, 170.0),
        line("causal", 0, 160.0),
        line("causal", 1, 1.0, failed="not finite", loss=None, frechet=None),
    ]
    runs = read_ablation(write(tmp_path / "a.jsonl", lines))
    assert [(run.seed, run.frechet) for run in runs] == [(0, 160.0)]


def test_the_page_says_which_code_was_not_committed(tmp_path: Path) -> None:
    lines = [line("causal", 0, 170.0, dirty=True), line("bidirectional", 0, 70.0, dirty=False)]
    told = page(read_ablation(write(tmp_path / "a.jsonl", lines)))
    assert "commit 0123456 with uncommitted changes and commit 0123456 ·" in told


def test_the_command_of_runs_has_their_length(tmp_path: Path) -> None:
    lines = [
        line("causal", 1, 170.0, steps=50, batch=4),
        line("DiG", 0, 9.0, "seconds", steps=64, seconds=20.3, batch=4),
    ]
    words = repeating_runs(read_ablation(write(tmp_path / "a.jsonl", lines)))
    assert words.endswith(
        "--experiments srem,seconds --seeds 2 --steps 50 --budget 20 --batch 4 --samples 2500 --sampling-steps 25"
    )


def test_the_figures_numbers_are_its_data(tmp_path: Path) -> None:
    lines = [*srem(DISTANCES), line("S/4", 0, 30.0, "scaling"), line("DiG", 0, 9.0, "seconds")]
    rows = list(csv.DictReader(io.StringIO(data(read_ablation(write(tmp_path / "a.jsonl", lines))))))
    assert len(rows) == 2 * (len(DISTANCES) + 1)
    first = rows[0]
    assert (first["experiment"], first["arm"], first["measure"], first["seeds"]) == ("srem", "causal", "frechet", "3")
    assert float(first["mean"]) == pytest.approx(180 + sum(WOBBLE) / 3, abs=1e-3)
    assert float(first["low"]) < float(first["mean"]) < float(first["high"])
    assert (rows[-1]["arm"], rows[-1]["low"], rows[-1]["steps"]) == ("S/4", "", "800")


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    text = "$\\frac{$ <b>x</b> `|\n# y"
    lines = [line(text, 0, 170.0, model="DiG-S/4", gpu_name=text, commit=text), line("DiG", 0, 9.0, "seconds")]
    lines.append(line(text, 0, 9.0, "seconds", model=f"DiG-S/2{text}"))
    told = page(read_ablation(write(tmp_path / "a.jsonl", lines)))
    assert "<b>" not in told
    assert "\n# y" not in told
    assert all(row.count(" | ") in (5, 7) for row in told.splitlines() if row.startswith("|") and "---" not in row)


def test_arms_come_in_the_papers_order(tmp_path: Path) -> None:
    lines = [line(arm, 0, 1.0) for arm in ("crisscross", "mine", "attention", "causal")]
    runs = read_ablation(write(tmp_path / "a.jsonl", lines))
    assert list(arms_of(runs, "srem")) == ["causal", "crisscross", "attention", "mine"]


def test_the_figure_draws_arms_sizes_and_tokens(tmp_path: Path) -> None:
    curve = {"S/8": 90.0, "S/4": 62.0, "S/2": 40.0, "B/4": 45.0, "L/4": 38.0}
    lines = srem(DISTANCES) + [
        line(arm, seed, distance + WOBBLE[seed], "scaling") for seed in range(3) for arm, distance in curve.items()
    ]
    runs = read_ablation(write(tmp_path / "a.jsonl", lines))
    arms, sizes, tokens = draw(runs).figure.axes
    drawn = {mark.get_gid(): float(mark.get_xdata()[0]) for mark in arms.get_lines() if mark.get_gid()}
    assert drawn["arm:causal"] == pytest.approx(180, abs=0.1)
    assert list(sizes.get_lines()[0].get_ydata()) == pytest.approx([curve[name] + 0.2 / 3 for name in SIZES])
    assert list(tokens.get_lines()[0].get_ydata()) == pytest.approx([curve[name] + 0.2 / 3 for name in TOKENS])
    assert [text.get_text() for text in tokens.get_xticklabels()] == ["16", "64", "256"]
    found = orders(runs, "frechet")
    assert {order.verdict for order in found["sizes"] + found["tokens"]} == {"holds"}


def test_the_same_seconds_have_a_winner_where_seeds_agree(tmp_path: Path) -> None:
    lines = [
        line(arm, seed, distance + WOBBLE[seed] + place, "seconds", steps=1000 + place)
        for seed in range(3)
        for place, (arm, distance) in enumerate({"DiG": 20.0, "Flash-DiT": 30.0}.items())
    ]
    told = compare_seconds(arms_of(read_ablation(write(tmp_path / "a.jsonl", lines)), "seconds"))
    assert "Fréchet distance, Flash-DiT less DiG: 11.0" in told
    assert told.count("DiG is better") == 2


def test_the_command_writes_its_files_or_says_one_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", srem(DISTANCES))
    done = CliRunner().invoke(app, [str(file), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"ablation.{ending}" for ending in ("md", "png", "svg", "csv")
    }
    for content, message in (
        ("", "holds no run that ended"),
        ("{}\n", "experiment must be a word"),
        (line("causal", 0, 1.0, frechet=float("nan")) + "\n", "not JSON"),
    ):
        file.write_text(content)
        done = CliRunner().invoke(app, [str(file), "--out", str(tmp_path / "out")])
        assert (done.exit_code, message in done.output) == (2, True), done.output


PUBLISHED = ROOT / "results" / "h100" / "ablation.jsonl"


def test_the_published_tables_are_of_the_published_runs() -> None:
    runs, folder = read_ablation(PUBLISHED), PUBLISHED.parent / "ablation"
    for name, content in (("ablation.md", page(runs)), ("ablation.csv", data(runs))):
        assert (folder / name).read_text(encoding="utf-8") == content, "python -m reports.ablation writes it again"


def test_the_page_on_training_says_what_the_published_runs_say() -> None:
    """Each line of its table, and the sentences on attention."""
    runs = read_ablation(PUBLISHED)
    srem, scaling = arms_of(runs, "srem"), arms_of(runs, "scaling")
    told = {
        (order.worse, order.better, measure): order.verdict
        for measure in ("frechet", "loss")
        for several in orders(runs, measure).values()
        for order in several
    }
    told |= {
        (worse, better, measure): order.verdict
        for worse, better in (("causal", "attention"), ("attention", "crisscross"))
        for measure in ("frechet", "loss")
        if (order := compare(srem, worse, better, measure)) is not None
    }
    told[("S/4", "L/4", "loss")] = compare(scaling, "S/4", "L/4", "loss").verdict  # type: ignore[union-attr]

    def distance(arm: str) -> str:
        arms = srem if arm in srem else scaling
        return number(estimate([run.frechet for run in arms[arm].values()]).middle)

    d = {arm: distance(arm) for arm in (*srem, *scaling)}
    sizes = ", ".join(f"{float(d[arm]):.1f}" for arm in reversed(SIZES))
    expected = {
        f"| both directions beat one scan by far | holds: {d['bidirectional']} instead of {d['causal']} | holds |": (
            [("causal", "bidirectional")], "holds", "holds"
        ),
        f"none | not told apart: {d['identity-init']}, {d['bidirectional']} | holds |": (
            [("bidirectional", "identity-init")], "not told apart", "holds"
        ),
        f"| the convolution of default init is the worst | holds: {d['default-init']} | holds |": (
            [("default-init", "bidirectional"), ("default-init", "identity-init")], "holds", "holds"
        ),
        f"one axis | not told apart: {d['crisscross']}, {d['identity-init']} | holds |": (
            [("identity-init", "crisscross")], "not told apart", "holds"
        ),
        "| the U shape beats none | not told apart | **reversed**; begun as none, not told apart |": (
            [("crisscross", "u-shape")], "not told apart", "reversed"
        ),
        f"| L beats B beats S | holds: {sizes} | L beats S; B is not told apart from either |": (
            [("S/4", "B/4"), ("B/4", "L/4")], "holds", "not told apart"
        ),
        "| patches of 2 beat 4 beat 8 | 4 beats 8; 2 and 4 are not told apart | holds |": (
            [("S/4", "S/2")], "not told apart", "holds"
        ),
        f"behind attention by the distance ({d['causal']} and {d['attention']}), and not told apart from it": (
            [("causal", "attention")], "holds", "not told apart"
        ),
        "All of SREM is ahead of attention by both.": ([("attention", "crisscross")], "holds", "holds"),
    }  # fmt: skip
    text = " ".join((ROOT / "docs" / "training.md").read_text(encoding="utf-8").split())
    for said, (pairs, by_distance, by_loss) in expected.items():
        assert said in text, said
        for pair in pairs:
            assert (told[(*pair, "frechet")], told[(*pair, "loss")]) == (by_distance, by_loss), said
    least = compare(srem, "identity-init", "crisscross", "loss")
    assert least is not None
    assert f"Crisscross does so by the least: {least.difference}" in text
    assert told[("S/8", "S/4", "frechet")] == told[("S/8", "S/4", "loss")] == told[("S/4", "L/4", "loss")] == "holds"
    for measure in ("frechet", "loss"):
        assert told[("crisscross", "u-shape-zero", measure)] == "not told apart"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "cpu"), "has no train-images-idx3-ubyte"),
        (("--device", "tpu"), "unknown --device 'tpu'"),
        (("--seeds", "0"), "--seeds"),
    ],
)
def test_the_script_refuses_in_one_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/ablation.py", str(tmp_path), str(tmp_path / "out"), *words],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_script_makes_what_is_missing(tmp_path: Path) -> None:
    data = make_fashion(tmp_path / "data")
    classifier = tmp_path / "classifier.safetensors"
    tiny = [sys.executable, "-m", "tests.dig.tiny"]
    words = [*tiny, "classifier", "--data", str(data), "--out", str(classifier), "--epochs", "1", "--device", "cpu"]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    out = tmp_path / "out"
    code = "import runpy, sys; from tests.dig import tiny; registry = __import__('dig.registry').registry; " + (
        "registry.families(); registry._families['DiG'] = tiny.TINY; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )

    def run(*more: str) -> str:
        given = ["examples/ablation.py", str(data), str(out), "--classifier", str(classifier), "--device", "cpu"]
        given += ["--steps", "2", "--samples", "130", "--sampling-steps", "2", "--batch", "4", "--budget", "0.1"]
        # As a lane: the command itself starts it by its own file, where no model is tiny.
        given += ["--seeds", "1", "--lanes", "1", "--lane", "0", *more]
        done = subprocess.run(
            [sys.executable, "-c", code, *given], cwd=ROOT, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--experiments", "srem", "--arms", "causal").count("\n") == 1
    assert run("--experiments", "srem", "--arms", "causal,u-shape").startswith("srem u-shape seed 0: loss ")
    assert "seconds DiG seed 0" in run("--experiments", "seconds", "--arms", "DiG")
    runs = read_ablation(out / "ablation.jsonl")
    assert [(one.arm, one.steps) for one in runs[:2]] == [("causal", 2), ("u-shape", 2)]
    assert runs[2].steps % 16 == 0
    refused = subprocess.run(
        [sys.executable, "examples/ablation.py", str(data), str(out), "--arms", "flipped"],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "no arm is called 'flipped'" in refused.stderr

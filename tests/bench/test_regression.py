"""The regression gate with real processes and real copies of the tree: what is slower or broken is caught, and how."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cases.case import Case
from bench.cases.choices import parse_case
from bench.cases.jobs import Budget
from bench.cli import main as cli
from bench.cli import regression as regression_command
from bench.judge.compare import Thresholds, exit_status
from bench.judge.regression import BUDGETS, Plan, compare_checkouts, cpu_suite, gpu_suite, rounds
from bench.run.checkouts import CheckoutError, check_out_base, copy_tree, slow_down
from bench.run.side import Side, SideError, without_checkouts
from bench.store.ledgers import Memory
from bench.store.rows import Row, read_results
from dig.environment import ROOT
from dig.registry import find_family

CASE = Case(model="DiT-S/8", resolution=64, mode="forward", dtype="fp32", device="cpu")
QUICK = Budget(settle_s=0.0, settle_max_s=0.0, min_samples=3, least_s=0.0, target_s=0.0, max_samples=3)
runner = CliRunner()


def repository(folder: Path) -> Path:
    """A repository with this tree's sources as its first commit."""
    copy_tree(ROOT, folder, "x")
    for arguments in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "base"]):
        who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)
    return folder


def test_a_round_holds_both_sides_of_every_case_side_by_side_in_changing_order() -> None:
    cases = [replace(CASE, resolution=64 * i) for i in (1, 2, 3)]
    turns = list(rounds(cases, range(20), random.Random(0)))
    assert Counter((case, number) for case, number, _ in turns) == {(c, n): 2 for c in cases for n in range(20)}
    pairs = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    assert all(a[:2] == b[:2] and a[2] != b[2] for a, b in pairs)
    assert 15 < sum(first[2] for first, _ in pairs) < 45
    assert len({tuple(c for c, n, _ in turns[::2] if n == number) for number in range(20)}) > 3


def test_the_base_is_measured_by_the_changes_harness_with_its_own_models(tmp_path: Path) -> None:
    tree = repository(tmp_path / "tree")
    (tree / "dig" / "layers.py").write_text("changed")
    for name in (
        "bench/models.py",
        "bench/measure/timing.py",
        "bench/new.py",
        "dig/registry.py",
        "baselines/declared.py",
    ):
        (tree / name).write_text("changed")
    base = check_out_base(tree, "main", tmp_path / "base")
    assert len(base.name) == 40
    changed = {p.name for p in base.root.rglob("*.py") if p.read_text() == "changed"}
    assert changed == {"models.py", "timing.py", "new.py"}
    for name in ("dig/registry.py", "baselines/declared.py", "pyproject.toml"):
        assert (base.root / name).read_text() == (ROOT / name).read_text()


def test_a_base_that_knows_no_such_registry_is_refused(tmp_path: Path) -> None:
    old = copy_tree(ROOT, tmp_path / "old", "old")
    (old.root / "dig" / "family.py").unlink()
    with pytest.raises(CheckoutError, match=r"is older than dig/family.py, .* then python -m bench compare"):
        check_out_base(ROOT, str(old.root), tmp_path / "base")


@pytest.mark.parametrize("base", ["no-such-branch", "--upload-pack=touch x", "main:README.md"])
def test_a_base_that_is_none_is_refused(base: str, tmp_path: Path) -> None:
    tree = repository(tmp_path / "tree")
    with pytest.raises(CheckoutError, match="neither a revision nor a folder"):
        check_out_base(tree, base, tmp_path / "base")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckoutError, match="not a checkout of this project"):
        check_out_base(ROOT, str(tmp_path / "empty"), tmp_path / "base")


@pytest.mark.slow
def test_slower_and_broken_code_is_caught_and_unchanged_code_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUDGETS, "cpu", QUICK)
    base = copy_tree(ROOT, tmp_path / "base", "base")
    # Half a second is many times the case's own time, however busy the machine is; small effects are judged on made
    # rows, in test_compare.py.
    slowed = slow_down(copy_tree(ROOT, tmp_path / "slow", "slow"), milliseconds=500, megahertz=1)
    plan = Plan(cases=(CASE,), launches=5, repeats=0, thresholds=Thresholds(time=0.5))
    found = compare_checkouts(base, slowed, plan, folder=tmp_path / "rows", on_start=lambda *told: None)
    assert exit_status(found.findings) == 1
    assert {f.metric: f.verdict for f in found.findings} == {"time": "slower", "memory": "same"}
    written = read_results(tmp_path / "rows" / "change.jsonl").rows
    assert written == found.change
    assert [row.launch for row in written] == [0, 1, 2, 3, 4]
    assert {row.environment["commit"] for row in written} == {"slow slowed by 500 ms"}
    assert {row.checks.inputs for row in found.base} == {row.checks.inputs for row in found.change}


@pytest.mark.slow
def test_a_side_that_gives_other_numbers_is_an_error_row_by_name(tmp_path: Path) -> None:
    broken = copy_tree(ROOT, tmp_path / "nan", "nan")
    layers = broken.root / "dig" / "layers.py"
    call = "\n_call = Backbone.__call__\nBackbone.__call__ = lambda self, *a: _call(self, *a) * float('nan')\n"
    layers.write_text(layers.read_text() + call)
    with Side(broken, time_limit=60) as side:
        row = side.measure(CASE, budget=QUICK, launch=0)
    assert row.status == "error"
    assert "not finite" in row.message


def test_a_side_that_cannot_start_says_why(tmp_path: Path) -> None:
    side = copy_tree(ROOT, tmp_path / "side", "side")
    (side.root / "bench" / "run" / "runner.py").write_text("raise RuntimeError('torn apart')")
    with Side(side, time_limit=60) as process, pytest.raises(SideError, match="torn apart"):
        process.measure(CASE, budget=QUICK, launch=0)


def test_a_side_finds_the_packages_of_all_and_no_other_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "only_here.py").write_text("FOUND = 'packages found'\n")
    side = copy_tree(ROOT, tmp_path / "side", "side")
    loud = "import only_here, bench.run.runner\nraise RuntimeError(f'{only_here.FOUND}; {bench.run.runner.__file__}')"
    (side.root / "bench" / "run" / "side.py").write_text(loud)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(packages), ""]))
    assert without_checkouts(os.environ["PYTHONPATH"]) == str(packages)
    with Side(side, time_limit=60) as process, pytest.raises(SideError, match="packages found") as raised:
        process.measure(CASE, budget=QUICK, launch=0)
    assert str(side.root) in str(raised.value)


def test_runs_of_unchanged_code_share_their_sides_and_each_has_an_order_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faked sides: what is counted are processes, launches and their order."""
    sides = []
    asked = []

    class Fake:
        def __init__(self, checkout: object, *, time_limit: float) -> None:
            sides.append(self)

        def measure(self, case: Case, *, budget: Budget, launch: int, tell: Callable[[str], None]) -> Row:
            tell("measuring")
            asked.append((sides.index(self), case.model, launch))
            memory = Memory(parameters=1, process_peak=10**9)
            return Row(case=case, status="ok", started_at="", samples_ms=(10.0,), memory=memory, launch=launch)

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *exception: object) -> None:
            asked.append("closed")

    monkeypatch.setattr(regression_command, "Side", Fake)
    command = ["regression", "--suite", "cpu", "--against-itself", "3", "--launches", "5", "--out", str(tmp_path)]
    result = runner.invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert "unchanged code: 0 alarms and 0 inconclusive in 3 runs" in result.output
    assert "run 3 of 3: no alarm" in result.output
    assert len(sides) == 2
    assert asked[-2:] == ["closed", "closed"]
    launched = asked[:-2]
    # An untimed launch of two cases and two sides once, then 5 rounds of them in each run.
    assert len(launched) == 4 + 3 * 20
    runs = [launched[4 + 20 * i : 24 + 20 * i] for i in range(3)]
    assert Counter(runs[0]) == Counter(runs[1]) == Counter(runs[2])
    assert runs[0] != runs[1] != runs[2] != runs[0]
    assert len(list(tmp_path.glob("*/itself-*/*.jsonl"))) == 6
    # Going on from where that ended means other orders.
    asked.clear()
    command[-1] = str(tmp_path / "more")
    assert runner.invoke(cli.app, [*command, "--seed", "3"]).exit_code == 0
    assert asked[4:24] not in runs


def test_suites_are_small_and_fit_their_device() -> None:
    assert {case.device for case in gpu_suite()} == {"cuda"}
    assert {case.device for case in cpu_suite()} == {"cpu"}
    assert len(gpu_suite()) <= 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "gpus"], "unknown --suite 'gpus': did you mean gpu?"),
        (["--suite", "cpu", "--base", ""], "--base needs a revision, or a folder with a checkout"),
        (["--suite", ""], "unknown --suite '': Known: auto, gpu, quick, cpu"),
        (["--suite", "gpu"], "no NVIDIA GPU was found"),
        (["--suite", "cpu", "--launches", "4"], "--launches must be at least 5"),
        (["--suite", "cpu", "--base", "no-such"], "neither a revision nor a folder"),
        (["--suite", "cpu", "--least-effect", "x"], "--least-effect takes a percentage"),
        (["--suite", "cpu", "--against-itself", "-1"], "--against-itself must be at least 0"),
        (["--suite", "cpu", "--case", "DiT-S/8@64"], "give one of them"),
        (["--case", "DiT-S/8"], "a case is MODEL[:OPTIONS]@RESOLUTION"),
        (["--case", "DiT-S/8@"], "the resolution must be a whole number"),
        (["--case", "DiT-S/8@64:training"], "unknown word 'training': did you mean train?"),
        (["--case", "DiT-S/8@64:train:forward"], "mode is given twice"),
        (["--case", "DiT-S/8@64:batch="], "batch must be a whole number"),
        (["--case", "DiT-S/8@64:batch=0"], "--batch must be at least 1"),
        (["--case", "DiT-S/8@64:graph"], "needs a GPU"),
        (["--case", "DiT-S/8@64:eager:model"], "model is of an execution that compiles: add compile or compiled-graph"),
        (["--case", "DiT-S/8@64:max-autotune"], "max-autotune is of an execution that compiles"),
        (["--case", "DiT-S/8@64:compile:block:model"], "scope is given twice"),
        (["--case", "DiT-S/8@64:bf16-weights"], "training keeps fp32 weights: add forward"),
        (["--case", "DiT-S/8@64:forward:fp32:bf16-weights"], "dtype is given twice"),
        (["--case", "DiT@64"], "DiT"),
        (["--case", "DiT-S/8@65"], "resolution 65 is not a multiple of 64"),
        (["--case", "DiG-S/2:triton@64:train", "--device", "cuda"], "no NVIDIA GPU was found"),
    ],
)
def test_bad_input(options: list[str], message: str, tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["regression", *options, "--out", str(tmp_path)])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("\n") == 1


def test_cases_are_named_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_case("DiT-S/8@64:fp32:forward:batch=3:eager", device="cpu") == replace(
        CASE, batch=3, options=(("backend", find_family("DiT").default_backend("cpu")),)
    )
    assert parse_case("DiG-S/8:reference:variant=release@64", device="cpu").mode == "train"
    compiled = parse_case("DiT-S/8@64:forward:compile:model:max-autotune:bf16-weights", device="cpu")
    assert (compiled.way, compiled.precision) == ("compile by model max-autotune", "bf16-weights")
    assert parse_case("DiT-S/8@64:compile", device="cpu").way == "compile by block"
    chosen = []

    def stop(plan: Plan, *rest: object) -> None:
        chosen.extend(plan.cases)
        raise SideError("seen")

    monkeypatch.setattr(regression_command, "_OfSteps", stop)
    words = ["--case", "DiT-S/8@64:forward", "--case", "DiG-S/8@64", "--case", "DiT-S/8@64:forward", "--device", "cpu"]
    assert runner.invoke(cli.app, ["regression", *words, "--out", str(tmp_path)]).exit_code == 3
    assert [(case.model, case.mode) for case in chosen] == [("DiT-S/8", "forward"), ("DiG-S/8", "train")]


@pytest.mark.slow
def test_the_copy_that_is_slowed_still_computes_the_same(tmp_path: Path) -> None:
    code = (
        "import sys, torch, bench.models as m; torch.manual_seed(0)\n"
        "model = m.create_model('DiT-S/8', image_size=64); x = torch.ones(1, 4, 8, 8)\n"
        "print(model(x, torch.tensor([1]), torch.tensor([1])).sum().item(), model.x_embedder.proj.weight.sum().item())"
    )
    outputs = []
    for slowed in (False, True):
        copy = copy_tree(ROOT, tmp_path / str(slowed), "x")
        if slowed:
            slow_down(copy, milliseconds=1, megahertz=1)
        command = [sys.executable, "-c", code]
        outputs.append(subprocess.run(command, cwd=copy.root, capture_output=True, text=True, check=True).stdout)
    assert outputs[0] == outputs[1] != ""

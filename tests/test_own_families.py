"""Families of one's own, used: trained, sampled, measured beside others, and measured again once their files change."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from bench.cases.case import Case
from bench.cases.jobs import BUDGETS, Budget
from bench.measure.steps import build_step
from bench.parity.error import ParityError
from bench.parity.reference import check_against_reference
from bench.run.checkouts import copy_tree
from bench.run.side import Side
from bench.store import identity
from bench.store.rows import read_results
from dig import source_files
from dig.cli import app
from dig.environment import ROOT
from dig.family import Family, FamilyError
from dig.layers import Backbone
from dig.registry import find_family, load_family, register
from dig.training.resuming import recorded_config
from tests.own_family import MODULE, run


@pytest.mark.slow
def test_a_family_of_ones_own_is_trained_and_sampled(own: str, tmp_path: Path) -> None:
    from tests.dig.tiny import make_fashion

    make_fashion(tmp_path / "data", train=40, test=10)
    words = ["train", "--model", f"{own}:Plain-S/8", "--data", "data", "--out", "run", "--steps", "2", "--batch", "4"]
    done = run(*words, "--device", "cpu", "--grid-every", "0", folder=tmp_path, module="dig")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["model"]["name"], config["model"]["source"]) == ("Plain-S/8", f"{own}:Plain")
    words = ["sample", "--checkpoint", "run", "--npz", "out.npz", "--steps", "2", "--device", "cpu", "--samples", "2"]
    done = run(*words, folder=tmp_path, module="dig")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.npz").exists()


def test_a_run_whose_package_cannot_be_imported_is_not_called_damaged(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by its folder nor by its checkpoint alone; nor where an installed package declared the family."""
    from tests.dig.tiny import make_fashion

    make_fashion(tmp_path / "data", train=20, test=10)
    words = ["train", "--model", f"{own}:Plain-S/8", "--data", "data", "--out", "run", "--steps", "1", "--batch", "4"]
    done = run(*words, "--device", "cpu", "--grid-every", "0", folder=tmp_path, module="dig")
    assert done.returncode == 0, done.stderr
    # As in a process that was started elsewhere: this one has not imported the family, and no longer finds it.
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(tmp_path)])
    for checkpoint in ("run", "run/checkpoints/step-00000001.safetensors"):
        record = tmp_path / (f"{checkpoint}/config.json" if checkpoint == "run" else checkpoint)
        words = ["sample", "--checkpoint", str(tmp_path / checkpoint), "--npz", "out.npz", "--device", "cpu"]
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code == 2
        assert refused.stderr == (
            f"error: the model of {record} cannot be had here: no module '{own}' for {own}:Plain; is its folder on "
            "PYTHONPATH?\n"
        )
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace(f'"{own}:Plain"', '""'))
    with pytest.raises(
        FamilyError, match=r"^the model of .* cannot be had here: unknown model .*declares it installed"
    ):
        recorded_config(tmp_path / "run")


def test_an_output_of_half_the_channels_is_no_measurement(own: str) -> None:
    class Half(Backbone):
        def __init__(self, size: str, **shape: Any) -> None:
            super().__init__(**shape)
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return self.weight * x

    register(sizes=("S",))(Half)
    for mode in ("forward", "train"):
        case = Case(model="Half-S/2", resolution=64, mode=mode, execution="eager", dtype="fp32", device="cpu")
        with pytest.raises(
            ValueError, match=r"^the model gives \(1, 4, 8, 8\) for x \(1, 4, 8, 8\); \(1, 8, 8, 8\) is due$"
        ):
            build_step(case).run()


def test_a_reference_with_other_weights_is_told_in_short(own: str) -> None:
    register(Family(name="Wide", sizes=("S",), build=find_family("DiG").build, reference="DiT"))
    case = Case(model="Wide-S/2", resolution=64, mode="forward", execution="eager", dtype="fp32", device="cpu")
    with pytest.raises(ParityError) as caught:
        check_against_reference(case)
    assert "Wide-S/2 has other weights than its reference (DiT-S/2): " in str(caught.value)
    assert "differ in name or shape, blocks.0." in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.slow
def test_workers_measure_a_family_of_ones_own_and_resume_sees_its_file_change(own: str, tmp_path: Path) -> None:
    words = ["run", "--models", f"{own}:Plain,DiT", "--patch", "8", "--resolution", "64", "--modes", "forward"]
    words += ["--device", "cpu", "--out", "rows.jsonl", "--resume"]
    for expected, change in (("2 cases", ""), ("0 cases", "# another\n"), ("1 cases", "")):
        done = run(*words, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"{expected} to measure" in done.stderr
        (tmp_path / f"{own}.py").write_text(MODULE + change)
    plain, dit, again = read_results(tmp_path / "rows.jsonl").rows
    assert (plain.status, plain.case.model, plain.case.source) == ("ok", "Plain-S/8", f"{own}:Plain")
    assert plain.marks == ("unverified", "no-reference", "small-parity")
    assert (plain.flops, plain.message) == (2 * 8 * 8 * 4 * 8, "")
    assert dit.marks == ()
    assert again.case == plain.case
    assert again.key != plain.key


@pytest.mark.slow
def test_a_family_with_two_ways_is_compared_with_its_reference(own: str, tmp_path: Path) -> None:
    text = MODULE.replace('gpu_only=frozenset({"fast"}), on_gpu="fast", ', "").replace(
        "    return Plain(size, **shape)",
        "    return Plain(size, **shape) if backend == 'plain' else Wrong(size, **shape)",
    )
    text += "\n\nclass Wrong(Plain):\n    def forward(self, x, t, y):\n        return 1.5 * super().forward(x, t, y)\n"
    (tmp_path / f"{own}.py").write_text(text)
    words = ["run", "--models", f"{own}:two_ways:plain,{own}:two_ways:fast", "--patch", "8", "--resolution", "64"]
    done = run(*words, "--modes", "forward", "--device", "cpu", "--out", "rows.jsonl", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    right, wrong = read_results(tmp_path / "rows.jsonl").rows
    assert (right.status, right.marks) == ("ok", ("small-parity",))
    assert wrong.status == "error"
    assert "Two-Ways-S/8 differs from its reference (Two-Ways-S/8 backend=plain)" in wrong.message


@pytest.mark.slow
def test_a_side_of_the_gate_finds_a_family_of_ones_own(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(model="Plain-S/8", resolution=64, mode="forward", dtype="fp32", device="cpu", source=f"{own}:Plain")
    monkeypatch.chdir(tmp_path)
    budget = Budget(settle_s=0.0, settle_max_s=0.0, min_samples=3, least_s=0.0, target_s=0.0, max_samples=3)
    with Side(copy_tree(ROOT, tmp_path / "side", "side"), time_limit=60) as side:
        row = side.measure(case, budget=budget, launch=0)
    assert (row.status, row.message) == ("ok", "")


def test_a_familys_files_are_in_its_rows_addresses_alone(own: str, tmp_path: Path) -> None:
    def keys() -> dict[str, str]:
        identity._family_hash.cache_clear()
        environment, budget = {"torch": "2"}, BUDGETS["cpu"]
        given = [Case(model=model, resolution=64) for model in ("DiG-S/2", "Flash-DiT-S/2")]
        given.append(Case(model="Plain-S/2", resolution=64, source=f"{own}:Plain"))
        return {c.model: identity.measurement_key(c, code="c", environment=environment, budget=budget) for c in given}

    before = keys()
    assert len(set(before.values())) == 3
    (tmp_path / f"{own}.py").write_text(MODULE + "# another\n")
    after = keys()
    assert [model for model in before if before[model] != after[model]] == ["Plain-S/2"]
    files = {name for name, _ in source_files.family_files(find_family("Flash-DiT"))}
    assert {"baselines/declared.py", "baselines/dit.py"} <= files
    helper = tmp_path / "kernels.cu"
    helper.write_text("first")
    named = replace(find_family("Plain"), files=(str(helper),))
    assert {name for name, _ in source_files.family_files(named)} == {f"{own}.py", "kernels.cu"}
    with pytest.raises(FamilyError, match=r"names the source file nowhere.cu, which is not there"):
        source_files.family_files(replace(named, files=("nowhere.cu",)))


def test_a_package_counts_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    package = tmp_path / "whole_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text("WIDTH = 1\n")
    (package / "families.py").write_text(MODULE.replace("Plain", "Packed").replace("Two-Ways", "Packed-Ways"))
    family = load_family("whole_package.families:Packed")
    assert {name for name, _ in source_files.family_files(family)} == {
        "whole_package/__init__.py",
        "whole_package/layers.py",
        "whole_package/families.py",
    }

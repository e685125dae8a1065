"""Operations of two checkouts against each other: what is slower is caught, what cannot be timed is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from bench.cases.jobs import Budget, Limits
from bench.cli import ops_compare
from bench.cli.main import app
from bench.judge.compare import Thresholds, exit_status
from bench.judge.regression import Plan, compare_checkouts
from bench.measure.timing import Sampled
from bench.ops import calls, side
from bench.ops.calls import MAKERS, tensors_of
from bench.ops.measure import measure
from bench.ops.rows import FORWARD_ONLY, IMPLEMENTATIONS, OpCase, OpJob, OpRow
from bench.ops.side import OpSide
from bench.run.checkouts import copy_tree
from bench.run.runner import run_job
from bench.run.side import Question, SideError
from bench.store.lines import ResultError, read_lines
from dig.environment import ROOT
from dig.ops import srem
from tests.helpers import relative_error

SREM = OpCase(
    op="srem", implementation="reference", model="DiG-S/8", resolution=64, mode="forward", dtype="fp32", device="cpu"
)
CALLED = {
    "gla": ({"gla_mixer"}, {"gla_mixer_backward"}),
    "srem": ({"srem"}, {"srem_backward"}),
    "adaln": ({"residual_norm_modulate"}, {"norm_modulate_backward"}),
    "swiglu": ({"swiglu"}, {"swiglu_backward"}),
    "products": ({"project_up"}, {"project_down_backward"}),
    "condition": ({"condition"}, set[str]()),
    "weights": ({"prepare_weights"}, {"gated_weight_gradient"}),
    "modulation": ({"modulation"}, {"modulation_backward"}),
}
"""Of each operation here, those registered with PyTorch that its call makes: forward, and beside them in training."""
ALSO = {
    "gla": "gla",  # Without gates and norms, and with them but without the projection: the same kernels.
    "gla_backward": "gla",
    "gla_block": "gla",
    "gla_block_backward": "gla",
    "gla_mixer_sums": "gla",  # What its backward pass begins with, apart.
    "norm_modulate": "adaln",  # The same kernel without a residual.
    "project_up_preparing": "products",  # With the weights; bench ops prepare times both ways in a step.
    "matrix_vectors": "modulation",  # Of one image; looked at below.
}
"""Registered operations that no call of `CALLED` makes, and the one here that they belong to."""
QUICK = Budget(settle_s=0.0, settle_max_s=0.0, min_samples=3, least_s=0.0, target_s=0.0, max_samples=3)
SLOWED = """

_call = reference_srem

def reference_srem(*arguments, **named):
    import time
    time.sleep(0.2)
    return _call(*arguments, **named)
"""


def test_a_slowed_operation_is_caught_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    base = copy_tree(ROOT, tmp_path / "base", "base")
    slow = copy_tree(ROOT, tmp_path / "slow", "slow")
    path = slow.root / "dig" / "ops" / "srem" / "reference.py"
    path.write_text(path.read_text() + SLOWED)
    swiglu = replace(SREM, op="swiglu", mode="train")
    # Of two operations that take a millisecond: what a busy machine does to either is less.
    plan = Plan(cases=(SREM, swiglu), launches=5, repeats=0, thresholds=Thresholds(time=4.0))
    told: list[tuple[str, int, int]] = []
    found = compare_checkouts(
        base, slow, plan, folder=tmp_path / "rows", on_start=lambda *now: told.append(now), side=OpSide
    )
    verdicts = {finding.case: finding.verdict for finding in found.findings}
    assert verdicts[SREM] == "slower"
    assert verdicts[swiglu] in ("same", "ambiguous")
    assert exit_status(found.findings) == 1
    assert {finding.metric for finding in found.findings} == {"time"}
    written = read_lines(tmp_path / "rows" / "change.jsonl", OpRow.from_json).rows
    assert written == found.change
    slowest = [row.median_ms for row in written if row.case == SREM]
    assert len(slowest) == 5
    assert min(slowest) > 200
    assert {row.environment["commit"] for row in written} == {"slow"}
    # Of each of 2 operations, 2 sides and 6 launches, one of which is untimed.
    assert told[0] == (told[0][0], 0, 24)
    assert told[0][0].endswith(": importing")
    measured = [(text, done) for text, done, _ in told if text.endswith(": measuring")]
    assert [done for _, done in measured] == list(range(24))
    assert sum("srem (reference) of DiG-S/8 64px forward" in text for text, _ in measured) == 12
    assert "launch 5 of 5, case " in measured[-1][0]
    doing = [text.rpartition(": ")[2] for text, done, _ in told if done == 23]
    assert doing == ["starting and importing", "building and tuning kernels", "measuring"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda x, *rest, **named: x * float("nan"), "not finite"),
        (lambda x, *, other: x, "unexpected keyword argument"),
    ],
)
def test_an_operation_that_gives_nonsense_or_is_called_otherwise_is_a_row(
    other: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(srem.IMPLEMENTATIONS, "reference", other)
    row = measure(OpJob(case=SREM, budget=QUICK, environment={}, launch=2))
    assert (row.status, row.launch, row.samples_ms) == ("error", 2, ())
    assert message in row.message


def test_a_launch_that_dies_is_a_row(tmp_path: Path) -> None:
    side = copy_tree(ROOT, tmp_path / "side", "side")
    path = side.root / "dig" / "ops" / "srem" / "reference.py"
    path.write_text(path.read_text() + "\n\ndef reference_srem(*a, **n):\n    __import__('os')._exit(3)\n")
    with OpSide(side, time_limit=60) as process:
        row = process.measure(SREM, budget=QUICK, launch=2)
    assert (row.status, row.launch) == ("error", 2)
    assert "the process ended with status 3" in row.message


@pytest.mark.parametrize(
    ("op", "mode"),
    [
        *((op, "train") for op in IMPLEMENTATIONS if op not in FORWARD_ONLY),
        *((op, "forward") for op in FORWARD_ONLY),
        ("products", "forward"),
        ("modulation", "forward"),
    ],
)
def test_every_operation_is_called_as_it_is(op: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels in Triton's interpreter, so that a call that no longer fits is seen without a GPU."""
    step = _small_step(monkeypatch, op=op, mode=mode)
    with _Seen() as seen:
        results = tensors_of(step())
    assert results
    assert all(torch.isfinite(tensor).all() for tensor in results)
    forward, backward = CALLED[op]
    assert seen.names == forward | (backward if mode == "train" else set())


class _Seen(TorchDispatchMode):
    """Names of this project's registered operations that are called within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "dig":
            self.names.add(function._schema.name.removeprefix("dig::"))
        return function(*args, **(kwargs or {}))


def _small_step(monkeypatch: pytest.MonkeyPatch, *, op: str, mode: str, **changes: Any) -> Any:
    monkeypatch.setattr(calls, "SIZES", {"S": (12, 192, 6)})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case: dict[str, Any] = {"implementation": "triton", "batch": 2, "dtype": "fp32", "device": device, **changes}
    return MAKERS[op](SimpleNamespace(size="S", side=2, mode=mode, **case))  # type: ignore[arg-type]


def test_every_registered_operation_belongs_to_one_that_is_timed() -> None:
    found = [
        name
        for path in (ROOT / "dig").rglob("*.py")
        for name in re.findall(r'^@operation\("dig::(\w+)"\)', path.read_text(), re.MULTILINE)
    ]
    timed = {name for forward, backward in CALLED.values() for name in forward | backward}
    assert set(CALLED) == set(IMPLEMENTATIONS) == set(MAKERS) == {*CALLED, *ALSO.values()}
    assert sorted(found) == sorted([*timed, *ALSO])


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("op", ["gla", "srem", "adaln", "swiglu", "modulation"])
def test_a_call_is_of_the_images_of_its_case(op: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = _small_step(monkeypatch, op=op, mode="forward", batch=3, implementation=implementation)
    assert [len(tensor) for tensor in tensors_of(step())] in ([3], [3, 3])


@pytest.mark.parametrize(
    ("model", "resolution", "side"), [("DiG-S/2", 1792, 112), ("DiG-S/4", 256, 8), ("DiG-S/8", 64, 1)]
)
def test_an_image_has_the_tokens_of_its_models_patches(model: str, resolution: int, side: int) -> None:
    assert replace(SREM, model=model, resolution=resolution).side == side


@pytest.mark.parametrize(("warmup", "marks"), [("bound", ("unsteady",)), ("steady", ()), ("none", ())])
def test_times_that_never_settled_are_marked(
    warmup: str, marks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = Sampled(samples_ms=(1.0, 2.0), host_ms=1.0, stop_reason="time", warmup=warmup, warmup_steps=1)
    monkeypatch.setattr("bench.ops.measure.sample", lambda *_, **__: sampled)
    row = measure(OpJob(case=SREM, budget=QUICK, environment={}))
    assert (row.status, row.marks) == ("ok", marks)


@pytest.mark.parametrize(("returned", "marks"), [(False, ("unwatched", "memory-kept")), (True, ("unwatched",))])
def test_memory_that_does_not_come_back_is_marked(
    returned: bool, marks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = OpRow(case=SREM, status="ok", started_at="2026-01-01T00:00:00+00:00", samples_ms=(1.0,), marks=("unwatched",))
    monkeypatch.setattr("bench.ops.side.run_job", lambda *_, **__: row.to_json())
    monkeypatch.setattr("bench.ops.side.Referee.wait_for_memory", lambda self: returned)
    question = Question(case=json.loads(row.to_json())["case"], budget=QUICK, launch=0, time_limit=9.0)
    answered = OpRow.from_json(side._start()(question, lambda doing: None))
    assert answered == replace(row, marks=marks)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_modulation_is_that_of_the_reference(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same inputs give the same results; one image takes the kernel of a matrix and a vector."""
    found = []
    for implementation in ("triton", "reference"):
        for mode in ("forward", "train"):
            torch.manual_seed(1)
            step = _small_step(monkeypatch, op="modulation", mode=mode, batch=batch, implementation=implementation)
            with _Seen() as seen:
                found.append(tensors_of(step()))
            kernel = "matrix_vectors" if batch == 1 else "modulation"
            assert (kernel in seen.names) == (implementation == "triton")
    forward, both, reference, gradients = found
    for ours, theirs in zip([*forward, *both], [*reference, *reference, *gradients], strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_rows_are_read_as_they_were_written_and_nothing_else_is() -> None:
    row = OpRow(case=SREM, status="ok", started_at="2026-01-01T00:00:00+00:00", samples_ms=(1.0, 3.0, 2.0), launch=1)
    assert OpRow.from_json(row.to_json()) == row
    assert row.median_ms == 2
    record = json.loads(row.to_json())
    for changed, message in (
        ({"kind": "sampling"}, "not of kind 'op'"),
        ({"schema": 2}, "of schema 2"),
        ({"samples_ms": []}, "exactly if status is ok"),
        ({"samples_ms": [0.0]}, "between 1 ns"),
        ({"case": {**record["case"], "op": "magic"}}, "op must be one of gla"),
        ({"more": 1}, "does not know"),
    ):
        with pytest.raises(ResultError, match=message):
            OpRow.from_json(json.dumps({**record, **changed}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--op glu", "unknown --op 'glu': did you mean swiglu?"),
        ("--op ,", "--op needs at least one of"),
        ("--op gla --implementation fla", "unknown --implementation 'fla'"),
        ("--op gla --implementation triton", "triton runs on a GPU only, reference on both"),
        ("--op gla --implementation=", "unknown --implementation ''"),
        ("--op condition", "condition has no implementation for a CPU; it needs an NVIDIA GPU"),
        ("--op products --implementation triton", "products has no implementation for a CPU; it needs an NVIDIA GPU"),
        ("--op gla --mode both", "unknown --mode 'both'"),
        ("--op gla --model DiT-S/2", "these are DiG's operations; DiT-S/2 is none"),
        ("--op gla --model DiG-S", "DiG-S"),
        ("--op gla --resolution 100", "resolution 100 is not a multiple of 16"),
        ("--op gla --batch 0", "--batch must be at least 1"),
        ("--op gla --dtype fp16", "unknown --dtype 'fp16'"),
        ("--op gla --dtype=", "unknown --dtype ''"),
        ("--op gla --launches 4", "--launches must be at least 5"),
        ("--op gla --base=", "--base needs a revision"),
        ("--op gla --base no-such", "neither a revision nor a folder"),
        ("--op gla --device cuda", "no NVIDIA GPU was found"),
    ],
)
def test_bad_input(options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.cases.choices.gpu_present", lambda: False)
    result = CliRunner().invoke(app, ["ops", "compare", *options.split(), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1, result.output
    assert message in result.output


def test_an_operation_without_a_reference_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.cases.choices.gpu_present", lambda: True)
    words = ["ops", "compare", "--op", "condition", "--implementation", "reference", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert "condition has no 'reference'; it has triton" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--op gla --base main", "--op is no option of ops alone, but of a command: ops compare --op\n"),
        ("--cold 5", "No such option: --cold"),
    ],
)
def test_an_option_before_its_command_is_told_where_it_belongs(options: str, message: str) -> None:
    result = CliRunner().invoke(app, ["ops", *options.split()])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("\n") == 1


def test_all_operations_are_those_that_run_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[OpCase] = []

    def stop(plan: Plan[OpCase], *rest: object, **named: object) -> None:
        seen.extend(plan.cases)
        raise SideError("seen")

    monkeypatch.setattr(ops_compare, "RegressionGate", stop)
    on_a_cpu = {"gla", "srem", "adaln", "swiglu", "modulation"}
    for present, expected in ((False, on_a_cpu), (True, {*IMPLEMENTATIONS} - FORWARD_ONLY)):
        monkeypatch.setattr("bench.cases.choices.gpu_present", lambda present=present: present)
        seen.clear()
        assert CliRunner().invoke(app, ["ops", "compare", "--out", str(tmp_path)]).exit_code == 3
        assert {case.op for case in seen} == expected
        assert {case.implementation for case in seen} == {"triton" if present else "reference"}


@pytest.mark.gpu
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_operations_are_timed_on_a_gpu(op: str) -> None:
    case = replace(
        SREM,
        op=op,
        implementation="triton",
        model="DiG-S/2",
        resolution=512,
        mode="forward" if op in FORWARD_ONLY else "train",
        dtype="bf16",
        device="cuda",
    )
    job = OpJob(case=case, budget=QUICK, environment={})
    limits = Limits(prepare=300, measure=300)
    row = OpRow.from_json(run_job(job, limits=limits, entry="bench.ops.measure:measure_op"))
    assert row.status == "ok", row.message
    # A call takes microseconds, not the milliseconds of all calls together.
    assert 1e-4 < min(row.samples_ms) < 5

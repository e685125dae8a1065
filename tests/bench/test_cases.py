"""Sweeps and suites: which cases they hold, and what they refuse."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.cases.case import Case
from bench.cases.suites import (
    COMPARED,
    ON_CPU,
    PAPER_RESOLUTIONS,
    ModelChoice,
    best_suite,
    cpu_suite,
    paper_suite,
    suite,
    sweep,
)


def test_a_choice_names_family_implementation_and_options() -> None:
    choice = ModelChoice.parse("DiG:fla:variant=release")
    assert choice.family.name == "DiG"
    assert dict(choice.options) == {"backend": "fla", "variant": "release"}
    assert dict(ModelChoice.parse("Flash-DiT").options) == {"backend": "sdpa-flash"}


def test_the_device_decides_where_nothing_is_named() -> None:
    assert dict(ModelChoice.parse("DiG", "cpu").options) == {"backend": "reference"}
    assert dict(ModelChoice.parse("DiG", "cuda").options) == {"backend": "triton"}
    assert dict(ModelChoice.parse("DiG:fla", "cuda").options) == {"backend": "fla"}
    assert dict(ModelChoice.parse("Flash-DiT", "cuda").options) == {"backend": "sdpa-flash"}
    (case,) = sweep(["DiS"], resolutions=(256,))
    assert dict(case.options) == {"backend": "mamba-ssm"}


def test_sweep_keeps_the_models_of_one_comparison_together() -> None:
    cases = sweep(["DiG", "DiT"], resolutions=(256, 512), modes=("train", "forward"), executions=("eager",))
    assert [(c.resolution, c.mode, c.family) for c in cases[:3]] == [
        (256, "train", "DiG"),
        (256, "train", "DiT"),
        (256, "forward", "DiG"),
    ]
    assert len(cases) == 8


def test_paper_suite_is_both_figures_and_the_eager_probes() -> None:
    cases = paper_suite()
    models = len(COMPARED)
    assert len(set(cases)) == len(cases) == 26 * models
    graph_s = Counter((c.resolution, c.mode) for c in cases if c.execution == "graph" and c.size == "S")
    assert graph_s == {(r, m): models for r in PAPER_RESOLUTIONS for m in ("train", "forward")}
    assert Counter(c.size for c in cases if c.size != "S") == dict.fromkeys(("B", "L", "XL"), 2 * models)
    assert {c.resolution for c in cases if c.execution == "eager"} == {1024, 1792}
    assert {(c.device, c.dtype, c.batch) for c in cases} == {("cuda", "bf16", 1)}


def test_cpu_suite_runs_every_family_on_its_reference() -> None:
    cases = cpu_suite()
    assert {c.family for c in cases} == set(ON_CPU)
    assert {(c.device, c.execution) for c in cases} == {("cpu", "eager")}
    assert len({c.resolution for c in cases if c.mode == "train"}) >= 3
    assert {c.size for c in cases if c.mode == "forward"} == {"S", "B"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": ["Dig"]}, "did you mean DiG"),
        ({"models": ["DiG:flash"]}, "did you mean fla"),
        ({"models": ["DiG:scam=causal"]}, "did you mean scan"),
        ({"models": ["DiS"], "sizes": ["xl"]}, "did you mean XL"),
        ({"resolutions": [250]}, "the closest that is: 256"),
        ({"resolutions": [256], "patch": 3}, "multiple of 24|choose one of 2, 4, 8"),
        ({"batch": 0}, "batch must be a whole number from 1"),
        ({"modes": ["training"]}, "did you mean train"),
        ({"executions": ["graphs"]}, "did you mean graph"),
        ({"dtype": "fp16"}, "dtype must be one of bf16, fp32"),
        ({"device": "cpu", "executions": ["graph"]}, "use --executions eager"),
        ({"device": "cpu", "executions": ["eager"], "models": ["DiG:fla"]}, "DiG runs on a CPU with reference only"),
    ],
)
def test_bad_axes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(**{"models": ["DiG"], "resolutions": [256], **arguments})


def test_unknown_suite() -> None:
    with pytest.raises(ValueError, match="did you mean paper"):
        suite("papers")


def test_executions_that_compile_say_what_one_compilation_covers() -> None:
    one = Case(model="DiT-S/2", resolution=256, execution="compile")
    assert (one.scope, one.compiles, one.captures) == ("block", True, False)
    both = Case(model="DiT-S/2", resolution=256, execution="compiled-graph", scope="model", max_autotune=True)
    assert (both.compiles, both.captures) == (True, True)
    assert both.describe().startswith("DiT-S/2 256px train compiled-graph by model max-autotune bf16 batch 1")
    for fields in ({"scope": "block"}, {"max_autotune": True}):
        with pytest.raises(ValueError, match="are of compiled executions; this one is graph"):
            Case(model="DiT-S/2", resolution=256, execution="graph", **fields)


def test_weights_in_bf16_are_for_a_forward_pass() -> None:
    cast = Case(model="DiT-S/2", resolution=256, mode="forward", weights="bf16")
    assert cast.precision == "bf16-weights"
    for fields in ({"mode": "train"}, {"mode": "forward", "dtype": "fp32"}):
        with pytest.raises(ValueError, match="weights bf16 are for a forward pass in bf16"):
            Case(model="DiT-S/2", resolution=256, weights="bf16", **fields)
    cases = sweep(["DiT"], resolutions=(256,), modes=("train", "forward"), weights=("fp32", "bf16"))
    assert [(c.mode, c.weights) for c in cases] == [("train", "fp32"), ("forward", "fp32"), ("forward", "bf16")]


def test_the_best_suite_has_every_family_at_its_best_at_every_point() -> None:
    cases = best_suite()
    points: dict[tuple[object, ...], set[str]] = {}
    for case in cases:
        points.setdefault((case.size, case.resolution, case.mode, case.batch), set()).add(case.family)
    assert len(points) == 14
    assert all({"DiG", "Flash-DiT"} <= families for families in points.values())
    assert {c.family for c in cases} == {"DiG", "DiT", "Flash-DiT", "DiS"}
    assert all(c.captures and (c.compiles or dict(c.options)["backend"] == "triton") for c in cases)
    assert all(c.weights == ("bf16" if c.mode == "forward" else "fp32") for c in cases)
    backends = {dict(c.options)["backend"] for c in cases if c.family == "Flash-DiT"}
    assert backends == {"sdpa-cudnn", "flash-attn", "flash-attn-4", "flash-attn-4-padded"}
    # Whatever attention is compiled by block is compiled whole too, where tokens are not too many for that to gain.
    ways = {(c.resolution, c.size, c.mode, c.batch, c.model, c.options, c.scope) for c in cases if c.compiles}
    short = [way for way in ways if way[0] <= 1024 and way[4].startswith(("Flash-DiT", "DiT"))]
    by_block = [way for way in short if way[-1] == "block"]
    refused = [way for way in by_block if (*way[:-1], "model") not in ways]
    assert len(by_block) > 30
    assert [(way[1], way[2], dict(way[5])["backend"]) for way in refused] == [("XL", "train", "flash-attn-4")]
    # What tunes itself for minutes comes last.
    tunes = [dict(c.options)["backend"] == "fla" for c in cases]
    assert tunes == sorted(tunes)
    assert any(tunes)

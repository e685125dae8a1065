"""An operation is compared as the model runs it: with the model's strides, and compiled where the case compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import baselines.attention
from baselines import selective_scan
from bench.cases.case import Case
from bench.cases.jobs import CaseJob
from bench.measure.case import measure_case
from bench.measure.steps import build_step, compile_parts
from bench.parity import compiling
from bench.parity.error import ParityError
from bench.parity.operation import check_operation, compare
from dig import block
from dig.layers import Backbone
from dig.operation import Operation
from dig.spec import create_model
from tests.bench.test_fooled import SHORT, Scaled

pytestmark = pytest.mark.usefixtures("shallow")

EAGER = Case(model="Flash-DiT-S/4", resolution=256, batch=2, dtype="fp32", device="cpu", mode="train")
COMPILED = replace(EAGER, execution="compile")
MODELS = {"sdpa-flash": "Flash-DiT-S/4", "materialized": "DiT-S/4"}
Attend = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _compiled_without_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What Inductor takes most of the time for is not what is tested here; and nothing was compiled before."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model_of(case: Case) -> Backbone:
    return create_model(case.model, image_size=case.resolution, **dict(case.options))


def strided(*tensors: Tensor) -> bool:
    return not any(tensor.is_contiguous() for tensor in tensors)


def being_compiled(*tensors: Tensor) -> bool:
    return torch.compiler.is_compiling()


def plant(monkeypatch: pytest.MonkeyPatch, name: str, factor: float, when: Callable[..., bool]) -> None:
    """Attention whose gradient of one input is off while something holds."""
    right = baselines.attention.attend

    def wrong(backend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = {"q": q, "k": k, "v": v}
        if when(given[name]):
            given[name] = Scaled.apply(given[name], factor)
        return right(backend, given["q"], given["k"], given["v"])

    monkeypatch.setattr(baselines.attention, "attend", wrong)


@pytest.mark.parametrize("backend", MODELS)
@pytest.mark.parametrize("factor", [1.05, 1.5, 0.0])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_gradient_that_is_wrong_for_the_models_strides_is_refused(
    name: str, factor: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(EAGER, model=MODELS[backend])
    plant(monkeypatch, name, factor, strided)
    off = abs(factor - 1)
    with pytest.raises(ParityError, match=rf"the gradient of {name} of its operation is off by {off:.2g}0?;"):
        check_operation(case, model_of(case))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", MODELS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_gradient_that_is_wrong_while_it_is_compiled_is_refused(
    name: str, backend: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(COMPILED, model=MODELS[backend], dtype=dtype)
    plant(monkeypatch, name, 1.05, being_compiled)
    with pytest.raises(ParityError, match=rf"the gradient of {name} of its operation \(compiled\) is off by 0.0[45]"):
        check_operation(case, model_of(case))
    # Of a case that isn't compiled it is not asked.
    assert check_operation(replace(case, execution="eager", scope=""), model_of(case)) is not None


def test_a_last_token_that_is_wrong_while_it_is_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = baselines.attention.attend

    def wrong(*given: Any) -> Tensor:
        output = right(*given)
        return torch.cat([output[:, :-1], 1.5 * output[:, -1:]], 1) if torch.compiler.is_compiling() else output

    monkeypatch.setattr(baselines.attention, "attend", wrong)
    case = replace(COMPILED, mode="forward")
    with pytest.raises(ParityError, match=r"the output of its operation \(compiled\) is off by"):
        check_operation(case, model_of(case))


def test_an_operation_that_fails_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = baselines.attention.attend

    def failing(backend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return right(backend, q, k, v.unflatten(1, (3, -1)).flatten(1, 2) if torch.compiler.is_compiling() else v)

    monkeypatch.setattr(baselines.attention, "attend", failing)
    with pytest.raises(ParityError, match=r"its operation \(compiled\) cannot be compared; alone it fails: "):
        check_operation(COMPILED, model_of(COMPILED))


def test_memory_that_runs_out_while_it_is_compiled_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is marked, as where the truth does not fit."""

    def full(function: Any, **options: Any) -> Any:
        def run(given: Any) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    monkeypatch.setattr(torch, "compile", full)
    assert check_operation(COMPILED, model_of(COMPILED)) is None


@pytest.mark.parametrize("setting", [{"disable": True}, {"recompile_limit": 0}])
def test_an_operation_that_is_not_compiled_after_all_is_refused(setting: dict[str, Any]) -> None:
    """PyTorch runs it eagerly, and says nothing or logs a warning."""
    with (
        torch._dynamo.config.patch(setting),
        pytest.raises(ParityError, match=r"its operation \(compiled\) cannot be compared; alone it ran eagerly"),
    ):
        check_operation(COMPILED, model_of(COMPILED))


@pytest.mark.parametrize("max_autotune", [False, True])
def test_the_operation_is_compiled_as_the_model_is(max_autotune: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(COMPILED, max_autotune=max_autotune)
    model, given = model_of(case), list[dict[str, Any]]()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: given.append(options))
    compile_parts(model, scope="model", max_autotune=max_autotune)
    right = torch.compile

    def compiling_with(function: Any, **options: Any) -> Any:
        given.append(options)
        return right(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compiling_with)
    check_operation(case, model)
    assert given == 2 * [compiling.compile_options(max_autotune=max_autotune)]
    assert ("mode" in given[0]) == max_autotune


@pytest.mark.parametrize("execution", ["eager", "compile"])
@pytest.mark.parametrize("mode", ["train", "forward"])
@pytest.mark.parametrize("model", ["DiG", "DiT", "Flash-DiT", "DiS"])
def test_what_is_right_passes_compiled_too(model: str, mode: Any, execution: Any) -> None:
    # DiS' reference is unrolled token by token.
    case = replace(EAGER, model=f"{model}-S/8", resolution=128, mode=mode, execution=execution)
    found = check_operation(case, model_of(case))
    assert found is not None
    assert found.error < found.bound / 10


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("when", [strided, being_compiled])
def test_a_compiled_case_whose_operation_is_wrong_has_no_time(
    when: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, as a worker goes. Whole steps don't show it: v's gradient is most of their projection's."""
    plant(monkeypatch, name, 1.05, when)
    monkeypatch.setattr("baselines.dit.attend", baselines.attention.attend)
    row = measure_case(CaseJob(case=COMPILED, budget=SHORT, environment={}, matmul_ceiling=None))
    assert (row.status, f"the gradient of {name} of its operation" in row.message) == ("error", True), row.message


def test_a_compiled_case_whose_operation_is_right_has_a_time() -> None:
    row = measure_case(CaseJob(case=COMPILED, budget=SHORT, environment={}, matmul_ceiling=None))
    assert row.status == "ok", row.message
    assert row.checks is not None
    assert row.checks.operation_error is not None


def layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


@pytest.mark.parametrize(("mode", "weights"), [("train", "fp32"), ("forward", "fp32"), ("forward", "bf16")])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("model", ["DiG", "DiT", "Flash-DiT", "DiS"])
def test_an_operations_tensors_lie_as_the_models_do(
    model: str, batch: int, mode: Any, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What attention, DiG's mixer and DiS' scan are called with by the step, and by the check."""
    seen: list[tuple[Any, ...]] = []

    def looking(function: Any) -> Any:
        def looked(*given: Any) -> Any:
            seen.append(tuple(layout(each) for each in given if isinstance(each, Tensor)))
            return function(*given)

        return looked

    if model == "DiG":
        monkeypatch.setattr(block.GatedLinearAttention, "mix", looking(block.GatedLinearAttention.mix))
    elif model == "DiS":
        right = selective_scan.reference_direction
        # Of weights the model has parameters, the check wide copies.
        monkeypatch.setitem(
            selective_scan.IMPLEMENTATIONS,
            "reference",
            lambda xz, weights, out_proj: right(looking(lambda same: same)(xz), weights, out_proj),
        )
    else:
        for module in ("baselines.attention", "baselines.dit"):
            monkeypatch.setattr(f"{module}.attend", looking(baselines.attention.attend))
    case = Case(
        model=f"{model}-S/4", resolution=128, batch=batch, mode=mode, dtype="bf16", weights=weights, device="cpu"
    )
    step = build_step(case)
    step.run()
    of_step = set(seen)
    seen.clear()
    assert check_operation(case, step.model) is not None
    assert set(seen) == of_step


def test_a_truth_that_is_wrong_for_some_strides_is_not_asked_for_them() -> None:
    """Else it would agree with what it is to find out."""

    def wrong(given: Mapping[str, Tensor]) -> Tensor:
        return given["x"] if given["x"].is_contiguous() else 2 * given["x"]

    operation = Operation(inputs={"x": torch.randn(2, 9, 3, 4).unbind(2)[0]}, run=wrong, truth=wrong)
    with pytest.raises(ParityError, match="the output of its operation is off by 1;"):
        compare(operation, "fp32", gradients=False, what="it")

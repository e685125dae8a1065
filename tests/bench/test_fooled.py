"""What a benchmark can be fooled by: each is a model or an operation that is fast and wrong, and is refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.attention import attention_of, exact_attention
from bench.cases.case import Case
from bench.cases.jobs import Budget, CaseJob
from bench.measure import recheck as checking
from bench.measure.case import measure_case
from bench.measure.recheck import look_before, recheck
from bench.measure.steps import Step, build_step, repeated_blocks
from bench.measure.timing import check_span, sample
from bench.parity.error import ParityError
from bench.parity.inputs import fill_zeros, refuse_zeros
from bench.parity.operation import check_operation, compare
from dig.operation import Operation
from dig.spec import create_model

FORWARD = Case(model="Flash-DiT-S/8", resolution=128, dtype="fp32", device="cpu", mode="forward")
TRAIN = replace(FORWARD, mode="train")
Run = Callable[[Mapping[str, Tensor]], Tensor]
SMALL = {"depth": 2, "width": 64, "heads": 4}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every S is a model of two blocks."""
    import baselines.dit

    monkeypatch.setitem(baselines.dit.SIZES, "S", tuple(SMALL.values()))


def spoil(step: Step, wrong: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
    """Let a model compute otherwise; its step calls it as before."""
    monkeyed: Any = step.model
    monkeyed.forward = wrong(monkeyed.forward)


def test_what_is_right_passes() -> None:
    step = build_step(FORWARD)
    assert recheck(FORWARD, step, step.run) == pytest.approx(0, abs=1e-6)
    step = build_step(TRAIN)
    for _ in range(2):
        step.run()
    assert recheck(TRAIN, step, step.run) == pytest.approx(0, abs=1e-6)


def test_an_output_that_is_kept_from_the_inputs_before_is_refused() -> None:
    step = build_step(FORWARD)
    kept = step.run().clone()
    with pytest.raises(ParityError, match="on other inputs, its output differs from its eager step's"):
        recheck(FORWARD, step, lambda: kept)


def test_an_output_that_is_cached_by_its_inputs_addresses_is_refused() -> None:
    step = build_step(FORWARD)

    def caching(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        known: dict[int, Tensor] = {}

        def cached(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            if x.data_ptr() not in known:
                known[x.data_ptr()] = forward(x, t, y)
            return known[x.data_ptr()]

        return cached

    spoil(step, caching)
    step.run()
    with pytest.raises(ParityError, match="differs from its reference's"):
        recheck(FORWARD, step, step.run)


def test_a_kernel_that_stops_writing_after_some_calls_is_refused() -> None:
    step = build_step(FORWARD)
    calls = 0

    def tiring(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def tired(*inputs: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return forward(*inputs) if calls <= 3 else torch.zeros_like(inputs[0]).repeat(1, 2, 1, 1)

        return tired

    spoil(step, tiring)
    for _ in range(5):
        step.run()
    with pytest.raises(ParityError, match="differs from its reference's"):
        recheck(FORWARD, step, step.run)


def cached_by_address(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    known: dict[int, Tensor] = {}

    def cached(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return known.setdefault(x.data_ptr(), forward(x, t, y))

    return cached


def after_calls(
    calls: int, wrong: Callable[[Tensor], Tensor]
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """A fault that begins after so many calls."""

    def tiring(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        made = 0

        def tired(*inputs: Tensor) -> Tensor:
            nonlocal made
            made += 1
            output = forward(*inputs)
            return output if made <= calls else wrong(output)

        return tired

    return tiring


def half_the_gradient(output: Tensor) -> Tensor:
    return 0.5 * output + 0.5 * output.detach()


FAULTS: dict[str, tuple[Case, Callable[[Callable[..., Tensor]], Callable[..., Tensor]], str]] = {
    "cached": (FORWARD, cached_by_address, "its output on their inputs is that on other inputs"),
    "stops": (FORWARD, after_calls(3, lambda output: 0 * output + 1), "its output is .* off what it was"),
    "trains on nothing": (TRAIN, after_calls(3, lambda output: 0 * output), "its loss is .* off what it was"),
    "half the gradient": (TRAIN, after_calls(3, half_the_gradient), "gradients of .* are not what they were"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_reference_sees_is_held_against_what_it_was_before(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any number of tokens, and in training: there the eager step has the fault too."""
    monkeypatch.setattr(checking, "REFERENCE_TOKENS", 0)
    case, wrong, said = FAULTS[fault]
    step = build_step(case)
    spoil(step, wrong)
    before = look_before(case, step)
    for _ in range(5):
        step.run()
    with pytest.raises(ParityError, match=said):
        recheck(case, step, step.run, before)


@pytest.mark.parametrize("case", [FORWARD, TRAIN])
def test_what_is_right_is_what_it_was_before(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "REFERENCE_TOKENS", 0)
    step = build_step(case)
    given = [tensor.clone() for tensor in step.tensors]
    drawn = torch.random.get_rng_state()
    before = look_before(case, step)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(a, b) for a, b in zip(step.tensors, given, strict=True))
    for _ in range(3):
        step.run()
    assert recheck(case, step, step.run, before) == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(step.tensors, given, strict=True))


SHORT = Budget(settle_s=0, settle_max_s=0, min_samples=3, least_s=0, target_s=0, max_samples=3)


@pytest.mark.parametrize("fault", [*FAULTS, "operation", "zeros"])
def test_a_case_that_is_fooled_has_no_time(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, as a worker goes: the row is an error."""
    monkeypatch.setattr(checking, "REFERENCE_TOKENS", 0)
    case = FORWARD
    if fault in FAULTS:
        case, wrong, _ = FAULTS[fault]

        def spoiled(case: Case) -> Step:
            step = build_step(case)
            spoil(step, wrong)
            return step

        monkeypatch.setattr("bench.measure.case.build_step", spoiled)
    elif fault == "operation":
        monkeypatch.setattr(
            "bench.measure.case.check_operation", lambda case, model: (_ for _ in ()).throw(ParityError("dq is off"))
        )
    else:
        monkeypatch.setattr("bench.measure.steps.fill_zeros", lambda model: None)
    row = measure_case(CaseJob(case=case, budget=SHORT, environment={}, matmul_ceiling=None))
    assert row.status == "error", row.message
    assert not row.samples_ms


def test_a_case_that_is_right_has_a_time() -> None:
    for case in (FORWARD, TRAIN):
        row = measure_case(CaseJob(case=case, budget=SHORT, environment={}, matmul_ceiling=None))
        assert row.status == "ok", row.message
        assert "not-rechecked" not in row.marks


@pytest.mark.parametrize("fault", ["nothing", "half", "others"])
def test_a_training_step_that_moves_weights_otherwise_is_refused(fault: str) -> None:
    step = build_step(TRAIN)
    step.run()
    optimizer = step.optimizer
    assert optimizer is not None
    assert step.loss is not None

    def run() -> Tensor:
        loss = step.loss()  # type: ignore[misc]
        if fault != "nothing":
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad *= 0.5 if fault == "half" else 1
                        parameter.grad = parameter.grad.flip(0) if fault == "others" else parameter.grad
            optimizer.step()
        return loss.detach()

    with pytest.raises(ParityError, match=r"\d+ of \d+ parameters were not moved by the gradient of its eager step"):
        recheck(TRAIN, step, run)


def test_a_loss_of_other_inputs_is_refused() -> None:
    step = build_step(TRAIN)
    step.run()
    old = step.run().clone()
    with pytest.raises(ParityError, match="its loss differs"):
        recheck(TRAIN, step, lambda: (step.run(), 3 * old)[1])


def test_zeros_are_filled_or_refused() -> None:
    model = create_model("DiG-S/8", image_size=64)
    with pytest.raises(ParityError, match=r"is zero in \d+% of its values"):
        refuse_zeros(model.named_parameters())
    fill_zeros(model)
    refuse_zeros(model.named_parameters())
    latents = torch.randn(4, 4, 8, 8)
    latents[1:3] = 0
    with pytest.raises(ParityError, match="x is zero in 50% of its values"):
        refuse_zeros([("x", latents)])


def test_weights_that_became_zeros_while_they_were_timed_are_refused() -> None:
    step = build_step(FORWARD)
    with torch.no_grad():
        next(step.model.parameters()).zero_()
    with pytest.raises(ParityError, match="is zero in 100% of its values"):
        recheck(FORWARD, step, step.run)


def test_a_clock_that_a_model_replaced_is_not_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(settle_s=0, settle_max_s=0, min_samples=3, least_s=0, target_s=0, max_samples=3)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    found = sample(lambda: time.sleep(0.02), device="cpu", budget=budget)
    assert min(found.samples_ms) > 15


def test_the_devices_clock_is_held_against_the_hosts() -> None:
    check_span(events_ms=100, host_ms=101, left_ms=0.05)
    check_span(events_ms=10, host_ms=40, left_ms=0.05)  # The host was held up.
    with pytest.raises(ParityError, match="on another stream that they did not join"):
        check_span(events_ms=100, host_ms=101, left_ms=30)
    with pytest.raises(ParityError, match=r"took 200 ms by their events, 101 by the host's clock"):
        check_span(events_ms=200, host_ms=101, left_ms=0)
    with pytest.raises(ParityError, match="while the host waited 1000"):
        check_span(events_ms=10, host_ms=1000, left_ms=0)


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(context: Any, x: Tensor, factor: float) -> Tensor:
        context.factor = factor
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * context.factor, None


def attention(run: Run, tokens: int = 200, dtype: Any = torch.float32) -> Operation:
    shape = (2, tokens, 2, 72)
    inputs = {name: torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("qkv")}
    return Operation(
        inputs={name: x.to(dtype) for name, x in inputs.items()},
        run=run,
        truth=lambda given: exact_attention(given["q"], given["k"], given["v"]),
        per_token=frozenset("qkv"),
    )


def fused(given: Mapping[str, Tensor]) -> Tensor:
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("wrong", ["q", "k", "v"])
def test_a_gradient_of_one_input_that_is_off_by_5_percent_is_refused(wrong: str, dtype: Any, name: str) -> None:
    compare(attention(fused, dtype=dtype), name, gradients=True, what="it")

    def scaled(given: Mapping[str, Tensor]) -> Tensor:
        return fused({**given, wrong: Scaled.apply(given[wrong], 1.05)})

    with pytest.raises(ParityError, match=f"gradient of {wrong} of its operation is off by 0.05"):
        compare(attention(scaled, dtype=dtype), name, gradients=True, what="it")
    compare(attention(scaled, dtype=dtype), name, gradients=False, what="it")


@pytest.mark.parametrize("fault", ["last token", "overflow"])
def test_what_only_long_sequences_have_is_found(fault: str) -> None:
    def long_only(given: Mapping[str, Tensor]) -> Tensor:
        y = fused(given)
        if y.shape[1] <= 512:
            return y
        return torch.cat([y[:, :-1], 0 * y[:, -1:]], 1) if fault == "last token" else y * float("inf")

    compare(attention(long_only, 512, torch.bfloat16), "bf16", gradients=False, what="it")
    where = "is off by 1 in tokens 2047 to 2047" if fault == "last token" else "is off by inf"
    with pytest.raises(ParityError, match=where):
        compare(attention(long_only, 2048, torch.bfloat16), "bf16", gradients=False, what="it")


@pytest.mark.parametrize("model", ["DiG", "DiT", "Flash-DiT", "DiS"])
def test_every_familys_operation_agrees_with_its_truth(model: str) -> None:
    case = Case(model=f"{model}-S/4", resolution=128, batch=2, dtype="fp32", device="cpu", mode="train")
    found = check_operation(case, create_model(case.model, image_size=128))
    assert found is not None
    assert found.error < found.bound / 10


def test_the_truth_is_attention() -> None:
    config = create_model("DiT-S/8", image_size=128)
    operation = attention_of(config, 2, torch.float64)
    q, k, v = (operation.inputs[name].double() for name in "qkv")
    expected = torch.softmax(torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5, -1)
    expected = torch.einsum("bhij,bjhk->bihk", expected, v)
    torch.testing.assert_close(exact_attention(q, k, v), expected)


def test_blocks_are_found_wherever_they_are_and_once() -> None:
    dis = create_model("DiS-S/8", image_size=64)
    blocks = repeated_blocks(dis)
    assert [type(block).__name__ for block in blocks] == ["DiSBlock"] * 25
    assert len({id(block) for block in blocks}) == 25
    assert len(repeated_blocks(create_model("DiT-S/8", image_size=64))) == SMALL["depth"]

"""DiG on its own kernels computes what DiG's reference does, with the same weights, whatever the scan and the grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dig.model import DiG, DiGConfig
from tests.helpers import example, randomize, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE = DiGConfig(input_size=(6, 10), depth=4, width=64, heads=1, num_classes=3)
CASES = {
    "paper": BASE,
    "release, three blocks": replace(BASE, variant="release", depth=3),
    "bidirectional": replace(BASE, scan="bidirectional", depth=2),
    "causal, no convolution": replace(BASE, scan="causal", convolution="none", depth=1),
    "heads of 36": replace(BASE, width=144, heads=2, depth=1),
}


def twins(config: DiGConfig) -> tuple[DiG, DiG]:
    """The same weights on the reference and on the kernels."""
    reference = randomize(DiG(config)).eval()
    kernels = DiG(replace(config, recurrence="triton")).eval()
    kernels.load_state_dict(reference.state_dict())
    return reference.to(DEVICE), kernels.to(DEVICE)


@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient_in_fp32(name: str) -> None:
    reference, kernels = twins(CASES[name])
    inputs = example(reference)
    truth = reference.double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    weight = torch.randn_like(truth)
    (truth * weight).sum().backward()
    actual = kernels(*inputs)
    (actual * weight.float()).sum().backward()
    assert relative_error(actual, truth) < 1e-4
    expected = dict(reference.named_parameters())
    errors = {n: relative_error(p.grad, expected[n].grad) for n, p in kernels.named_parameters()}
    assert max(errors.values()) < 2e-3, errors


def test_bf16_autocast() -> None:
    """No further from the fp32 truth than the reference under the same autocast, by half."""
    reference, kernels = twins(BASE)
    inputs = example(reference)
    truth = reference(*inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        rounded, actual = reference(*inputs), kernels(*inputs)
    assert relative_error(actual, truth) < 1.5 * relative_error(rounded, truth)


def test_it_compiles_as_one_graph() -> None:
    """Forward and backward with no graph break; aot_eager traces all that inductor would, without its compiler."""
    _, kernels = twins(replace(BASE, depth=2))
    inputs = example(kernels)
    compiled = torch.compile(kernels, fullgraph=True, backend="aot_eager")
    output = compiled(*inputs)
    output.square().mean().backward()
    gradients = [p.grad.clone() for p in kernels.parameters()]
    kernels.zero_grad()
    plain = kernels(*inputs)
    plain.square().mean().backward()
    torch.testing.assert_close(output, plain)
    for compiled_gradient, parameter in zip(gradients, kernels.parameters(), strict=True):
        torch.testing.assert_close(compiled_gradient, parameter.grad, rtol=1e-4, atol=1e-6)

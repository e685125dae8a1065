"""What the baselines compute: attention by its kernels, the selective scan against its recurrence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.attention import attend
from baselines.dis import DiS, DiSConfig
from baselines.selective_scan import DirectionWeights, mamba_ssm_direction, reference_direction, selective_scan
from bench.models import create_model
from dig.layers import sincos_position_embedding
from tests.helpers import example, randomize, relative_error


def test_flash_dit_equals_dit_with_the_same_weights() -> None:
    dit = randomize(create_model("DiT-S/4", image_size=64)).eval()
    flash = create_model("Flash-DiT-S/4", image_size=64, backend="sdpa-flash").eval()
    flash.load_state_dict(dit.state_dict())
    inputs = example(dit)
    assert relative_error(flash(*inputs), dit(*inputs)) < 1e-5


def test_a_forced_kernel_that_cannot_run_raises() -> None:
    model = create_model("Flash-DiT-S/4", image_size=64, backend="sdpa-cudnn")
    with pytest.raises(RuntimeError, match=r"No (available kernel|viable backend)"):
        model(*example(model))


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attn_is_asked_to_repeat_itself(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package's function replaced: what it is called with, and that its layout is the one handed over."""
    asked: list[bool] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *, deterministic: bool) -> Tensor:
        asked.append(deterministic)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    monkeypatch.setattr("baselines.attention.require", lambda *_: SimpleNamespace(flash_attn_func=attend))
    dit = randomize(create_model("DiT-S/4", image_size=64)).eval()
    flash = create_model("Flash-DiT-S/4", image_size=64, backend="flash-attn").eval()
    flash.load_state_dict(dit.state_dict())
    inputs = example(dit)
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert relative_error(flash(*inputs), dit(*inputs)) < 1e-5
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(asked) == {deterministic}


def test_selective_scan_is_its_recurrence() -> None:
    B, E, N, T = 2, 3, 4, 9
    u, delta = torch.randn(B, E, T).double(), torch.rand(B, E, T).double()
    A, b, c = -torch.rand(E, N).double(), torch.randn(B, N, T).double(), torch.randn(B, N, T).double()
    expected = torch.zeros(B, E, T).double()
    for i in range(B):
        for e in range(E):
            h = torch.zeros(N).double()
            for t in range(T):
                h = torch.exp(delta[i, e, t] * A[e]) * h + delta[i, e, t] * b[i, :, t] * u[i, e, t]
                expected[i, e, t] = h @ c[i, :, t]
    assert relative_error(selective_scan(u, delta, A, b, c), expected) < 1e-12


@pytest.mark.parametrize("tokens", [1, 8, 13])
def test_mamba_ssm_is_given_whole_reads_and_dis_its_own_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package's function replaced by the reference: outputs and gradients are those of the tokens alone."""
    given: list[int] = []

    def mamba_inner_fn(xz: Tensor, *args: Any, delta_bias: Tensor, delta_softplus: bool) -> Tensor:
        given.append(xz.shape[-1])
        conv_weight, conv_bias, x_proj, dt_proj, out_proj, _, A, _, _, D = args
        weights = DirectionWeights(
            conv_weight=conv_weight,
            conv_bias=conv_bias,
            x_proj=x_proj,
            dt_proj=dt_proj,
            dt_bias=delta_bias,
            A=A,
            D=D,
        )
        return reference_direction(xz, weights, out_proj)

    monkeypatch.setattr("baselines.selective_scan.require", lambda *_: SimpleNamespace(mamba_inner_fn=mamba_inner_fn))
    mixer = randomize(DiS(DiSConfig(input_size=(8, 8), depth=2, width=32, num_classes=3))).mid_block.mixer
    E = mixer.in_proj.out_features // 2
    results = []
    for direction in (reference_direction, mamba_ssm_direction):
        xz = torch.randn(2, 2 * E, tokens, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = direction(xz, mixer.weights(""), mixer.out_proj.weight)
        (gradient,) = torch.autograd.grad(y.square().sum(), xz)
        results.append((y, gradient))
    assert given[0] % 8 == 0
    assert 0 <= given[0] - tokens < 8
    for right, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, right)


def test_dis_sees_both_directions() -> None:
    """A change in the last token must reach the first, and the other way round."""
    model = randomize(DiS(DiSConfig(input_size=(8, 8), depth=2, width=32, num_classes=3))).eval()
    x, t, y = example(model, 1)
    base = model(x, t, y)
    for row in (0, 7):
        changed = x.clone()
        changed[:, :, row, row] += 1
        assert (model(changed, t, y) - base)[:, :, 7 - row, 7 - row].abs().max() > 1e-7


def test_dis_blocks_and_skips() -> None:
    model = DiS(DiSConfig(input_size=(8, 8), depth=5, width=32, num_classes=3))
    assert (len(model.in_blocks), len(model.out_blocks)) == (2, 2)
    assert all(block.skip_linear is not None for block in model.out_blocks)
    rates = [block.drop_path.probability for block in (*model.in_blocks, model.mid_block, *model.out_blocks)]
    assert rates == pytest.approx([0, 0, 0.025, 0.05, 0.075])


def test_position_embedding_tells_rows_from_columns() -> None:
    embedding = sincos_position_embedding(16, (3, 5)).reshape(3, 5, 16)
    assert torch.equal(embedding[0, 2, :8], embedding[2, 2, :8])  # first half: the column
    assert torch.equal(embedding[1, 0, 8:], embedding[1, 4, 8:])  # second half: the row
    omega = 10_000.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(
        embedding[2, 3], torch.cat([f(p * omega) for p in (3, 2) for f in (torch.sin, torch.cos)])
    )
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_position_embedding(18, (2, 2))


def test_materialized_attention_is_softmax_attention() -> None:
    q, k, v = torch.randn(3, 2, 10, 6, 64).unbind(0)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(attend("materialized", q, k, v), expected)

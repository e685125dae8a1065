"""The published DiG names, there and back."""

from __future__ import annotations

import pytest
import torch

from bench.models import create_model
from dig.checkpoints import from_release, to_release
from tests.helpers import example, randomize

BLOCK = {
    "attn.q_proj.weight": (192, 384),
    "attn.k_proj.weight": (192, 384),
    "attn.v_proj.weight": (384, 384),
    "attn.g_proj.weight": (384, 384),
    "attn.gk_proj.0.weight": (16, 384),
    "attn.gk_proj.1.weight": (192, 16),
    "attn.gk_proj.1.bias": (192,),
    "attn.g_norm_swish_gate.weight": (64,),
    "attn.o_proj.weight": (384, 384),
    "mlp.gate_proj.weight": (2048, 384),
    "mlp.down_proj.weight": (384, 1024),
    "dw_conv.weight": (384, 1, 3, 3),
    "dw_conv.bias": (384,),
    "adaLN_modulation.1.weight": (2304, 384),
    "adaLN_modulation.1.bias": (2304,),
}
REST = {
    "pos_embed": (1, 256, 384),
    "x_embedder.proj.weight": (384, 4, 2, 2),
    "x_embedder.proj.bias": (384,),
    "t_embedder.mlp.0.weight": (384, 256),
    "t_embedder.mlp.0.bias": (384,),
    "t_embedder.mlp.2.weight": (384, 384),
    "t_embedder.mlp.2.bias": (384,),
    "y_embedder.embedding_table.weight": (1001, 384),
    "final_layer.linear.weight": (32, 384),
    "final_layer.linear.bias": (32,),
    "final_layer.adaLN_modulation.1.weight": (768, 384),
    "final_layer.adaLN_modulation.1.bias": (768,),
}


def published_dig_s2() -> dict[str, torch.Tensor]:
    shapes = REST | {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in BLOCK.items()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_published_dig_loads_strictly_and_comes_back_unchanged() -> None:
    published = published_dig_s2()
    model = create_model("DiG-S/2", image_size=256, variant="release")
    model.load_state_dict(from_release(published), strict=True)
    restored = to_release(model.state_dict())
    assert restored.keys() == published.keys()
    assert all(torch.equal(restored[name], published[name]) for name in published)


def test_each_projection_lands_where_it_is_used() -> None:
    """Zeroing one published projection must silence that one: swapping two rows of the fused matrix would not."""
    model = create_model("DiG-S/2", image_size=256, variant="release")
    model.load_state_dict(from_release(published_dig_s2()))
    attention = model.blocks[3].attn
    x = torch.randn(1, 5, 384)
    q, k, v, gate, low = attention.in_proj(x).split(attention.splits, -1)
    weights = to_release(model.state_dict())
    names = ("q_proj", "k_proj", "v_proj", "g_proj", "gk_proj.0")
    for actual, name in zip((q, k, v, gate, low), names, strict=True):
        torch.testing.assert_close(actual, x @ weights[f"blocks.3.attn.{name}.weight"].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_round_trip_computes_the_same(variant: str) -> None:
    first = randomize(create_model("DiG-S/4", image_size=64, variant=variant)).eval()
    second = create_model("DiG-S/4", image_size=64, variant=variant).eval()
    second.load_state_dict(from_release(to_release(first.state_dict())), strict=True)
    inputs = example(first)
    torch.testing.assert_close(second(*inputs), first(*inputs), rtol=0, atol=0)


def test_a_missing_part_of_the_fused_projection_is_named() -> None:
    published = published_dig_s2()
    del published["blocks.7.attn.k_proj.weight"]
    with pytest.raises(KeyError, match=r"blocks\.7\.attn\.k_proj\.weight"):
        from_release(published)


def test_a_foreign_name_reaches_strict_loading() -> None:
    model = create_model("DiG-S/2", image_size=256, variant="release")
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.extra"):
        model.load_state_dict(from_release({**published_dig_s2(), "blocks.0.attn.extra": torch.zeros(1)}), strict=True)

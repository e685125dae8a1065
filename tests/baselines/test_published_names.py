"""DiT and DiS take their published state_dicts as they are."""

from __future__ import annotations

import pytest
import torch

from bench.models import create_model
from tests.dig.test_checkpoints import REST

DIT_BLOCK = {
    "attn.qkv.weight": (1152, 384),
    "attn.qkv.bias": (1152,),
    "attn.proj.weight": (384, 384),
    "attn.proj.bias": (384,),
    "mlp.fc1.weight": (1536, 384),
    "mlp.fc1.bias": (1536,),
    "mlp.fc2.weight": (384, 1536),
    "mlp.fc2.bias": (384,),
    "adaLN_modulation.1.weight": (2304, 384),
    "adaLN_modulation.1.bias": (2304,),
}
DIS_MIXER = {
    "A_log": (736, 16),
    "D": (736,),
    "conv1d.weight": (736, 1, 4),
    "conv1d.bias": (736,),
    "x_proj.weight": (55, 736),
    "dt_proj.weight": (736, 23),
    "dt_proj.bias": (736,),
    "A_b_log": (736, 16),
    "D_b": (736,),
    "conv1d_b.weight": (736, 1, 4),
    "conv1d_b.bias": (736,),
    "x_proj_b.weight": (55, 736),
    "dt_proj_b.weight": (736, 23),
    "dt_proj_b.bias": (736,),
    "in_proj.weight": (1472, 368),
    "out_proj.weight": (368, 736),
}
DIS_REST = {
    "pos_embed": (1, 258, 368),
    "patch_embed.proj.weight": (368, 4, 2, 2),
    "patch_embed.proj.bias": (368,),
    "time_embed.0.weight": (1472, 368),
    "time_embed.0.bias": (1472,),
    "time_embed.2.weight": (368, 1472),
    "time_embed.2.bias": (368,),
    "label_emb.embedding_table.weight": (1001, 368),
    "norm_f.weight": (368,),
    "final_layer.linear.weight": (32, 368),
    "final_layer.linear.bias": (32,),
    "final_layer.adaLN_modulation.1.weight": (736, 368),
    "final_layer.adaLN_modulation.1.bias": (736,),
}


def dit_shapes() -> dict[str, tuple[int, ...]]:
    return REST | {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in DIT_BLOCK.items()}


def dis_shapes() -> dict[str, tuple[int, ...]]:
    shapes = dict(DIS_REST)
    places = [f"in_blocks.{i}" for i in range(12)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(12)]
    for place in places:
        shapes |= {f"{place}.mixer.{name}": shape for name, shape in DIS_MIXER.items()}
        shapes[f"{place}.norm.weight"] = (368,)
        if place.startswith("out"):
            shapes |= {f"{place}.skip_linear.weight": (368, 736), f"{place}.skip_linear.bias": (368,)}
    return shapes


@pytest.mark.parametrize(
    ("name", "shapes"), [("DiT-S/2", dit_shapes()), ("Flash-DiT-S/2", dit_shapes()), ("DiS-S/2", dis_shapes())]
)
def test_published_state_dict_loads_strictly(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    model = create_model(name, image_size=256)
    published = {key: torch.randn(shape) for key, shape in shapes.items()}
    model.load_state_dict(published, strict=True)
    assert all(torch.equal(tensor, published[key]) for key, tensor in model.state_dict().items())

"""DiT under diffusers' names (``DiTTransformer2DModel``), to and from this project's, which are Meta's.

diffusers keeps q, k and v as layers of their own, and a copy of the embeddings of time and label in every block. It
leaves out the fixed embedding of positions. The numbers are the same.

One thing is not: diffusers spaces the frequencies of the timestep's embedding by 1/127 of their range instead of Meta's
1/128 (``downscale_freq_shift=1``), and so feeds the same weights other sinusoids than they were trained on, at every
timestep but 0. `match_frequencies` puts that right in a loaded model.

Shapes: D width, N blocks, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dig.layers import sincos_position_embedding

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
"""What a config.json calls the model; the second is what the hub's DiTs were saved as."""
NULL_LABEL = 1000
"""The label that diffusers' ``DiTPipeline`` takes for no class, however many classes there are."""
EPS = 1e-6
"""Of every layer norm, Meta's; diffusers' own default for the second norm of a block is 1e-5."""

_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_REPEATED = {
    "norm1.emb.timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
    "norm1.emb.timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
    "norm1.emb.timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
    "norm1.emb.timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
    "norm1.emb.class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_PARTS = ("weight", "bias")


def _layers(depth: int) -> Iterator[tuple[str, str]]:
    """diffusers' and our name of every layer that is one in both."""
    yield from _OUTSIDE.items()
    for block in range(depth):
        for theirs, ours in _BLOCK.items():
            yield f"transformer_blocks.{block}.{theirs}", f"blocks.{block}.{ours}"


def depth_of(state: Mapping[str, Tensor], prefix: str) -> int:
    """N, from names such as ``blocks.3.``."""
    found = [name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)]
    return 1 + max((int(word) for word in found if word.isdecimal() and len(word) < 6), default=-1)


def to_diffusers(state: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """Our names to diffusers'.

    A label embedding of fewer classes than 1000 is filled up with the null label's row, so that ``DiTPipeline``, whose
    null label is always 1000, finds it there.

    Args:
        state: A DiT's state dict.
        grid: Its (rows, columns) of tokens.

    Raises:
        ValueError: Its embedding of positions is not the fixed one, for which diffusers has no place.
    """
    positions = state["pos_embed"]
    if not torch.allclose(positions.float(), sincos_position_embedding(positions.shape[2], grid), atol=1e-5):
        raise ValueError("this DiT's embedding of positions is not the fixed one, and diffusers' DiT has no other")
    depth = depth_of(state, "blocks.")
    renamed = {f"{theirs}.{part}": state[f"{ours}.{part}"] for theirs, ours in _layers(depth) for part in _PARTS}
    labels = state["y_embedder.embedding_table.weight"]
    if (filling := NULL_LABEL + 1 - len(labels)) > 0:
        labels = torch.cat([labels, labels[-1:].expand(filling, -1)])
    shared = {**state, "y_embedder.embedding_table.weight": labels}
    for block in range(depth):
        prefix = f"transformer_blocks.{block}."
        renamed |= {f"{prefix}{theirs}": shared[ours] for theirs, ours in _REPEATED.items()}
        for part in _PARTS:
            rows = state[f"blocks.{block}.attn.qkv.{part}"].chunk(3)
            renamed |= {f"{prefix}{name}.{part}": row for name, row in zip(_QKV, rows, strict=True)}
    return {name: tensor.clone().contiguous() for name, tensor in renamed.items()}


def from_diffusers(state: Mapping[str, Tensor], grid: tuple[int, int], classes: int | None = None) -> dict[str, Tensor]:
    """diffusers' names to ours; load the result with ``strict=True``.

    Args:
        state: Of a ``DiTTransformer2DModel``.
        grid: Its (rows, columns) of tokens.
        classes: How many classes there are, where the label embedding was filled up; its last row is the null label's.

    Raises:
        KeyError: A tensor is missing.
        ValueError: There is one too many, or the blocks' copies of an embedding differ.
    """
    depth = depth_of(state, "transformer_blocks.")
    renamed = {f"{ours}.{part}": state[f"{theirs}.{part}"] for theirs, ours in _layers(depth) for part in _PARTS}
    known = {f"{theirs}.{part}" for theirs, _ in _layers(depth) for part in _PARTS}
    for theirs, ours in _REPEATED.items():
        copies = [f"transformer_blocks.{block}.{theirs}" for block in range(depth)]
        first = state[copies[0]] if copies else torch.empty(0)
        for copy in copies:
            if not torch.equal(state[copy], first):
                raise ValueError(
                    f"{copy} differs from the first block's: it was trained as a copy of its own, which DiT has not"
                )
        renamed[ours] = first
        known |= set(copies)
    labels = renamed["y_embedder.embedding_table.weight"]
    if classes is not None and classes + 1 < len(labels):
        renamed["y_embedder.embedding_table.weight"] = torch.cat([labels[:classes], labels[-1:]])
    for block in range(depth):
        for part in _PARTS:
            rows = [f"transformer_blocks.{block}.{name}.{part}" for name in _QKV]
            renamed[f"blocks.{block}.attn.qkv.{part}"] = torch.cat([state[row] for row in rows])
            known |= set(rows)
    if alien := sorted(state.keys() - known - {"pos_embed.pos_embed"}):
        raise ValueError(f"it has {alien[0]}, which DiT has not ({len(alien)} such)")
    renamed["pos_embed"] = sincos_position_embedding(len(renamed["x_embedder.proj.weight"]), grid)
    return renamed


def config_of(
    *, depth: int, width: int, heads: int, side: int, channels: int, patch: int, classes: int
) -> dict[str, Any]:
    """Arguments of ``DiTTransformer2DModel``.

    Args:
        depth: N.
        width: D.
        heads: Of the attention.
        side: Of the square input.
        channels: Of the input.
        patch: Side of a patch.
        classes: Labels.
    """
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": 2 * channels,
        "num_layers": depth,
        "attention_bias": True,
        "sample_size": side,
        "patch_size": patch,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": max(classes, NULL_LABEL),
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": EPS,
    }


def match_frequencies(transformer: nn.Module) -> None:
    """Let a loaded ``DiTTransformer2DModel`` embed timesteps as its weights were trained: Meta's frequencies."""
    for module in transformer.modules():
        if hasattr(module, "downscale_freq_shift"):
            setattr(module, "downscale_freq_shift", 0)  # noqa: B010 - a number, to mypy a module

"""The long skips of the U-shaped DiG: who reads whom, in which order, how they start, and what they are called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dig.checkpoints import from_release, to_release
from dig.config import SIZES, heads_of
from dig.model import DiG, DiGConfig
from dig.scan import Route, ScanOrder
from tests.helpers import example, randomize, relative_error

CONFIG = DiGConfig(input_size=(4, 6), depth=8, width=32, heads=2, num_classes=3, skip="linear")


def parameters_of(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def step_by_step(model: DiG, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The authors' loop: tokens are moved after every block, kept ones on a stack, joined as they lie."""
    c = model.t_embedder(t) + model.y_embedder(y)
    x = model.x_embedder(x) + model.pos_embed
    rows, columns = model.grid
    kept: list[Tensor] = []
    depth = len(model.blocks)
    for i, block in enumerate(model.blocks):
        order = ScanOrder(transposed=i % 4 >= 2, reversed=i % 2 == 1)
        skip = (kept.pop(),) if i > depth // 2 else ()
        x = block(x, c, Route(grid=model.grid, source=order, order=order, target=order), *skip)
        if i % 2 == 1:
            shape = (columns, rows) if i % 4 >= 2 else (rows, columns)
            x = x.flip(1).unflatten(1, shape).transpose(1, 2).flatten(1, 2)
        else:
            x = x.flip(1)
        if i < depth // 2 - 1:
            kept.append(x)
    assert not kept
    return model.final_layer(x, c)


def tokens_of(model: DiG, inputs: tuple[Tensor, ...]) -> Tensor:
    """What the output head gives, before patches are put together."""
    found: list[Tensor] = []
    handle = model.final_layer.register_forward_hook(lambda module, arguments, output: found.append(output))
    model(*inputs)
    handle.remove()
    return found[0]


def test_as_released_it_is_the_authors_loop() -> None:
    """Of a square grid: on others, theirs folds the sequence as if it were one."""
    model = randomize(DiG(replace(CONFIG, input_size=(6, 6)))).eval()
    inputs = example(model)
    assert relative_error(tokens_of(model, inputs), step_by_step(model, *inputs)) < 1e-6


@pytest.mark.parametrize("input_size", [(4, 6), (6, 6), (2, 8)])
def test_the_two_orders_differ_in_every_other_skip(input_size: tuple[int, int]) -> None:
    """Tokens that carry their place as a number: aligned, each meets its own; released, in odd blocks another's."""
    for skip_order in ("released", "aligned"):
        model = DiG(replace(CONFIG, input_size=input_size, skip_order=skip_order))
        places = torch.arange(model.grid[0] * model.grid[1]).float().view(1, -1, 1)
        same = {}
        for block in range(model.config.depth):
            source = model.config.skip_source(block)
            if source is None:
                continue
            left = reordered(places, model, model.routes[source].target)
            read = reordered(places, model, model.routes[block].source)
            same[block] = torch.equal(model._join(left, source, block), read)
        assert same.keys() == {5, 6, 7}
        one_row_or_column = 1 in model.grid
        assert same == {j: skip_order == "aligned" or j % 2 == 0 or one_row_or_column for j in same}


def reordered(places: Tensor, model: DiG, order: ScanOrder) -> Tensor:
    grid = places.unflatten(1, model.grid)
    tokens = (grid.transpose(1, 2) if order.transposed else grid).flatten(1, 2)
    return tokens.flip(1) if order.reversed else tokens


@pytest.mark.parametrize("skip_order", ["released", "aligned"])
@pytest.mark.parametrize("scan", ["causal", "bidirectional", "crisscross"])
def test_identity_init_starts_as_the_model_without_skips(scan: Any, skip_order: Any) -> None:
    plain = DiG(replace(CONFIG, skip="none", scan=scan))
    skipped = DiG(replace(CONFIG, skip="identity-init", scan=scan, skip_order=skip_order))
    randomize(plain)
    missing = skipped.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[2] for name in missing.missing_keys} == {"skip_linear"}
    inputs = example(plain)
    assert relative_error(skipped.eval()(*inputs), plain.eval()(*inputs)) < 1e-6
    other = DiG(replace(CONFIG, skip="linear", scan=scan, skip_order=skip_order)).eval()
    other.load_state_dict(plain.state_dict(), strict=False)
    assert relative_error(other(*inputs), plain(*inputs)) > 0.1


@pytest.mark.parametrize(("depth", "readers"), [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (8, 3), (12, 5), (28, 13)])
def test_the_last_blocks_read_the_first_ones(depth: int, readers: int) -> None:
    config = replace(CONFIG, depth=depth)
    found = {i: source for i in range(depth) if (source := config.skip_source(i)) is not None}
    assert found == {depth - 1 - i: i for i in range(readers)}
    assert all(block > depth // 2 for block in found)
    assert all(replace(config, skip="none").skip_source(i) is None for i in range(depth))


@pytest.mark.parametrize(("size", "added"), [("S", 1_476_480), ("XL", 34_519_680)])
def test_parameter_counts(size: str, added: int) -> None:
    """A linear layer of 2D² + D in each of the last ⌊N/2⌋ - 1 blocks, on top of the published counts."""
    plain = {"S": 32_983_328, "XL": 675_659_040}[size]
    depth, width, _ = SIZES[size]
    with torch.device("meta"):
        model = DiG(
            DiGConfig(
                input_size=(32, 32), depth=depth, width=width, heads=heads_of(size, "release"), variant="release",
                skip="linear",
            )
        )  # fmt: skip
    assert parameters_of(model) == plain + added


def test_published_names() -> None:
    model = DiG(CONFIG)
    published = to_release(model.state_dict())
    names = {name for name in published if "skip" in name}
    assert names == {f"blocks.{n}.skip_linear.{part}" for n in (5, 6, 7) for part in ("weight", "bias")}
    twin = DiG(CONFIG)
    twin.load_state_dict(from_release(published), strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name])


def test_a_block_that_reads_a_skip_asks_for_it() -> None:
    model = DiG(CONFIG)
    x = torch.randn(1, 6, 32)
    with pytest.raises(ValueError, match="needs the tokens of its skip"):
        model.blocks[7](x, torch.randn(1, 32), model.routes[7])


@pytest.mark.parametrize(("field", "value"), [("skip", "long"), ("skip_order", "other")])
def test_unknown_words_are_refused(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be one of"):
        replace(CONFIG, **{field: value})

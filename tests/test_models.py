"""Every registered model: size to the last parameter, shapes, guidance. A new model is tested by being registered."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.measure.flops import paper_macs
from dig.family import UnknownModelError
from dig.flops import forward_macs
from dig.registry import list_models
from dig.spec import create_model
from tests.helpers import example, randomize

FAMILIES = ("DiG", "DiT", "Flash-DiT", "DiS")
RELEASE = {
    ("S", 2): 32_983_328,
    ("B", 2): 130_551_584,
    ("L", 2): 464_760_352,
    ("XL", 2): 675_659_040,
    ("S", 4): 33_038_720,
    ("B", 4): 130_662_272,
    ("L", 4): 464_907_904,
    ("XL", 4): 675_825_024,
}
"""Trainable parameters of the DiG that its authors published."""
TABLE_1 = {"S": 31.5, "B": 124.6, "L": 443.4, "XL": 644.6}
"""DiG of the paper at patch 4 as Tab. 1 prints it, in units of 2^20 parameters."""
PAPER = {"S": 33_047_936, "B": 130_680_704, "L": 464_957_056, "XL": 675_889_760}
"""The same to the last parameter: the release, plus two norms' weights a block, plus XL's wider heads (72, not 64)."""
DIT = {"DiT-S/2": 32_865_056, "DiT-XL/2": 674_834_720}
DIS_MILLIONS = {"S": 29.1, "B": 121.2, "M": 231.4, "L": 407.2, "XL": 513.7, "H": 907.0}
"""DiS at patch 2, position embedding included, as its paper counts. XL is assumed."""
GMAC_IN_FULL = {
    4: {"S": 1.403, "B": 5.547, "L": 20.05, "XL": 29.00},
    2: {"S": 5.57, "B": 22.03, "L": 79.70, "XL": 115.26},
}
GMAC_TABLE_1 = {"DiG-S/4": 1.086, "DiG-B/4": 4.307, "DiG-L/4": 15.536, "DiG-XL/4": 22.527, "DiG-S/2": 4.295}


def meta_model(name: str, **options: str) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, image_size=256, **options)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("size", "patch"), RELEASE)
def test_dig_release_counts(size: str, patch: int) -> None:
    assert trainable(meta_model(f"DiG-{size}/{patch}", variant="release")) == RELEASE[size, patch]


@pytest.mark.parametrize("size", TABLE_1)
def test_dig_paper_counts(size: str) -> None:
    count = trainable(meta_model(f"DiG-{size}/4"))
    assert round(count / 2**20, 1) == TABLE_1[size]
    assert count == PAPER[size]


@pytest.mark.parametrize("name", DIT)
def test_dit_counts(name: str) -> None:
    assert trainable(meta_model(name)) == DIT[name]
    assert trainable(meta_model(f"Flash-{name}")) == DIT[name]


@pytest.mark.parametrize("size", DIS_MILLIONS)
def test_dis_counts(size: str) -> None:
    assert round(trainable(meta_model(f"DiS-{size}/2")) / 1e6, 1) == DIS_MILLIONS[size]


def test_every_registered_model_has_a_checked_count() -> None:
    checked = {f"DiG-{size}" for size, _ in RELEASE} | {f"DiS-{size}" for size in DIS_MILLIONS}
    checked |= {f"{prefix}DiT-{size}" for prefix in ("", "Flash-") for size in ("S", "B", "L", "XL")}
    assert {name.partition("/")[0] for name in list_models()} == checked


@pytest.mark.parametrize("size", ["B", "L"])
def test_dit_sizes_without_a_published_count_follow_the_formula(size: str) -> None:
    depth, D = {"B": (12, 768), "L": (24, 1024)}[size]
    block = (3 * D * D + 3 * D) + (D * D + D) + (8 * D * D + 5 * D) + (6 * D * D + 6 * D)
    ends = (16 * D + D) + (256 * D + D + D * D + D) + 1001 * D + (2 * D * D + 2 * D) + (32 * D + 32)
    assert trainable(meta_model(f"DiT-{size}/2")) == depth * block + ends


@pytest.mark.parametrize(
    ("patch", "size"),
    [
        pytest.param(patch, size, marks=() if size in ("S", "B") else pytest.mark.slow)
        for patch in GMAC_IN_FULL
        for size in GMAC_IN_FULL[patch]
    ],
)
def test_multiply_adds_in_full(patch: int, size: str) -> None:
    digits = 3 if (patch, size) in {(4, "S"), (4, "B")} else 2
    assert round(forward_macs(meta_model(f"DiG-{size}/{patch}")) / 1e9, digits) == GMAC_IN_FULL[patch][size]


@pytest.mark.parametrize("name", GMAC_TABLE_1)
def test_multiply_adds_as_table_1_counts(name: str) -> None:
    model = meta_model(name, variant="release")
    assert round(paper_macs(model, forward_macs(model)) / 1e9, 3) == GMAC_TABLE_1[name]


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", [(4, 4), (2, 6)])
def test_output_shape_and_gradients(family: str, grid: tuple[int, int]) -> None:
    model = randomize(
        create_model(f"{family}-S/4", input_size=(4 * grid[0], 4 * grid[1]), in_channels=3, num_classes=10)
    )
    x, t, y = example(model)
    output = model(x, t, y)
    assert output.shape == (2, 6, 4 * grid[0], 4 * grid[1])
    output.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("family", FAMILIES)
def test_guidance(family: str) -> None:
    model = randomize(create_model(f"{family}-S/8", image_size=64)).eval()
    x, t, y = example(model)
    doubled = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, model.null_label)])
    plain = model(*doubled)
    conditioned, unconditioned = plain[:, :4].chunk(2)
    expected = unconditioned + 1.5 * (conditioned - unconditioned)
    for channels, guided in (("three", 3), ("all", 4)):
        output = model.forward_with_cfg(*doubled, 1.5, cfg_channels=channels)
        torch.testing.assert_close(output[:2, :guided], expected[:, :guided])
        torch.testing.assert_close(output[:2, :guided], output[2:, :guided])
        torch.testing.assert_close(output[:, guided:], plain[:, guided:])
    # Only the first half is read: noise in the second changes nothing.
    noisy = torch.cat([x, torch.randn_like(x)])
    torch.testing.assert_close(model.forward_with_cfg(noisy, *doubled[1:], 1.5)[:2, :3], expected[:, :3])
    with pytest.raises(ValueError, match="cfg_channels must be"):
        model.forward_with_cfg(*doubled, 1.5, cfg_channels="four")
    with pytest.raises(ValueError, match="even number"):
        model.forward_with_cfg(x[:1], t[:1], y[:1], 1.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_dropped_in_training_only(family: str) -> None:
    model = create_model(f"{family}-S/8", image_size=64)
    embedder = model.label_emb if family == "DiS" else model.y_embedder
    nn.init.normal_(embedder.embedding_table.weight)
    labels = torch.zeros(4000, dtype=torch.long)
    null = embedder.embedding_table.weight[model.null_label]
    dropped = (embedder.train()(labels) == null).all(1).float().mean()
    assert 0.07 < dropped < 0.13
    assert not (embedder.eval()(labels) == null).all(1).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "Dig-S/2", "image_size": 256}, "did you mean DiG"),
        ({"name": "DiG-XS/2", "image_size": 256}, "unknown size 'XS' of DiG: did you mean S"),
        ({"name": "DiG-S2", "image_size": 256}, "did you mean DiG-S/2"),
        ({"name": "DiG-S/3", "image_size": 256}, "choose one of 2, 4, 8"),
        ({"name": "DiG-S/2", "image_size": 250}, "the closest that is: 256"),
        ({"name": "DiG-S/2"}, "give either image_size"),
        ({"name": "DiG-S/2", "input_size": (7, 8)}, "multiples of the patch size"),
        ({"name": "DiG-S/2", "image_size": 256, "backnd": "fla"}, "did you mean backend"),
        ({"name": "DiG-S/2", "image_size": 256, "backend": "flash"}, "did you mean fla"),
        ({"name": "DiS-S/2", "image_size": 256, "backend": "mamba"}, "did you mean mamba-ssm"),
    ],
)
def test_a_wrong_argument_gets_a_message_that_helps(arguments: dict, message: str) -> None:
    with pytest.raises((UnknownModelError, ValueError), match=message):
        create_model(**arguments)


@pytest.mark.parametrize(
    ("name", "option", "package"),
    [
        ("DiG-S/2", {"backend": "fla"}, r"flash-linear-attention; .*\[gpu\]'"),
        ("Flash-DiT-S/2", {"backend": "flash-attn"}, r"flash-attn; .*\[gpu-built\]'"),
        ("Flash-DiT-S/2", {"backend": "flash-attn-3"}, "flash-attn-3; install it from flash-attention's sources"),
        ("Flash-DiT-S/2", {"backend": "flash-attn-4"}, "flash-attn-4; install it with"),
        ("DiS-S/2", {"backend": "mamba-ssm"}, r"mamba-ssm; .*\[gpu-built\]'"),
    ],
)
def test_a_missing_package_is_named(name: str, option: dict, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dig.packages.is_installed", lambda module: False)
    with pytest.raises(ImportError, match=f"needs the package {package}"):
        create_model(name, image_size=64, **option)


@pytest.mark.parametrize("family", FAMILIES)
def test_input_of_another_shape_is_refused(family: str) -> None:
    model = create_model(f"{family}-S/8", image_size=64)
    with pytest.raises(ValueError, match=r"x must be \(B, 4, 8, 8\); got \(2, 4, 16, 8\)"):
        model(torch.randn(2, 4, 16, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long))


def test_the_device_decides_on_the_implementation() -> None:
    """The meta device stands for none that has kernels of its own."""
    assert create_model("DiG-S/8", image_size=64).config.backend == "reference"
    model = create_model("DiG-S/8", image_size=64, device="meta")
    assert model.config.backend == "reference"
    assert next(model.parameters()).is_meta
    assert create_model("DiG-S/8", image_size=64, backend="triton").config.backend == "triton"


@pytest.mark.gpu
def test_a_gpu_gets_the_kernels() -> None:
    model = create_model("DiG-S/8", image_size=64, device="cuda")
    assert model.config.backend == "triton"
    assert next(model.parameters()).is_cuda

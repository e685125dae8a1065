"""Guidance that can't be called wrongly: a batch in, the doubling inside; the published call for published scripts."""

from __future__ import annotations

import pytest
import torch

from bench.models import create_model
from dig.layers import Backbone
from tests.helpers import randomize

FAMILIES = ["DiG", "DiT", "DiS"]


def model_of(family: str) -> Backbone:
    return randomize(create_model(f"{family}-S/8", image_size=64)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_as_it_is(family: str) -> None:
    """Each input is guided by its own label, as the formula has it, at any size of the batch."""
    model = model_of(family)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([5.0, 400.0, 999.0]), torch.tensor([1, 7, 3])
    with torch.no_grad():
        conditioned, unconditioned = model(x, t, y), model(x, t, torch.full_like(y, model.null_label))
        for channels, guided in (("three", 3), ("all", 4)):
            expected = conditioned.clone()
            expected[:, :guided] = (unconditioned + 1.5 * (conditioned - unconditioned))[:, :guided]
            for batch in (slice(0, 3), slice(0, 2), slice(1, 2)):
                found = model.guided(x[batch], t[batch], y[batch], 1.5, channels)  # type: ignore[arg-type]
                torch.testing.assert_close(found, expected[batch], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.guided(x, t, y, 1.0), conditioned, rtol=1e-4, atol=1e-4)


def test_what_can_be_seen_to_be_wrong_is_refused() -> None:
    model = model_of("DiG")
    x, t, y = torch.randn(4, 4, 8, 8), torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    for wrong in ((x, t[:1], y), (x, t, y[:2]), (x, t[0], y)):
        with pytest.raises(ValueError, match="a value for each of the 4 inputs"):
            model.guided(*wrong, 1.5)
        with pytest.raises(ValueError, match="guided takes a batch that is not doubled"):
            model.forward_with_cfg(*wrong, 1.5)
    with pytest.raises(ValueError, match="guided takes a batch that is not doubled"):
        model.forward_with_cfg(x[:3], t[:3], y[:3], 1.5)
    for scale in (float("nan"), float("inf")):
        for call in (model.guided, model.forward_with_cfg):
            with pytest.raises(ValueError, match="must be a finite number"):
                call(x, t, y, scale)

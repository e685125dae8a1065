"""From what a command or a call says of samples to a plan, with the defaults of both."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

from dig.diffusion import LossName
from dig.sampling.classes import parse_classes
from dig.sampling.runner import SamplePlan, default_model_batch
from dig.sampling.trained import Trained

A_CLASS, AT_MOST = 8, 100
"""How many samples there are of each class, and in all, unless somebody says."""


def plan_samples(
    *,
    classes: str | Sequence[int | str | None] | None,
    class_names: Sequence[str],
    num_classes: int,
    loss: LossName,
    tokens: int,
    device: str,
    samples: int | None,
    sampler: str | None,
    cfg: float,
    cfg_channels: str,
    model_batch: int | None,
    **others: Any,
) -> SamplePlan:
    """The plan of these samples.

    Args:
        classes: As `dig.sampling.classes.parse_classes` reads them, or a list: an index, a name, or None for no class.
        class_names: Of the labels, where they are known.
        num_classes: Labels, the null label left out.
        loss: What the model was trained with.
        tokens: The model's.
        device: ``cuda`` or ``cpu``.
        samples: How many; None for 8 a class, 100 at most.
        sampler: Its name; None for the loss' own: ``ddim``, or ``euler`` for flow matching.
        cfg: Guidance; 1 is none.
        cfg_channels: Which noise channels are guided.
        model_batch: Images that the model takes at once; None for what suits its tokens and the device.
        **others: Further fields of `SamplePlan`.

    Raises:
        ValueError: There is no such class, or it can't be sampled so.
    """
    if classes is not None and (not hasattr(classes, "__iter__") or isinstance(classes, set | frozenset | Mapping)):
        raise TypeError(
            f"classes must be a list of indices and names, [3, 7], or the command's text; got {classes!r:.80}"
        )
    if classes is not None and not isinstance(classes, str):
        kind = str(getattr(classes, "dtype", "int"))
        if not any(word in kind for word in ("int", "object", "str", "<U")):
            raise TypeError(f"classes must be whole numbers; got a {type(classes).__name__} of {kind}")
        if (dimensions := getattr(classes, "ndim", 1)) != 1:
            raise ValueError(
                f"classes must be a list, one label each; got {type(classes).__name__} of {dimensions} dimensions"
            )
        if not len(classes):
            raise ValueError(f"classes must be one or more, or None for all; got {classes!r:.80}")
    text = classes if classes is None or isinstance(classes, str) else ",".join(map(_word, classes))
    labels = parse_classes(text, class_names, num_classes, num_classes)
    plan = SamplePlan(
        classes=labels,
        count=samples if samples is not None else min(AT_MOST, A_CLASS * len(labels)),
        sampler=cast(Any, sampler or ("euler" if loss == "flow-matching" else "ddim")),
        cfg_scale=cfg,
        cfg_channels=cast(Any, cfg_channels),
        model_batch=model_batch if model_batch is not None else default_model_batch(tokens, device),
        **others,
    )
    if (plan.sampler == "euler") != (loss == "flow-matching"):
        raise ValueError(f"{plan.sampler} can't sample a model that was trained with the loss {loss}")
    return plan


def _word(label: int | str | None) -> str:
    """A label of a list as a word of the text that names classes."""
    if label is None:
        return "@null"
    if isinstance(label, str):
        return '"' + label.replace('"', '""') + '"'
    try:
        if isinstance(label, bool):
            raise TypeError
        index = operator.index(label)  # NumPy's and torch's whole numbers too
    except TypeError:
        raise TypeError(f"classes must be indices, names, or None for no class; got {label!r:.80}") from None
    return f"@{index}" if index >= 0 else str(index)


def doubts(trained: Trained, plan: SamplePlan) -> list[str]:
    """Warnings about samples of these weights by this plan.

    Raises:
        ValueError: They would be noise that looks like a result.
    """
    guided, null = plan.cfg_scale != 1, trained.num_classes in plan.classes
    found = (trained.check_guidance(guided=guided, null=null), trained.check_average())
    return [warning for warning in found if warning is not None]

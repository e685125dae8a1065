"""The GPUs of a host as a run's ``--gpus`` counts them, each to be seen alone by what is measured on it. No torch here.

`dig.nvml` asks the driver: CUDA starts in no process but the workers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dig.nvml import Gpu, count_gpus

VISIBLE = "CUDA_VISIBLE_DEVICES"
MOST_LETTERS = 80
ALIKE = {"gpu_name": "name", "gpu_power_limit": "power limit", "gpu_ecc": "checking of memory"}
"""What cards of one run have in common: it is in a row's address, so that a run goes on whichever card is free."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU.

    Attributes:
        index: As ``--gpus`` counts: in the order of ``CUDA_VISIBLE_DEVICES`` where that is set, else of the driver.
        uuid: ``GPU-...``.
        environment: What rows say of it (`dig.nvml.Gpu.describe`).
    """

    index: int
    uuid: str
    environment: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def variables(self) -> dict[str, str]:
        """What a process is given that shall see this card alone, as its device 0."""
        return {VISIBLE: self.uuid}

    @property
    def name(self) -> str:
        """``NVIDIA H100 80GB HBM3``."""
        return str(self.environment.get("gpu_name") or "unnamed GPU")


def visible_cards() -> list[Card | None]:
    """The GPUs that this process may use, in order; None for one that can't be told from others: a MIG slice, say."""
    named = os.environ.get(VISIBLE)
    words = [str(i) for i in range(count_gpus())] if named is None else [word.strip() for word in named.split(",")]
    cards: list[Card | None] = []
    for index, word in enumerate(word for word in words if word):
        gpu = Gpu.open(word)
        said = {} if gpu is None or gpu.is_divided() else gpu.describe()
        uuid = said.get("gpu_uuid")
        cards.append(Card(index=index, uuid=uuid, environment=said) if uuid else None)
    return cards


def choose_cards(text: str, cards: Sequence[Card | None], option: str = "--gpus") -> tuple[Card, ...]:
    """The GPUs that ``--gpus 0,1`` names.

    Args:
        text: Indices with commas between them.
        cards: By `visible_cards`.
        option: For messages.

    Raises:
        ValueError: It names none, one twice, one that is not there, a MIG slice, or cards that differ.
    """
    words = [word.strip() for word in text.split(",")]
    given = f"got {text[:MOST_LETTERS]!r}"
    if not all(word.isascii() and word.isdecimal() and len(word) <= 9 for word in words):
        raise ValueError(f"{option} takes indices of GPUs separated by commas, as 0,1; {given}")
    indices = [int(word) for word in words]
    if twice := [index for index in indices if indices.count(index) > 1]:
        raise ValueError(f"{option} names GPU {twice[0]} twice; name each once; {given}")
    if not cards:
        raise ValueError(f"{option}: no NVIDIA GPU was found; leave it out, or run on a machine with one")
    chosen = []
    for index in indices:
        if index >= len(cards):
            there = "only GPU 0" if len(cards) == 1 else f"GPUs 0 to {len(cards) - 1}"
            raise ValueError(f"{option}: there is no GPU {index}; this machine has {there}; {given}")
        card = cards[index]
        if card is None:
            raise ValueError(
                f"{option}: GPU {index} can't be watched by itself: it is a MIG slice, split into some, or unknown to "
                "the driver; name others"
            )
        chosen.append(card)
    for card in chosen[1:]:
        for key, what in ALIKE.items():
            ours, theirs = card.environment.get(key), chosen[0].environment.get(key)
            if ours != theirs:
                raise ValueError(
                    f"{option}: GPU {chosen[0].index} and GPU {card.index} differ in {what} ({theirs} and {ours}), and "
                    "their times would not compare; run them one after the other, into files of their own"
                )
    return tuple(chosen)

"""A CUDA graph for machines without a GPU: its replay does the recorded operations again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dig.graphs.capturing import Captured
from dig.graphs.optimizers import as_optimizers
from dig.graphs.watch import Journal, Watch

CPU = torch.device("cpu")


class FakeGraph:
    """What a call did on the device, it does again; what it returned is overwritten."""

    def __init__(self, run: Callable[[], Any], generators: Sequence[torch.Generator]) -> None:
        self._run = run
        journal = Journal()
        states = [(generator, generator.get_state()) for generator in (torch.default_generator, *generators)]
        with Watch(CPU, journal):
            self.outputs = run()
        # A call that is recorded isn't executed.
        journal.restore()
        for generator, state in states:
            generator.set_state(state)

    def replay(self) -> None:
        for ours, theirs in zip(tree_leaves(self.outputs), tree_leaves(self._run()), strict=True):
            if isinstance(ours, Tensor):
                ours.copy_(theirs)


def record_fake(run: Callable[[], Any], *, generators: Sequence[torch.Generator], **_: Any) -> tuple[FakeGraph, Any]:
    """As `dig.graphs.record`."""
    graph = FakeGraph(run, generators)
    return graph, graph.outputs


class Unrecorded:
    """A graph that is run for the first time when it is replayed: of a step that says what it moves, and isn't watched.

    What a FakeGraph puts back after recording it has seen written, and it doesn't see into sharded tensors.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.replay = run


def capture_fake(
    step: Callable[..., Any], *inputs: Any, optimizer: Any = None, recorded: bool = True, **options: Any
) -> Captured[Any]:
    """As `dig.capture`, on the CPU; unless ``recorded``, of a step that returns nothing."""

    def record(run: Callable[[], Any], **named: Any) -> tuple[Any, Any]:
        return record_fake(run, **named) if recorded else (Unrecorded(run), None)

    return Captured(step, inputs, device=CPU, optimizers=as_optimizers(optimizer), recorder=record, **options)

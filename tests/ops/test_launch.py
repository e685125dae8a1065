"""A thread's launches on a device: what is launched early, and whose the context is."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dig.ops import launch
from dig.ops.launch import LaunchContext, launch_context, launching

EARLY = {"EARLY": True, "launch_pdl": True}
IN_ORDER = {"EARLY": True}


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> LaunchContext:
    """On a GPU that launches early, its current stream number 1."""
    monkeypatch.setattr(launch, "launches_early", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream(1))
    return LaunchContext(torch.device("cuda:0"))


def stream(number: int) -> Any:
    return SimpleNamespace(cuda_stream=number)


def test_the_first_kernel_after_a_wait_is_not_launched_early(context: LaunchContext) -> None:
    assert context.next_kernel() == EARLY
    context.stream_waits(stream(1))
    assert [context.next_kernel(), context.next_kernel()] == [IN_ORDER, EARLY]


def test_another_streams_wait_holds_up_nothing_here(context: LaunchContext, monkeypatch: pytest.MonkeyPatch) -> None:
    context.stream_waits(stream(2))
    assert context.next_kernel() == EARLY
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream(2))
    assert [context.next_kernel(), context.next_kernel()] == [IN_ORDER, EARLY]


def test_below_hopper_nothing_is_launched_early(context: LaunchContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launches_early", lambda device: False)
    context.stream_waits(stream(1))
    assert [context.next_kernel(), context.next_kernel()] == [{"EARLY": False}] * 2


def test_a_thread_has_one_context_and_no_other_threads() -> None:
    """Autograd's threads launch on streams of their own, and beside the thread of the forward pass."""
    cpu = torch.device("cpu")
    with launching(cpu) as here, launching(cpu) as nested:
        assert here is nested is launch_context(cpu)
    found: list[LaunchContext] = []
    thread = threading.Thread(target=lambda: found.append(launch_context(cpu)))
    thread.start()
    thread.join()
    assert found[0] is not here

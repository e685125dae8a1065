"""Collectives by copies, on CPUs: their windows are files, and ranks meet over gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dig.training.parallel import Ranks, wrap
from dig.training.parallel.copying import CopyAllReduce, CopyGather, CopyReduce
from dig.training.parallel.reach import Place, _obstacle, can_copy
from dig.training.parallel.windows import SymmetricWindow, Windows, WindowsDifferError
from dig.training.parallel.wrapping import sending_of
from tests.dig import copying_job
from tests.dig.test_training_step import config

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each rank of a job finds."""
    return copying_job.run(tmp_path_factory.mktemp("copying") / "job", "cpu", request.param, seconds=600)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check.__name__ for check in copying_job.CHECKS])
def test_ranks_that_copy(found: list[dict[str, str | None]], check: str) -> None:
    assert [rank.get(check, "not reached") for rank in found] == [None] * len(found)


class Alone:
    """A window of one rank."""

    def __init__(self, nbytes: int) -> None:
        self.memory = torch.zeros(nbytes, dtype=torch.uint8)
        self.uncounted = nbytes

    def of(self, _rank: int) -> Tensor:
        # In a storage of its own, over the same memory.
        return torch.frombuffer(self.memory.numpy(), dtype=torch.uint8)

    def meet(self) -> None: ...


class Group:
    def __init__(self, ranks: int = 1) -> None:
        self.ranks = ranks

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self.ranks


def windows() -> Windows:
    return Windows(Group(), lambda nbytes, _device: Alone(nbytes))  # type: ignore[arg-type]


def lend(found: Windows, numel: int) -> Tensor:
    return found.lend(numel, dtype=torch.float32, device=CPU)


def test_what_is_held_is_not_lent_again() -> None:
    """With one window for all, the second tensor would be the first one's memory."""
    found = windows()
    first, second = lend(found, 8), lend(found, 8)
    first.fill_(1)
    second.fill_(2)
    assert torch.equal(first, torch.ones(8))
    assert found.count == 2
    places = first.data_ptr(), second.data_ptr()
    # A view holds it too: FSDP keeps no more of a share.
    view = first.narrow(0, 2, 2)
    del first
    third = lend(found, 8)
    assert third.data_ptr() not in places
    del view
    assert lend(found, 8).data_ptr() == places[0]
    assert found.count == 3


def test_a_window_that_is_too_small_is_left() -> None:
    found = windows()
    small = lend(found, 8)
    at = small.data_ptr()
    del small
    large = lend(found, 9)
    assert large.data_ptr() != at
    assert lend(found, 4).data_ptr() == at
    assert found.count == 2


def test_a_window_is_lent_to_its_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = windows()
    lent = lend(found, 8)
    at = lent.data_ptr()
    del lent
    found._lent[0].stream = 7
    assert lend(found, 8).data_ptr() != at
    assert found.count == 2


def test_memory_that_the_allocator_does_not_know_is_counted() -> None:
    found = windows()
    assert found.uncounted == 0
    _held = lend(found, 8), lend(found, 8)
    assert found.uncounted == 2 * 8 * 4


def test_a_window_is_known_by_what_was_lent() -> None:
    found = windows()
    lent = lend(found, 8)
    assert found.behind(lent) is found._lent[0].window
    assert found.behind(torch.zeros(8)) is None


def test_ranks_that_were_lent_other_windows_are_told() -> None:
    """One lets go of its first tensor before it asks again, the other only after."""
    ours, theirs = windows(), windows()
    for found in (ours, theirs):
        held = lend(found, 8)
        if found is ours:
            del held
        lend(found, 8)
    orders: list[int] = []
    for found in (ours, theirs):
        found.check(lambda order: [orders.append(order) or order])  # type: ignore[func-returns-value]
    assert orders[0] != orders[1]
    with pytest.raises(WindowsDifferError, match="lent other windows than each other"):
        ours.check(lambda order: [order, orders[1]])
    ours.check(lambda order: [order, orders[0]])


def test_a_capture_makes_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"a CUDA graph is being captured, and 32 bytes more"):
        Windows(Group()).lend(8, dtype=torch.float32, device=CPU)  # type: ignore[arg-type]


def test_sharing_waits_for_the_default_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a peer can set a flag, and before a kernel reads where it is: PyTorch 2.11 leaves both to that stream."""
    import torch.distributed._symmetric_memory as symmetric

    did: list[str] = []

    class Default:
        def synchronize(self) -> None:
            did.append("waited")

    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Default())
    monkeypatch.setattr(symmetric, "rendezvous", lambda memory, group: did.append("shared"))
    assert SymmetricWindow.over(torch.zeros(8), Group()) is None  # type: ignore[arg-type]
    assert did == ["waited", "shared", "waited"]


def places(*given: tuple[str, int], visible: int = 3) -> list[Place]:
    """Ranks of hosts with GPUs of these numbers."""
    return [
        Place(host=host, boot="1", gpu=f"{host}-{number}", visible=tuple(map(str, range(visible))), number=number)
        for host, number in given
    ]


def test_who_can_not_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: {one, other} != {0, 2})
    two = places(("a", 0), ("a", 1))
    assert str(_obstacle(places(("a", 0), ("b", 0)), 0)) == "ranks are on 2 hosts (a, b), and copies go within one"
    assert "on 2 hosts" in str(_obstacle([two[0], two[1]._replace(boot="2")], 0))
    assert _obstacle(places(("a", 0), ("a", 0)), 0) == "ranks share a GPU"
    # Each sees its own alone, or the same in another order.
    assert "see other GPUs" in str(_obstacle([two[0], two[1]._replace(visible=("1",), number=0)], 0))
    assert "see other GPUs" in str(_obstacle([two[0], two[1]._replace(visible=("1", "0", "2"))], 0))
    assert "the GPU of rank 0 has no access to the memory of rank 2's" in str(
        _obstacle(places(("a", 0), ("a", 1), ("a", 2)), 0)
    )

    class Symmetric:
        backend: Any = "CUDA"

    monkeypatch.setattr("torch.distributed._symmetric_memory.get_backend", lambda _device: Symmetric.backend)
    assert _obstacle(two, 1) is None
    Symmetric.backend = None
    assert "has no symmetric memory" in str(_obstacle(two, 1))


def test_ranks_that_can_not_copy_say_so(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    group: Any = torch.distributed.distributed_c10d._get_default_group()
    two: Any = Group(2)
    assert can_copy(group, CPU) == "copies go between GPUs, not on a cpu"
    assert can_copy(group, torch.device("cuda", 0)) == "there is one rank alone"
    with pytest.raises(ValueError, match=r"ranks can't send by copies: copies .* a cpu; take sending collectives"):
        sending_of("copies", CPU, two)
    with pytest.raises(ValueError, match=r"sending must be auto, collectives, copies; got 'mpi'"):
        wrap(torch.nn.Linear(1, 1), "ddp", sending="mpi")  # type: ignore[arg-type]
    with caplog.at_level("INFO", logger="dig"):
        assert sending_of("auto", CPU, two) == "collectives"
    assert "ranks send by collectives: copies go between GPUs" in caplog.text
    # One rank has nothing to send: a run of several goes on by it.
    assert wrap(torch.nn.Linear(1, 1), "ddp", sending="copies").sending == "collectives"


@pytest.mark.usefixtures("tiny_dig", "ranks")
def test_a_model_is_wrapped_to_send_by_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dig.training.parallel.wrapping.sending_of", lambda sending, *_: sending)
    sharded = wrap(config().model.build(), "fsdp", dtype="fp32", sending="copies")
    assert sharded.sending == "copies"
    groups = [
        part._get_fsdp_state()._fsdp_param_group for part in sharded.model.modules() if isinstance(part, FSDPModule)
    ]
    assert len(groups) > 1
    # All of its parts share the windows.
    assert len({(group._all_gather_comm, group._reduce_scatter_comm) for group in groups}) == 1
    assert isinstance(groups[0]._all_gather_comm, CopyGather)
    assert isinstance(groups[0]._reduce_scatter_comm, CopyReduce)
    averaged: Any = wrap(config().model.build(), "ddp", sending="copies")
    assert averaged.sending == "copies"
    ((_, state),) = averaged.network._comm_hooks
    assert isinstance(state, CopyAllReduce)
    assert wrap(config().model.build(), "ddp", sending="collectives").sending == "collectives"

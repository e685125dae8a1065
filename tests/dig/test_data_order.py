"""The order of the data, and the loader: what resuming rests on."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dig.training.data import Batch, DataOrder, DataSet, Loader, Samples, open_dataset
from dig.training.data.base import DataError, mirror_where
from dig.training.data.draws import draw_bits, draw_mirrored, epoch_permutation, noise_seed
from tests.dig.test_data_images import make_folder

COUNTS = st.integers(1, 40)


class Numbers(DataSet):
    """Sample i is the picture [i, i + 1/2], its label i."""

    class_names = ("number",)
    sample_shape = (1, 1, 2)
    mirror = True
    in_memory = True
    name = "numbers"

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def fetch(self, indices: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Samples:
        x = torch.from_numpy(np.stack([indices, indices + 0.5], 1)).float().view(-1, 1, 1, 2)
        return Samples(x=mirror_where(x, mirrored), y=torch.from_numpy(indices))


def seen(order: DataOrder, steps: range) -> list[int]:
    return [int(i) for step in steps for i in order.select(step).indices]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@given(length=COUNTS, batch_size=st.integers(1, 7), seed=st.integers(0, 2**70))
def test_every_sample_once_an_epoch(world_size: int, length: int, batch_size: int, seed: int) -> None:
    """``length`` steps of all ranks are exactly ``batch_size * world_size`` epochs."""
    ranks = [
        DataOrder(length=length, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    visits: dict[int, list[int]] = {}
    for step in range(length):
        for order in ranks:
            selection = order.select(step)
            for epoch, index in zip(selection.epochs, selection.indices, strict=True):
                visits.setdefault(int(epoch), []).append(int(index))
    assert sorted(visits) == list(range(batch_size * world_size))
    assert all(sorted(indices) == list(range(length)) for indices in visits.values())


@given(length=COUNTS, per_step=st.sampled_from([6, 12]), step=st.integers(0, 10**6), seed=st.integers(0, 9))
def test_ranks_split_the_same_global_batch(length: int, per_step: int, step: int, seed: int) -> None:
    batches = []
    for world_size in (1, 2, 3):
        ranks = range(world_size)
        orders = [
            DataOrder(length=length, batch_size=per_step // world_size, seed=seed, rank=rank, world_size=world_size)
            for rank in ranks
        ]
        batches.append(tuple(index for order in orders for index in seen(order, range(step, step + 1))))
    assert len(set(batches)) == 1


@given(length=COUNTS, batch_size=st.integers(1, 9), stop=st.integers(0, 30), far=st.integers(0, 10**9))
def test_resumed_loader_goes_on_with_the_same_batches(length: int, batch_size: int, stop: int, far: int) -> None:
    data, order = Numbers(length), DataOrder(length=length, batch_size=batch_size, seed=5)

    def batches(first: int, count: int) -> list[Batch]:
        with Loader(data, order, first_step=first, workers=0) as loader:
            return [next(loader) for _ in range(count)]

    for start, resume in ((0, stop), (far, far + stop)):
        whole, rest = batches(start, stop + 3), batches(resume, 3)
        for one, other in zip(whole[stop:], rest, strict=True):
            assert one.step == other.step
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.y, other.y)


def test_step_is_the_state() -> None:
    with Loader(Numbers(10), DataOrder(length=10, batch_size=4), first_step=7, workers=0) as loader:
        assert loader.step == 7
        assert next(loader).step == 7
        assert loader.step == 8


def split_mix(*words: int) -> int:
    """The generator again, in whole numbers: absorb each word, then SplitMix64's finaliser."""
    z, mask = 0, 2**64 - 1
    for word in words:
        z = (z + 0x9E3779B97F4A7C15 * (word + 1)) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
    return z


@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40), index=st.integers(0, 2**40))
def test_draws_are_split_mix(seed: int, epoch: int, index: int) -> None:
    assert draw_bits(seed, "order", epoch, np.array([7, index]))[1] == split_mix(seed, 1, epoch, index)
    assert draw_mirrored(seed, np.array([epoch]), np.array([index]))[0] == bool(split_mix(seed, 2, epoch, index) >> 63)
    assert noise_seed(seed, index, True) == split_mix(seed, 3, 1, index) >> 1


def test_order_never_changes() -> None:
    """A change would silently alter what a run goes on with after an update."""
    assert draw_bits(0, "order", 0, 0)[0] == 7542512935913773580
    for seed, epoch in ((0, 0), (0, 1), (5, 0)):
        expected = sorted(range(20), key=lambda index: split_mix(seed, 1, epoch, index))
        assert epoch_permutation(seed, epoch, 20).tolist() == expected


def test_draws_are_fair() -> None:
    """Every bit set half of the time, each place of a permutation equally likely, coins uncorrelated over epochs."""
    bits = draw_bits(3, "noise", 1, np.arange(40_000))
    shares = [((bits >> np.uint64(k)) & np.uint64(1)).mean() for k in range(64)]
    assert max(abs(share - 0.5) for share in shares) < 5 * 0.5 / 200
    assert len(np.unique(bits)) == 40_000
    firsts = np.bincount([epoch_permutation(0, epoch, 5)[0] for epoch in range(2000)], minlength=5)
    assert np.abs(firsts - 400).max() < 5 * (2000 * 0.2 * 0.8) ** 0.5
    indices = np.arange(40_000)
    one, other = (draw_mirrored(0, np.full_like(indices, epoch), indices) for epoch in (0, 1))
    assert abs(one.mean() - 0.5) < 0.0125
    assert abs((one ^ other).mean() - 0.5) < 0.0125


def test_mirroring_is_the_data_sets_choice() -> None:
    data, order = Numbers(8), DataOrder(length=8, batch_size=8)
    with Loader(data, order, workers=0) as loader:
        turned = torch.cat([next(loader).x for _ in range(8)])
    assert 0 < (turned[:, 0, 0, 0] > turned[:, 0, 0, 1]).float().mean() < 1
    data.mirror = False
    with Loader(data, order, workers=0) as loader:
        straight = torch.cat([next(loader).x for _ in range(8)])
    assert (straight[:, 0, 0, 0] < straight[:, 0, 0, 1]).all()


def test_workers_change_nothing_and_end(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"a": 5, "b": 6})
    (root / "a" / "3.png").write_bytes(b"junk")
    order = DataOrder(length=11, batch_size=4, seed=1)

    def batches(workers: int) -> tuple[list[Tensor], dict[str, str]]:
        with Loader(open_dataset(root, image_size=8), order, first_step=2, workers=workers) as loader:
            found = [next(loader) for _ in range(7)]
            assert [batch.step for batch in found] == list(range(2, 9))
            return [part for batch in found for part in (batch.x, batch.y)], loader.unreadable

    alone, unreadable = batches(0)
    for workers in (1, 2):
        together, same = batches(workers)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        assert same == unreadable
    gc.collect()
    assert not multiprocessing.active_children()


@given(seed=st.integers(0, 99), step=st.integers(0, 99))
def test_coins_go_with_the_sample_and_its_epoch(seed: int, step: int) -> None:
    """So that they are the same whatever the batch size and the number of ranks."""
    selection = DataOrder(length=13, batch_size=9, seed=seed).select(step)
    expected = [
        split_mix(seed, 2, int(epoch), int(index)) >> 63
        for epoch, index in zip(selection.epochs, selection.indices, strict=True)
    ]
    assert selection.mirrored.tolist() == expected


INTERRUPTED = """
import signal, sys
from dig.training.data import DataOrder, Loader, open_dataset

stops = []
with Loader(open_dataset(sys.argv[1], image_size=8), DataOrder(length=4, batch_size=64), workers=2) as loader:
    next(loader)
    # After the workers have started: they have not inherited it.
    signal.signal(signal.SIGINT, lambda *_: stops.append(1))
    print("ready", flush=True)
    while not stops:
        next(loader)
    for _ in range(20):
        next(loader)
print("ended", flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_leaves_the_workers_to_the_main_process(tmp_path: Path) -> None:
    """The signal goes to the whole group, as a terminal's does; a run that ends its step first needs the workers."""
    root = make_folder(tmp_path / "data", {"a": 4})
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(root)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    printed, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    assert printed.endswith("ended\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_closed_loader_says_so() -> None:
    loader = Loader(Numbers(4), DataOrder(length=4, batch_size=2), workers=1)
    next(loader)
    kept = loader._batches  # as a traceback may keep it
    loader.close()
    assert not multiprocessing.active_children()
    assert kept is not None
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_state_is_left_alone(workers: int) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    with Loader(Numbers(4), DataOrder(length=4, batch_size=2), workers=workers) as loader:
        next(loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_refusals() -> None:
    for fields in ({"length": 0}, {"batch_size": 0}, {"rank": 2}, {"rank": -1}, {"world_size": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            DataOrder(**{"length": 4, "batch_size": 2, "world_size": 2, **fields})
    order = DataOrder(length=4, batch_size=2)
    with pytest.raises(ValueError, match="step"):
        order.select(-1)
    with pytest.raises(ValueError, match="order is for 4 samples, but numbers holds 5"):
        Loader(Numbers(5), order)
    with pytest.raises(ValueError, match="workers"):
        Loader(Numbers(4), order, workers=-1)
    with pytest.raises(ValueError, match="first_step"):
        Loader(Numbers(4), order, first_step=-1)
    assert order.epoch(3) == 1.5
    with pytest.raises(IndexError):
        Numbers(3)[3]


def test_folder_travels_to_workers_started_afresh(tmp_path: Path) -> None:
    data = open_dataset(make_folder(tmp_path / "data", {"a": 2}), image_size=8)
    assert torch.equal(pickle.loads(pickle.dumps(data))[1][0], data[1][0])


@pytest.mark.gpu
def test_pinned_memory() -> None:
    with Loader(Numbers(4), DataOrder(length=4, batch_size=2), workers=1) as loader:
        assert next(loader).x.is_pinned()


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), RuntimeError("DataLoader worker 1")])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_named(error: Exception) -> None:
    """Whichever way it shows: the tensors come through a socket of the worker's."""

    class Dying:
        def __next__(self) -> Batch:
            raise error

    with Loader(Numbers(4), DataOrder(length=4, batch_size=2), workers=0) as loader:
        loader._batches = Dying()
        with pytest.raises(DataError, match="a process that reads data was killed"):
            next(loader)

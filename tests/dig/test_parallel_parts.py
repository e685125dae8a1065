"""What ranks keep, compare and wait for, in one process: a job of one, and ranks that are made up."""

from __future__ import annotations

import errno
import functools
import importlib
import json
import os
import pickle
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import PrefixStore
from typer.testing import CliRunner

from dig.commands.job import _patient
from dig.launched import place_in_job
from dig.registry import find_family
from dig.training.config import DataSpec, TrainConfig
from dig.training.data import IdxImages
from dig.training.data.loader import default_workers
from dig.training.needs import training_needs
from dig.training.parallel import Ranks, shards
from dig.training.parallel.agreement import RanksDifferError, check_alike, code_sha256, facts, family_sha256
from dig.training.parallel.team import Together
from dig.training.parallel.watching import Beat, Watch
from dig.training.parallel.windows import Windows, WindowsDifferError
from dig.training.saving import CheckpointError, checkpoint_files, damage, newest_checkpoint, read_checkpoint
from dig.training.trainer import Trainer
from tests.dig.test_training_step import config
from tests.dig.tiny import app, make_fashion

pytestmark = pytest.mark.usefixtures("tiny_dig")


def trainer(folder: Path, ranks: Ranks, watch: Watch, kind: Any = "fsdp", **fields: Any) -> Trainer:
    data = IdxImages(make_fashion(folder.parent / "data", train=20, test=4))
    name = replace(config().model, input_size=(32, 32))
    run = TrainConfig(
        **{"model": name, "data": DataSpec.of(data), "device": "cpu", "steps": 2, "batch": 4, "dtype": "fp32",
           "save_every": 1, "log": ("jsonl",), **fields}
    )  # fmt: skip
    return Trainer(run, data, folder, workers=0, team=Together(ranks, kind, watch))


def test_shards_that_are_damaged(tmp_path: Path, ranks: Ranks, watch: Watch) -> None:
    run = tmp_path / "run"
    assert trainer(run, ranks, watch).run() == 2
    newest, before = checkpoint_files(run / "checkpoints")
    assert (newest.name, before.name) == ("step-00000002.shards", "step-00000001.shards")
    assert damage(newest) is None
    (shard,) = newest.glob("*.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "is damaged: its checksum is not the recorded one" in str(damage(newest))
    assert newest_checkpoint(run / "checkpoints") == before
    shard.write_bytes(content)
    (newest / "more.safetensors").write_bytes(content)
    assert "holds more.safetensors, which is none of its own" in str(damage(newest))
    (newest / "more.safetensors").unlink()
    shard.unlink()
    assert f"lacks {shard.name}" in str(damage(newest))
    # Nothing of a pickle is ever looked into.
    shard.write_bytes(pickle.dumps({"model.x": 1}))
    with pytest.raises(CheckpointError, match="cannot read"):
        read_checkpoint(newest)
    newest.with_suffix(".json").write_text('{"files": {"../about.json": "0"}}')
    assert "the record of" in str(damage(newest))
    (before / "about.json").write_text("[]")
    with pytest.raises(CheckpointError, match="its header is no object of JSON"):
        read_checkpoint(before)
    # What a kill leaves is gone at the next start, and what is damaged is kept under another name.
    (run / "checkpoints" / ".unfinished-step-00000003.shards").mkdir()
    shard.write_bytes(content)
    newest.with_suffix(".json").unlink()
    before.with_suffix(".json").unlink()
    again = trainer(run, ranks, watch)
    assert again.step == 0
    assert list((run / "checkpoints").iterdir()) == []
    again.run()


def test_a_part_that_is_missing_is_seen(tmp_path: Path, ranks: Ranks, watch: Watch) -> None:
    """The reader takes what it finds, and would leave the rest of a tensor as it was in memory."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    run = tmp_path / "run"
    trainer(run, ranks, watch).run()
    newest = checkpoint_files(run / "checkpoints")[0]
    (shard,) = newest.glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = dict(file.metadata())
    places = json.loads(header["DCP_SHARDING_INFO"])
    name = "model.blocks.0.attn.in_proj.weight"
    # As if it began at row 3.
    places[name]["saved_offsets"] = [3, 0]
    save_file(tensors, shard, {**header, "DCP_SHARDING_INFO": json.dumps(places)})
    with pytest.raises(CheckpointError, match=rf"parts of {name} are missing"):
        read_checkpoint(newest)


def test_what_ranks_refuse(tmp_path: Path, ranks: Ranks, watch: Watch) -> None:
    team = Together(ranks, "fsdp", watch)
    team.size = 3
    with pytest.raises(ValueError, match=r"a batch of 8 does not divide into 3 ranks of 2 parts each"):
        team.begin(config(accumulate=2), tmp_path)
    team.size = 1
    with pytest.raises(ValueError, match=r"adapters of --lora .* use --parallel ddp"):
        team.begin(config(lora=2, init="0" * 64), tmp_path)


def test_what_is_not_finite_is_not_saved(tmp_path: Path, ranks: Ranks, watch: Watch) -> None:
    team = Together(ranks, "ddp", watch)
    with pytest.raises(CheckpointError, match=r"model\.x is not finite after step 3"):
        team.save(tmp_path, 3, {"model.x": torch.tensor([1.0, float("nan")])}, {}, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_what_ranks_read_out_of_other_windows_is_not_saved(
    tmp_path: Path, ranks: Ranks, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = Together(ranks, "ddp", watch)
    team._windows = Windows(ranks.control)
    team.save(tmp_path, 3, {"model.x": torch.ones(2)}, {}, keep=2)
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, value + 1])
    with pytest.raises(WindowsDifferError, match="lent other windows"):
        team.save(tmp_path, 4, {"model.x": torch.ones(2)}, {}, keep=2)
    assert [path.name for path in checkpoint_files(tmp_path)] == ["step-00000003.shards"]


def test_a_disk_that_is_full_is_said(tmp_path: Path, ranks: Ranks, watch: Watch) -> None:
    team = Together(ranks, "ddp", watch)
    (tmp_path / "file").write_text("")
    team.save(tmp_path / "file", 3, {"model.x": torch.ones(2)}, {}, keep=1)
    with pytest.raises((OSError, CheckpointError), match=r"Not a directory|could not write the checkpoint of step 3"):
        team.saved()


def test_a_full_disk_says_what_to_do(
    tmp_path: Path, ranks: Ranks, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    team = Together(ranks, "ddp", watch)
    monkeypatch.setattr(shards, "write_atomically", full)
    team.save(tmp_path, 3, {"model.x": torch.ones(2)}, {}, keep=1)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 3: the disk of .* is full; free some of it"):
        team.saved()


def test_a_part_that_another_rank_wrote_elsewhere_is_missed(
    tmp_path: Path, ranks: Ranks, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No record is made of what is there, which would count as whole."""
    finish = shards.ShardWriter.finish

    def with_another(self: Any, metadata: Any, results: list[list[Any]]) -> None:
        other = SimpleNamespace(storage_data=SimpleNamespace(relative_path="shard-00002-model.safetensors"))
        finish(self, metadata, [*results, [other]])

    team = Together(ranks, "ddp", watch)
    monkeypatch.setattr(shards.ShardWriter, "finish", with_another)
    team.save(tmp_path, 3, {"model.x": torch.ones(2)}, {}, keep=1)
    with pytest.raises(CheckpointError, match=r"shard-00002-model\.safetensors, which another rank wrote, is not in "):
        team.saved()
    assert checkpoint_files(tmp_path) == []


def test_what_to_do_is_said_from_the_first_step_on(tmp_path: Path, ranks: Ranks, watch: Watch) -> None:
    team = Together(ranks, "ddp", watch)
    team._folder = tmp_path
    team.doing("loading the checkpoint")
    assert watch._what_to_do() == "go on"
    team.doing("training", 1)
    assert watch._what_to_do().endswith("of which none is whole yet, or begins anew")
    team.save(tmp_path, 3, {"model.x": torch.ones(2)}, {}, keep=1)
    team.saved()
    assert watch._what_to_do() == "the same command goes on from the newest checkpoint, of step 3 or later"


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


class Told:
    """Ranks that are made up: what each of them says."""

    def __init__(self, *said: dict[str, str]) -> None:
        self._said = list(said)

    def gather(self, _mine: dict[str, str]) -> list[dict[str, str]]:
        return self._said


def test_what_differs_is_named() -> None:
    mine = facts(config())
    check_alike(Told(mine, mine), mine)  # type: ignore[arg-type]
    for other, words in (
        (facts(config(seed=1)), r"ranks 1, 2 has other option seed than rank 0 \(1, 0\)"),
        (mine | {"torch": "2.0"}, r"ranks 1, 2 has other torch than rank 0"),
        (mine | {"data": "0" * 64}, r"ranks 1, 2 has other data than rank 0"),
    ):
        with pytest.raises(RanksDifferError, match=words):
            check_alike(Told(mine, other, other), mine)  # type: ignore[arg-type]


def test_code_outside_of_this_package_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the baselines, and of a family of one's own: a module alone, or a package with all that is in it."""
    dit = replace(config(), model=replace(config().model, name="DiT-S/8", options={}))
    ours = facts(dit)["code of DiT"]
    assert len(ours) == 64
    assert ours != facts(dit)["code under dig/"]
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_alone.py").write_text("def build(size): ...\n")
    (tmp_path / "own_package").mkdir()
    for name in ("__init__", "declared", "blocks"):
        (tmp_path / "own_package" / f"{name}.py").write_text("def build(size): ...\n")
    for module, file in (("own_alone", "own_alone.py"), ("own_package.declared", "own_package/blocks.py")):
        family = replace(find_family("DiT"), build=importlib.import_module(module).build)
        before = family_sha256(family)
        (tmp_path / file).write_text("# other\n")
        assert family_sha256(family) not in ("", before)
        assert family_sha256(replace(family, build=functools.partial(family.build))) == family_sha256(family)
    assert family_sha256(replace(find_family("DiT"), build=code_sha256)) == ""  # under dig/, which is compared anyway


def test_a_job_that_stands_still_is_ended(ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    left: list[int] = []
    watch = Watch(replace(ranks, hang_seconds=1.0), remedy="go on with the same command", leave=left.append)
    watch.doing("training", 7)
    deadline = time.monotonic() + 20
    while not left and time.monotonic() < deadline:
        time.sleep(0.1)
    watch.leave()
    assert set(left) == {2}
    message = capfd.readouterr().err.splitlines()[0]
    assert message.startswith("error: rank 0 hangs at step 7, training: for ")
    assert message.endswith("give a larger --hang-timeout; go on with the same command")


def test_a_job_whose_rank_is_told_to_stop_says_so(
    ranks: Ranks, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that samples or encodes has nothing to save: it ends the others, which would call it dead."""
    monkeypatch.setattr("dig.commands.job.END_SECONDS", 0.2)
    left: list[int] = []
    store: Any = PrefixStore("told to stop", ranks.store)
    watch = Watch(replace(ranks, store=store), remedy="go on with the same command", leave=left.append)
    # A command that ran in this process before may have left a handler, beside which there is no patience.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with _patient(watch):
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 20
            while not left and time.monotonic() < deadline:
                time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, before)
    watch.leave()
    assert left[0] == 128 + signal.SIGTERM
    assert capfd.readouterr().err.splitlines()[0] == "error: rank 0 was told to stop; go on with the same command"
    assert store.check(["failed"])  # It is what ends the others.


def test_whom_the_others_wait_for(watch: Watch) -> None:
    beat = Beat(tick=9, count=20, doing="training", step=7, seconds=61.0, host="a", process=1, waits=False, left=False)
    behind = replace(beat, count=19, doing="waiting for data", seconds=62.0)
    found = watch._hung({0: beat, 1: behind, 2: beat})
    assert found.message.startswith("rank 1 hangs at step 7, waiting for data: for 62 s, and 2 wait for it")
    assert (found.rank, found.step) == (1, 7)
    assert watch._hung({0: beat, 1: beat}).message.startswith("ranks 0, 1 hang at step 7")
    # One that is done has less behind it than those that still work, and keeps nobody waiting.
    done = replace(beat, count=3, doing="waiting for the others", waits=True)
    assert watch._hung({0: done, 1: beat}).message.startswith("rank 1 hangs")


def test_the_watch_records_why_a_run_failed(
    tmp_path: Path, ranks: Ranks, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer doesn't: what ends it on a rank may be gloo's word of a peer that is gone, and none of its own."""
    watch._ranks = replace(ranks, store=PrefixStore("records", ranks.store))
    run = trainer(tmp_path / "run", ranks, watch)

    def break_off(*_: object) -> None:
        raise RuntimeError("[gloo/pair.cc:534] Connection closed by peer")

    monkeypatch.setattr(run._step, "run", break_off)
    with pytest.raises(RuntimeError, match="Connection closed"):
        run.run()
    assert [event["event"] for event in events(tmp_path / "run")] == ["started"]
    gone = Beat(tick=1, count=5, doing="saving", step=7, seconds=1.0, host="a", process=9, waits=False, left=False)
    watch._end(watch._lost(3, gone, "gone"), claimed=False)  # Another rank's to say.
    assert len(events(tmp_path / "run")) == 1
    watch._end(watch._lost(3, gone, "gone"), claimed=True)
    failed = events(tmp_path / "run")[-1]
    assert (failed["event"], failed["rank"], failed["step"]) == ("failed", 3, 7)
    assert failed["reason"].startswith("rank 3 (process 9 on a) is gone, last heard of at step 7, saving: ")


def test_a_disk_that_hangs_does_not_keep_the_job(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dig.training.parallel.watching.RECORD_SECONDS", 0.1)
    begun = time.monotonic()
    watch.record = lambda _lost: time.sleep(60)
    watch._end(watch._own("rank 0 was told to stop"), claimed=True)
    assert time.monotonic() - begun < 30


def test_every_rank_that_loses_the_store_says_so_and_one_records_it(
    ranks: Ranks, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[int] = []
    for rank in (1, 0):
        watch = Watch(replace(ranks, store=PrefixStore(f"lost {rank}", ranks.store)), leave=lambda _status: None)
        watch.record = lambda lost: recorded.append(lost.rank)
        watch._ranks = replace(watch._ranks, rank=rank)

        def lost() -> None:
            raise torch.distributed.DistNetworkError("Connection reset by peer")

        monkeypatch.setattr(watch, "_look", lost)
        watch._thread.join(timeout=30)
        assert f"error: rank {rank} lost the job's store (Connection reset by peer)" in capfd.readouterr().err
    assert recorded == [0]


def test_what_a_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert place_in_job() == (0, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert place_in_job() == (0, 1, 0)  # of another launcher's, which says no rank
    monkeypatch.setenv("RANK", "3")
    assert place_in_job() == (3, 4, 0)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ValueError, match="RANK must be below WORLD_SIZE"):
        place_in_job()
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ValueError, match="the environment variable RANK must be a number"):
        place_in_job()


def test_ranks_of_a_machine_share_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDisk:
        in_memory = False

    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(12)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers(OnDisk()) == 8  # type: ignore[arg-type]
    for ranks, workers in ((4, 3), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert default_workers(OnDisk()) == workers  # type: ignore[arg-type]


def test_shares_take_less_memory() -> None:
    run = config()
    alone, shared = training_needs(run), training_needs(run, ranks=4, sharded=True)
    for name in ("weights", "optimizer", "gradients", "average", "batches and their noise", "activations"):
        assert alone[name] // 4 == shared[name]
    assert training_needs(run, ranks=4)["weights"] == alone["weights"]


@pytest.mark.parametrize("value", ["0", "nan", "1e308", "-3"])
def test_a_time_out_that_is_none(value: str, tmp_path: Path) -> None:
    words = ["train", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--hang-timeout", value]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "error: --hang-timeout must be 1 to 2,592,000 seconds; got " in result.output
    result = CliRunner().invoke(app, [*words[:-2], "--parallel", "pipeline"])
    assert result.exit_code == 2
    assert "error: --parallel must be auto, ddp or fsdp; got 'pipeline'" in result.output

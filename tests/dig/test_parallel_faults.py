"""A rank that dies, hangs, or would train something else: the job ends, with one message, and loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from dig.training.saving import checkpoint_files, damage, read_checkpoint, step_of
from tests.dig.parallel_job import at_step, end, free_port, printed, start
from tests.dig.tiny import TINY, app, make_fashion, using

TRAIN = ["train", "--model", "DiG-S/8", "--batch", "8", "--log-every", "1", "--save-every", "5", "--ema", "0.9"]
TRAIN += ["--grid-every", "0", "--device", "cpu", "--log", "jsonl", "--lr", "1e-3", "--workers", "0"]
DIE = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fashion(tmp_path_factory.mktemp("fashion") / "data", train=30, test=4)


def train(data: Path, out: Path, *options: str, steps: int = 100_000) -> list[str]:
    return [*TRAIN, "--data", str(data), "--out", str(out), "--steps", str(steps), *options]


def said(folder: Path) -> list[str]:
    """All lines of all ranks that are errors."""
    return [line for rank in range(2) for line in printed(folder, rank).splitlines() if line.startswith("error: ")]


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def last_event(run: Path) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    return event


def test_other_code_is_refused(tmp_path: Path, data: Path) -> None:
    """Before the run's folder is touched; the same holds of versions, options and data, which go the same way."""
    setup = """
import os
from dig.training.parallel import agreement
if os.environ["RANK"] == "1":
    agreement.code_sha256 = lambda: "f" * 64
"""
    ended = end(start(tmp_path, [train(data, tmp_path / "run")], setup=setup))
    assert ended == [2, 2], printed(tmp_path, 0) + printed(tmp_path, 1)
    (message,) = said(tmp_path)
    assert "rank 1 has other code under dig/ than rank 0 (ffffffffffffffff, " in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_other_data_are_refused(tmp_path: Path, data: Path) -> None:
    make_fashion(tmp_path / "other", train=31, test=4)
    setup = f"""
import os
from dig.commands import train
opened = train.open_data
def open_data(path, **options):
    from pathlib import Path
    return opened(Path({str(tmp_path / "other")!r}) if os.environ["RANK"] == "1" else path, **options)
train.open_data = open_data
"""
    assert end(start(tmp_path, [train(data, tmp_path / "run")], setup=setup)) == [2, 2]
    (message,) = said(tmp_path)
    assert "rank 1 has other data than rank 0" in message


SOON = "from dig.training.parallel import agreement; agreement.SEEN_SECONDS = 0.5"


def test_a_run_in_two_folders_is_refused(tmp_path: Path, data: Path) -> None:
    """As on machines whose disks are their own: each rank would leave its part of a checkpoint in one of them."""
    words = train(data, Path(f"@{tmp_path / 'a'}|{tmp_path / 'b'}"))
    assert end(start(tmp_path, [words], setup=SOON)) == [2, 2], printed(tmp_path, 0)
    (message,) = said(tmp_path)
    assert message.startswith("error: rank 0: rank 1 can't see in ") or message.startswith(
        "error: rank 1: rank 1 can't"
    )
    assert message.endswith("so name the same one on each, on a disk that all machines share")
    assert not checkpoint_files(tmp_path / "a" / "checkpoints")
    assert not list(tmp_path.glob("*/**/.job-*"))


@pytest.mark.slow
@pytest.mark.parametrize("output", ["--images", "--npz"])
def test_samples_in_two_folders_are_refused(output: str, tmp_path: Path, data: Path) -> None:
    run, end_of = tmp_path / "run", {"--images": "", "--npz": ".npz"}[output]
    with using(TINY):
        assert CliRunner().invoke(app, train(data, run, steps=1)).exit_code == 0
    words = ["sample", "--checkpoint", str(run), "--steps", "2", "--device", "cpu", "--model-batch", "2"]
    words += ["--samples", "4", output, f"@{tmp_path / 'a'}{end_of}|{tmp_path / 'b'}{end_of}"]
    assert end(start(tmp_path, [words], setup=SOON)) == [2, 2], printed(tmp_path, 0)
    (message,) = said(tmp_path)
    assert "rank 1 can't see in " in message
    assert not list(tmp_path.glob("**/*.png"))


@pytest.mark.slow
def test_an_error_of_one_rank_is_told_once(tmp_path: Path, data: Path) -> None:
    setup = at_step(7, 1, 'raise OSError(28, "No space left on device", "data/3")')
    ended = end(start(tmp_path, [train(data, tmp_path / "run")], setup=setup))
    assert ended == [2, 2], printed(tmp_path, 0) + printed(tmp_path, 1)
    (message,) = said(tmp_path)
    told = (
        r"error: rank 1 at step 7: data/3: No space left on device; the same command goes on from the newest checkpoint"
    )
    event = last_event(tmp_path / "run")
    assert (event["event"], event["rank"], event["step"]) == ("failed", 1, 7)
    assert event["reason"] == "rank 1 at step 7: data/3: No space left on device"
    # The other rank may still have been saving it.
    assert re.fullmatch(rf"{told}, of (step 5 or later|which none is whole yet, or begins anew)", message), message
    assert [step_of(path) for path in checkpoint_files(tmp_path / "run" / "checkpoints")] == [5]


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_and_it_goes_on(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    begun = time.monotonic()
    # Slow enough for the watch's beats to know the step.
    setup = at_step(8, 1, f"time.sleep(2.5); {DIE}")
    ended = end(start(tmp_path, [train(data, run)], setup=setup), seconds=100)
    assert ended == [2, -signal.SIGKILL], printed(tmp_path, 0)
    assert time.monotonic() - begun < 90  # of which a minute at most is the watch's, the others the start's
    (message,) = said(tmp_path)
    assert "error: rank 1 (process " in message
    assert "is gone, last heard of at step 8, waiting for data: its process ended without a word" in message
    event = last_event(run)
    assert (event["event"], event["rank"], event["step"]) == ("failed", 1, 8)
    assert message.startswith(f"error: {event['reason']}; the same command goes on from ")
    newest = checkpoint_files(run / "checkpoints")[0]
    assert step_of(newest) == 5
    assert damage(newest) is None
    # What it goes on with has the bits of a run that was never killed, on as many ranks.
    commands = [train(data, run, steps=9), train(data, tmp_path / "whole", steps=9)]
    assert end(start(tmp_path / "again", commands)) == [0, 0]
    assert losses(run) == losses(tmp_path / "whole")
    with using(TINY):
        result = CliRunner().invoke(app, train(data, tmp_path / "one", steps=9))
    assert result.exit_code == 0, result.output
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_three_ranks_go_on_with_the_same_bits(tmp_path: Path, data: Path) -> None:
    """Three numbers have sums that depend on their order, and that on where in a message they lie."""
    options = ["--batch", "9"]
    commands = [train(data, tmp_path / "whole", *options, steps=4)]
    commands += [train(data, tmp_path / "run", *options, steps=steps) for steps in (2, 4)]
    assert end(start(tmp_path, commands, ranks=3)) == [0, 0, 0], printed(tmp_path, 0)
    ours, theirs = (read_checkpoint(checkpoint_files(tmp_path / run / "checkpoints")[0]) for run in ("run", "whole"))
    assert (ours.about["step"], ours.about["ranks"]) == (4, 3)
    assert not [name for name in theirs.tensors if not torch.equal(ours.tensors[name], theirs.tensors[name])]


@pytest.mark.slow
def test_a_rank_that_hangs_is_noticed(tmp_path: Path, data: Path) -> None:
    setup = at_step(6, 1, "time.sleep(1000)")
    ended = end(start(tmp_path, [train(data, tmp_path / "run", "--hang-timeout", "4")], setup=setup), seconds=100)
    assert ended == [2, 2], printed(tmp_path, 0) + printed(tmp_path, 1)
    (message,) = said(tmp_path)
    assert "error: rank 1 hangs at step 6, waiting for data: for " in message
    assert "1 wait for it" in message
    event = last_event(tmp_path / "run")
    assert (event["event"], event["rank"], event["step"]) == ("failed", 1, 6)
    assert message.startswith(f"error: {event['reason']}; the same command goes on from ")
    assert [step_of(path) for path in checkpoint_files(tmp_path / "run" / "checkpoints")] == [5]


@pytest.mark.slow
def test_groups_that_do_not_end_do_not_keep_the_process(tmp_path: Path, data: Path) -> None:
    """As NCCL's did not, which waited for a CUDA graph."""
    setup = """
import time
import torch.distributed as dist
from dig.commands import job
dist.destroy_process_group, job.PARTING_SECONDS = lambda: time.sleep(600), 1.0
"""
    words = train(data, tmp_path / "run", "--parallel", "ddp", steps=2)
    assert end(start(tmp_path / "log", [words], ranks=1, setup=setup), seconds=100) == [0]
    log = printed(tmp_path / "log", 0)
    said = "in 1 s; the process ends without it, with status 0. What this command did is done and saved"
    assert f"PyTorch has not taken its process groups down {said}" in log
    assert step_of(checkpoint_files(tmp_path / "run" / "checkpoints")[0]) == 2


def test_samples_of_a_job_that_died_are_kept(tmp_path: Path, data: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    words = ["sample", "--checkpoint", str(run), "--steps", "2", "--device", "cpu", "--model-batch", "2"]
    words += ["--samples", "14", "--batch", "2"]
    with using(TINY):
        assert CliRunner().invoke(app, train(data, run, steps=1)).exit_code == 0
        whole = CliRunner().invoke(app, [*words, "--npz", str(tmp_path / "whole.npz")])
    assert whole.exit_code == 0, whole.output
    setup = f"""
import os, signal, time
from dig.sampling.runner import BatchSampler
batch, made = BatchSampler.batch, []
def dying(self, number):
    made.append(number)
    if len(made) == 3 and os.environ["RANK"] == "1":
        time.sleep(2.5)
        {DIE}
    if len(made) == 3:
        time.sleep(30)  # the watch is faster
    return batch(self, number)
BatchSampler.batch = dying
"""
    ended = end(start(tmp_path, [[*words, "--npz", f"{out}.npz"]], setup=setup))
    assert ended == [2, -signal.SIGKILL], printed(tmp_path, 0)
    (message,) = said(tmp_path)
    assert "rank 1 (process " in message
    assert "sampling " in message
    kept = {path.name: path.stat().st_mtime_ns for path in Path(f"{out}.npz.parts").glob("part-*.npy")}
    assert len(kept) >= 3
    again = start(tmp_path / "again", [[*words, "--npz", f"{out}.npz"]])
    assert end(again) == [0, 0], printed(tmp_path / "again", 0)
    assert f"({2 * len(kept)} made before)" in printed(tmp_path / "again", 0)
    assert Path(f"{out}.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


class Torchrun:
    """A real launcher with two ranks, in a process group of its own."""

    def __init__(self, folder: Path, words: list[str], *options: str) -> None:
        # What torchrun may take for an option of its own, as --log, stands behind two dashes.
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
        launcher += ["--master-port", str(free_port()), "-m", "--", "tests.dig.tiny"]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*launcher, *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def wait_for(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ranks(self) -> dict[int, psutil.Process]:
        found = psutil.Process(self.process.pid).children()
        return {int(one.environ()["RANK"]): one for one in found}

    def end(self) -> str:
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.wait(timeout=60)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
        return self.log.read_text()

    def kill(self) -> None:
        with_children = []
        if self.process.poll() is None:
            with_children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
        for one in with_children:
            if one.is_running():
                one.kill()


@pytest.mark.slow
def test_torchrun_that_is_told_to_stop_saves(tmp_path: Path, data: Path) -> None:
    """As a scheduler does: SIGTERM, which torchrun passes on to each rank."""
    run = tmp_path / "run"
    job = Torchrun(tmp_path, train(data, run, "--save-every", "100000"))
    try:
        job.wait_for(lambda: (run / "train.jsonl").exists() and len(losses(run)) >= 3)
        job.process.send_signal(signal.SIGTERM)
        log = job.end()
    finally:
        job.kill()
    steps = max(losses(run))
    assert f"stopped: {steps} of 100000 steps are in {run}" in log
    assert [step_of(path) for path in checkpoint_files(run / "checkpoints")] == [steps]
    assert "error: " not in log


@pytest.mark.slow
def test_torchrun_whose_rank_is_killed_says_why(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    job = Torchrun(tmp_path, train(data, run))
    try:
        job.wait_for(lambda: bool(checkpoint_files(run / "checkpoints")) if run.exists() else False)
        job.ranks()[1].kill()
        killed = time.monotonic()
        log = job.end()
    finally:
        job.kill()
    assert time.monotonic() - killed < 60
    messages = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, log
    assert messages[0].startswith("error: rank 1 (process ")
    assert job.process.returncode == 1
    assert all(damage(path) is None for path in checkpoint_files(run / "checkpoints"))


@pytest.mark.slow
def test_torchrun_that_may_restart_goes_on(tmp_path: Path, data: Path) -> None:
    """Its store outlives the ranks that found each other there."""
    run = tmp_path / "run"
    job = Torchrun(tmp_path, train(data, run, steps=200), "--max-restarts", "1")
    try:
        job.wait_for(lambda: bool(checkpoint_files(run / "checkpoints")) if run.exists() else False)
        job.ranks()[1].kill()
        job.process.wait(timeout=90)
    finally:
        job.kill()
    log = job.log.read_text()
    assert job.process.returncode == 0, log
    assert "going on from step " in log
    assert sorted(losses(run)) == list(range(1, 201))


@pytest.mark.slow
def test_the_example_of_two_gpus_runs(tmp_path: Path, data: Path) -> None:
    """Here two processes of a CPU: that it runs is all that it shows."""
    script = Path(__file__).parents[2] / "examples" / "two-gpus.sh"
    tiny = tmp_path / "python"
    # The launcher's word for the module is its last: any DiG is a tiny one.
    tiny.write_text(f'#!/bin/bash\n[ "$2" = dig ] && set -- -m tests.dig.tiny "${{@:3}}"\nexec {sys.executable} "$@"\n')
    launch = tmp_path / "torchrun"
    launch.write_text(
        "#!/bin/bash\n"
        "# --nproc-per-node N -m -- dig ...\n"
        f'exec {sys.executable} -m torch.distributed.run --master-port {free_port()} "${{@:1:4}}" '
        'tests.dig.tiny "${@:6}"\n'
    )
    for path in (tiny, launch):
        path.chmod(0o755)
    settings = {"MODEL": "DiG-S/8", "STEPS": "4", "BATCH": "2", "DEVICE": "cpu", "LOG_EVERY": "1"}
    result = subprocess.run(
        ["bash", str(script), str(data), str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": str(tiny), "TORCHRUN": str(launch), **settings},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()[-3:]
    assert [line.split(":")[0] for line in lines] == ["one", "ddp", "fsdp"]
    assert all("of 2 times one" in line for line in lines[1:])

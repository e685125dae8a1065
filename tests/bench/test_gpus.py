"""The GPUs of a host: which can be chosen, and what workers and referees see of them."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml
import pytest
from typer.testing import CliRunner

from bench.cases.jobs import CaseJob, Limits, ParityJob
from bench.cli import main as cli
from bench.run import gpus
from bench.run.gpus import Card, choose_cards, visible_cards
from bench.run.process import Worker, WorkerError
from bench.run.runner import Launch, Referee, Sweep
from bench.store.rows import Row
from dig.nvml import Gpu
from tests.bench.harness import small

H100 = {"gpu_name": "H100", "gpu_power_limit": 700.0, "gpu_ecc": True}


def card(index: int, **changes: Any) -> Card:
    uuid = f"GPU-{index}"
    return Card(index=index, uuid=uuid, environment={**H100, "gpu_uuid": uuid, **changes})


CARDS = (card(0), card(1))


@pytest.mark.parametrize(
    ("text", "cards", "message"),
    [
        ("7", CARDS, "there is no GPU 7; this machine has GPUs 0 to 1"),
        ("1", CARDS[:1], "there is no GPU 1; this machine has only GPU 0"),
        ("0,0", CARDS, "names GPU 0 twice"),
        ("x", CARDS, "takes indices of GPUs separated by commas, as 0,1; got 'x'"),
        ("-1", CARDS, "takes indices"),
        ("", CARDS, "takes indices"),
        ("0,", CARDS, "takes indices"),
        ("²", CARDS, "takes indices"),
        ("9" * 4000, CARDS, "takes indices"),
        ("0", (), "no NVIDIA GPU was found"),
        ("0,1", (CARDS[0], None), "GPU 1 can't be watched by itself: it is a MIG slice"),
        ("0,1", (CARDS[0], card(1, gpu_name="H200")), "GPU 0 and GPU 1 differ in name (H100 and H200)"),
        ("0,1", (CARDS[0], card(1, gpu_power_limit=500.0)), "differ in power limit"),
    ],
)
def test_gpus_that_can_not_be_used_are_one_line(
    text: str, cards: tuple[Card | None, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--gpus") as raised:
        choose_cards(text, cards)
    assert message in str(raised.value)
    monkeypatch.setattr(cli, "gpu_present", lambda: bool(cards))
    monkeypatch.setattr(cli, "visible_cards", lambda: list(cards))
    monkeypatch.setattr(cli, "_run", lambda *a, **k: pytest.fail("measured although the input is bad"))
    result = CliRunner().invoke(cli.app, ["run", f"--gpus={text}", "--out", str(tmp_path / "r.jsonl")])
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1), result.output
    assert message in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0", "--device", "cpu"], "--device cpu measures on none"),
        (["--gpus", "0,1", "--alone", "graph"], "unknown --alone 'graph'"),
        (["--gpus", "0,1", "--spread", "models"], "unknown --spread 'models'"),
    ],
)
def test_options_beside_gpus_that_mean_nothing(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "gpu_present", lambda: True)
    monkeypatch.setattr(cli, "visible_cards", lambda: list(CARDS))
    result = CliRunner().invoke(cli.app, ["run", *options])
    assert (result.exit_code, message in result.output) == (2, True), result.output


def test_chosen_in_the_order_that_was_given() -> None:
    assert choose_cards("1,0", CARDS) == (CARDS[1], CARDS[0])
    assert choose_cards(" 1 ", CARDS)[0].variables == {"CUDA_VISIBLE_DEVICES": "GPU-1"}


def test_the_driver_is_asked_for_every_visible_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices follow CUDA_VISIBLE_DEVICES; a MIG slice, and a card that is split, stand in their places as None."""
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 3)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: f"GPU-{i}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid.decode())
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda handle: handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: "H100")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetEnforcedPowerLimit", lambda handle: 700_000)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetEccMode", lambda handle: (1, 1))
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMigMode", lambda handle: (int(handle == "GPU-1"), 0))

    def seen() -> list[tuple[int, str] | None]:
        return [None if c is None else (c.index, c.uuid) for c in visible_cards()]

    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    assert seen() == [(0, "GPU-0"), None, (2, "GPU-2")]
    assert visible_cards()[2] == card(2, driver="580")
    monkeypatch.setenv(gpus.VISIBLE, "2, GPU-0,MIG-7")
    assert seen() == [(0, "GPU-2"), (1, "GPU-0"), None]
    monkeypatch.setenv(gpus.VISIBLE, "")
    assert seen() == []


@pytest.mark.parametrize(
    ("visible", "place", "name"),
    [(None, 0, "GPU-0"), (None, 1, "GPU-1"), ("GPU-7, GPU-5", 0, "GPU-7"), ("GPU-7, GPU-5", 1, "GPU-5"),
     ("GPU-7", 1, None)],
)  # fmt: skip
def test_a_process_watches_the_card_of_its_place(
    visible: str | None, place: int, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: f"GPU-{i}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid.decode())
    # What a launcher has left in the environment is of no process that nobody told.
    for variable, value in {gpus.VISIBLE: visible, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.delenv(variable, raising=False) if value is None else monkeypatch.setenv(variable, value)
    gpu = Gpu.open(place=place) if place else Gpu.open()
    assert (None if gpu is None else gpu._handle) == name


def test_without_a_driver_there_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    assert visible_cards() == []
    monkeypatch.setenv(gpus.VISIBLE, "GPU-0")
    assert visible_cards() == [None]


def test_a_worker_sees_its_own_card_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seeing_worker.py").write_text(
        "import os, ctypes\n\ndef begin(connection):\n    read = ctypes.CDLL(None).getenv\n"
        "    read.restype = ctypes.c_char_p\n"
        "    connection.send((os.environ['CUDA_VISIBLE_DEVICES'], read(b'CUDA_VISIBLE_DEVICES')))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for one in CARDS:
        with Worker("seeing_worker:begin", variables=one.variables) as worker:
            assert worker.answer(60) == (one.uuid, one.uuid.encode())  # To Python, and to libraries in C.


def test_a_worker_is_killed_from_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "idle_worker.py").write_text("import time\n\ndef begin(connection):\n    time.sleep(600)\n")
    monkeypatch.syspath_prepend(tmp_path)
    from bench.run.process import kill_workers

    with Worker("idle_worker:begin") as worker:
        threading.Timer(1.0, kill_workers).start()
        started = time.monotonic()
        with pytest.raises(WorkerError, match="SIGKILL"):
            worker.answer(300)
        assert time.monotonic() - started < 60


def test_referees_watch_their_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str | None] = []
    monkeypatch.setattr("bench.run.runner.Gpu.open", classmethod(lambda cls, device=None: opened.append(device)))
    Referee(limits=Limits(), card=CARDS[1])
    Referee(limits=Limits())
    assert opened == ["GPU-1", None]


def test_everything_that_a_referee_asks_for_runs_on_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, Any]] = []

    def answer(job: Any, *, limits: Limits, variables: Any = None, **more: Any) -> Any:
        given.append((type(job).__name__, variables))
        if isinstance(job, CaseJob):
            return Row(case=job.case, status="error", started_at="").to_json()
        return {} if isinstance(job, ParityJob) else 1e12

    monkeypatch.setattr("bench.run.runner.run_job", answer)
    jobs = ["CeilingJob", "ParityJob", "CaseJob"]
    for own in (CARDS[1], None):
        Referee(limits=Limits(), card=own).measure(Sweep(cases=()).job(Launch(case=small()), own))
        assert given == [(name, None if own is None else {"CUDA_VISIBLE_DEVICES": "GPU-1"}) for name in jobs]
        given.clear()


def test_one_card_is_the_plain_run_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Sweep] = []

    def remember(sweep: Sweep, writer: object, **_: object) -> Any:
        found.append(sweep)
        return iter(())

    monkeypatch.setattr(cli, "gpu_present", lambda: True)
    monkeypatch.setattr(cli, "visible_cards", lambda: list(CARDS))
    monkeypatch.setattr(cli, "run_sweep", remember)
    words = ["run", "--gpus", "1", "--models", "DiG:triton", "--resolution", "64", "--out", str(tmp_path / "r.jsonl")]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    (sweep,) = found
    assert sweep.card == CARDS[1]
    assert sweep.environment["gpu_uuid"] == "GPU-1"
    assert sweep.key(sweep.cases[0]) == replace(sweep, card=None).key(sweep.cases[0])

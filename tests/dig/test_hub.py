"""Names on the hub, the hub itself replaced: the cache first, and one line at once where it can't be reached."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from typer.testing import CliRunner

from dig.cli import app
from dig.hub import PATIENCE, HubError, fetch, is_hub_name
from tests.dig.tiny import make_vae

NAME = "someone/some-vae"


class Hub:
    """Answers as the hub does: with a folder, or an error; keeps what it was asked."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.folder, self.error = folder, error
        self.asked: list[tuple[str, float]] = []

    def model_info(self, name: str, *, timeout: float) -> None:
        self.asked.append((name, timeout))
        if self.error is not None:
            raise self.error

    def download(self, real: Any) -> Any:
        def snapshot_download(name: str, *, local_files_only: bool = False, **options: Any) -> str:
            if local_files_only:
                return real(name, local_files_only=True, **options)
            assert self.asked
            assert options["etag_timeout"] == PATIENCE
            return str(self.folder)

        return snapshot_download


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    made = Hub(tmp_path / "fetched")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", made.model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.download(huggingface_hub.snapshot_download))
    return made


def get() -> Path:
    return fetch(NAME, patterns=["config.json", "*.safetensors"], needed=["*.safetensors"], what="the VAE")


def cached(hub: Hub, *files: str) -> Path:
    root = Path(constants.HF_HUB_CACHE) / f"models--{NAME.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    folder = root / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("{}")
    return folder


def test_the_cache_is_enough(hub: Hub) -> None:
    folder = cached(hub, "config.json", "model.safetensors")
    assert get() == folder
    assert hub.asked == []


def test_what_is_not_in_the_cache_is_fetched(hub: Hub) -> None:
    assert get() == hub.folder
    assert hub.asked == [(NAME, PATIENCE)]


def test_half_of_it_in_the_cache_is_fetched_too(hub: Hub) -> None:
    cached(hub, "config.json")
    assert get() == hub.folder


def test_offline_mode_asks_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set; give the folder of a download instead"):
        get()
    assert hub.asked == []


def http_error(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    error = kind.__new__(kind)
    Exception.__init__(error, "the hub's words")
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("Name or service not known"), r"the hub cannot be reached \(Name or service not known\); give the"),
        (http_error(RepositoryNotFoundError), "neither a folder nor a name on the hub"),
        (http_error(GatedRepoError), "is gated"),
        (http_error(HfHubHTTPError), "the hub refuses the VAE"),
    ],
)
def test_one_line_says_what_to_do(hub: Hub, error: Exception, message: str) -> None:
    hub.error = error
    with pytest.raises(HubError, match=message) as caught:
        get()
    assert "\n" not in str(caught.value)
    # Once: the client's own retries take half a minute.
    assert len(hub.asked) == 1


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run").mkdir()
    assert is_hub_name("facebook/DiT-XL-2-256")
    for text in ("out/run", "run", "./a/b", "/a/b", "a/b/c", "../b", "a/b.pt", "out/misspelt"):
        assert not is_hub_name(text), text


def test_commands_take_names(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE by name, fetched; a checkpoint by name, on a machine without the hub, in no more than one try."""
    from dig.training.data.vae import load_vae

    hub.folder = make_vae(tmp_path / "fetched")
    assert load_vae(NAME, "cpu").config.latent_channels == 4
    hub.error = socket.gaierror("Name or service not known")
    runner = CliRunner()
    for words in (["export", "facebook/DiT-XL-2-256", "--out", "x"],
                  ["sample", "--checkpoint", "facebook/DiT-XL-2-256", "--npz", str(tmp_path / "o.npz")]):  # fmt: skip
        result = runner.invoke(app, words)
        assert result.exit_code == 2
        assert "error: the checkpoint 'facebook/DiT-XL-2-256' is neither a folder nor in the hub's" in result.output

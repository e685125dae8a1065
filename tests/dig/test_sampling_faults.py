"""What must never look like a result: values that aren't finite, seeds that collide, files of another kind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dig.diffusion import NotFiniteError, initial_noise, sample, step_noise, training_noise
from dig.sampling import files
from dig.sampling.published import file_kind
from dig.sampling.runner import SamplePlan
from dig.spec import create_model
from dig.training.saving import checkpoint_files, read_about
from tests.dig.test_sampling import draw, images, published, published_model, run

__all__ = ["run"]

pytestmark = pytest.mark.usefixtures("tiny_dig")


def test_seeds_do_not_collide(run: Path, tmp_path: Path) -> None:
    """From 2^63 up, numpy takes a list of seeds through fp64, where these three are one."""
    high = (2**63 + 1, 2**63 + 2, 2**64 - 1, 0, 2**63 - 1)
    for draw_noise in (initial_noise, training_noise):
        assert len({draw_noise(seed, [5], (4,)).numpy().tobytes() for seed in high}) == len(high)
    assert len({initial_noise(1, [index], (4,)).numpy().tobytes() for index in high}) == len(high)
    assert len({step_noise(high[0], [1], (4,), step).numpy().tobytes() for step in range(3)}) == 3
    # Below, the numbers are those that they always were.
    expected = np.random.Generator(np.random.Philox(key=[7, 3], counter=[0, 0, 0, 0])).standard_normal(4, np.float32)
    assert initial_noise(7, [3], (4,))[0].tolist() == expected.tolist()
    for seed, index in ((-1, 0), (2**64, 0), (0, -1), (0, 2**64)):
        with pytest.raises(ValueError, match=r"0 to 2\^64 - 1"):
            initial_noise(seed, [index], (4,))
    made = [
        images(run, tmp_path / f"{seed}.npz", "--samples", "1", "--seed", str(seed))
        for seed in (9223372036854775809, 9223372036854775810)
    ]
    assert (made[0] != made[1]).any()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
def test_settings_that_are_no_number_are_refused_at_once(value: str, run: Path, tmp_path: Path) -> None:
    for option in ("--cfg", "--eta"):
        result = draw(run, "--npz", str(tmp_path / "o.npz"), option, value)
        assert result.exit_code == 2, result.output
        assert result.output.count("error:") == 1
    assert not list(tmp_path.iterdir())


def test_samples_that_are_not_finite_are_not_drawn(run: Path, tmp_path: Path) -> None:
    """A finite setting whose samples overflow: the message has step and samples, and nothing blocks the next run.

    Only what was asked for is a sample: the model's batch has neighbours to both sides.
    """
    words = ["--samples", "3", "--first", "2"]
    result = draw(run, "--npz", str(tmp_path / "o.npz"), "--grid", str(tmp_path / "g.png"), "--cfg", "1e39", *words)
    assert result.exit_code == 2
    assert "what was sampled is not finite, from step 1 on in sample 2, 3, 4, and is not drawn" in result.output
    assert not list(tmp_path.iterdir())
    assert images(run, tmp_path / "o.npz", *words).shape[0] == 3


def test_the_library_says_so_too() -> None:
    model = create_model("DiG-S/8", input_size=(16, 16), in_channels=1, num_classes=10)
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="from step 1 on in sample 4, 5"):
        sample(model, torch.tensor([0, 1]), sampler="ddim", steps=2, first_index=4)
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            sample(model, torch.tensor([0]), sampler="ddim", steps=2, cfg_scale=scale)
        with pytest.raises(ValueError, match="finite"):
            SamplePlan(classes=(0,), count=1, model_batch=1, cfg_scale=scale)


def changed(run: Path, folder: Path, name: str, value: float) -> Path:
    """A run's checkpoint with one weight changed, as a file of its own."""
    path = checkpoint_files(run / "checkpoints")[0]
    tensors = load_file(path)
    tensors[name].view(-1)[0] = value
    made = folder / "changed.safetensors"
    save_file(tensors, made, {"dig": json.dumps(read_about(path))})
    return made


def test_weights_that_are_not_finite(run: Path, tmp_path: Path) -> None:
    name = "blocks.0.mlp.down_proj.weight"
    for value in (float("nan"), float("inf")):
        result = draw(changed(run, tmp_path, f"ema.{name}", value), "--grid", str(tmp_path / "g.png"))
        assert result.exit_code == 2
        assert f"ema.{name}, which is not finite" in result.output
    # The raw weights of the same file are fine.
    words = ["--weights", "raw", "--samples", "1"]
    assert draw(tmp_path / "changed.safetensors", "--grid", str(tmp_path / "g.png"), *words).exit_code == 0
    state = published_model().state_dict()
    state["pos_embed"].view(-1)[3] = torch.nan
    torch.save(state, tmp_path / "a.pt")
    result = published(tmp_path / "a.pt")
    assert result.exit_code == 2
    assert "holds pos_embed, which is not finite" in result.output


OTHER_KINDS = {
    "a page": (b"<!DOCTYPE html><html>404</html>", "a page of HTML"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
    "nothing": (b"", "it is empty"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "neither safetensors nor a file of torch.save"),
    "zeros": (b"\0" * 4096, "neither safetensors nor a file of torch.save"),
    "a cut-off zip": (b"PK\x03\x04" + b"\0" * 60, "cannot read"),
    "a cut-off pickle": (b"\x80\x02}q\x00(X", "cannot read"),
    "a header beyond the file": (struct.pack("<Q", 2**60) + b'{"a":', "cannot read"),
    "a header that is no object": (struct.pack("<Q", 3) + b"{1}", "cannot read"),
    "tensors beyond the file": (
        struct.pack("<Q", 62) + b'{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}  ',
        "cannot read",
    ),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_files_of_another_kind(kind: str, suffix: str, tmp_path: Path) -> None:
    content, message = OTHER_KINDS[kind]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    result = published(path)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "more than tensors" not in result.output
    assert result.output.count("error:") == 1


@pytest.mark.parametrize("length", range(64, 320, 8))
def test_a_header_of_any_length_is_safetensors(length: int, tmp_path: Path) -> None:
    """The first byte of a header of 128 bytes is that of a pickle."""
    path, text = tmp_path / "a", ""
    while not path.exists() or struct.unpack("<Q", path.read_bytes()[:8])[0] < length:
        save_file({"a": torch.zeros(1)}, path, {"text": text})
        text += "x"
    assert file_kind(path) == "safetensors"


def test_a_wrong_suffix_is_no_wrong_file(run: Path, tmp_path: Path) -> None:
    save_file({name: t.contiguous() for name, t in published_model().state_dict().items()}, tmp_path / "a.pt")
    torch.save(published_model().state_dict(), tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        result = published(tmp_path / name)
        assert result.exit_code == 0, result.output
    shutil.copy(checkpoint_files(run / "checkpoints")[0], tmp_path / "ours.bin")
    assert draw(tmp_path / "ours.bin", "--grid", str(tmp_path / "g.png"), "--samples", "1").exit_code == 0


def tensors_of_other_kinds() -> dict[str, Any]:
    name = "final_layer.linear.weight"
    whole = published_model().state_dict()[name]
    return {
        "sparse": whole.to_sparse(),
        "csr": whole.to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8),
        "meta": whole.to("meta"),
        "int8": whole.to(torch.int8),
        "complex": whole.to(torch.complex64),
        "float8": whole.to(torch.float8_e4m3fn),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["sparse", "csr", "quantized", "meta", "int8", "complex", "float8"])
def test_tensors_of_other_kinds(kind: str, tmp_path: Path) -> None:
    state = published_model().state_dict()
    torch.save({**state, "final_layer.linear.weight": tensors_of_other_kinds()[kind]}, tmp_path / "a.pt")
    result = published(tmp_path / "a.pt")
    assert result.exit_code == 2, result.output
    assert "final_layer.linear.weight" in result.output
    assert result.output.count("error:") == 1


def test_projections_that_do_not_fit(tmp_path: Path) -> None:
    from dig.checkpoints import to_release

    state = to_release(published_model().state_dict())
    torch.save({**state, "blocks.0.attn.q_proj.weight": torch.zeros(3)}, tmp_path / "a.pt")
    result = published(tmp_path / "a.pt")
    assert result.exit_code == 2
    assert "projections that don't fit" in result.output


def test_outputs_are_tried_before_the_work(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any) -> Any:
        raise AssertionError("sampled before the outputs were tried")

    monkeypatch.setattr("dig.sampling.runner.BatchSampler.batch", work)
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    good = ["--npz", str(tmp_path / "o.npz")]
    for options, message in (
        (["--npz", str(tmp_path / "folder.npz")], "is a folder"),
        ([*good, "--grid", str(tmp_path / "folder.png")], "is a folder"),
        ([*good, "--grid", str(tmp_path / "file" / "g.png")], "file"),
        ([*good, "--grid", "/dev/null/g.png"], "/dev/null"),
        (["--npz", str(tmp_path / "o.png")], "give it a name in .npz"),
        ([*good, "--grid", str(tmp_path / "g.jpg")], "give it a name in .png"),
        (["--npz", str(checkpoint_files(run / "checkpoints")[0])], "give it a name in .npz"),
    ):
        result = draw(run, *options)
        assert result.exit_code == 2, (options, result.output)
        assert message in result.output
        assert result.output.count("error:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.npz", "folder.png"]


def test_a_full_disk_keeps_what_was_sampled(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    whole = images(run, tmp_path / "whole.npz", "--samples", "9", "--batch", "4")
    words = ["--npz", str(tmp_path / "o.npz"), "--samples", "9", "--batch", "4"]

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "o.npz")

    with monkeypatch.context() as broken:
        broken.setattr(files, "_join", full)
        result = draw(run, *words)
    assert result.exit_code == 2
    assert "error: o.npz: No space left on device" in result.output
    result = draw(run, *words)
    assert "(9 made before)" in result.output
    assert np.array_equal(np.load(tmp_path / "o.npz")["arr_0"], whole)
    # A grid alone is kept elsewhere.
    from dig.sampling import images as pictures

    write, tries = pictures.write_png, []

    def once(path: Path, pixels: Any) -> None:
        tries.append(path)
        if len(tries) == 1:
            full()
        write(path, pixels)

    monkeypatch.setattr(pictures, "write_png", once)
    result = draw(run, "--grid", str(tmp_path / "g.png"), "--samples", "2")
    assert result.exit_code == 2
    assert "the grid is kept as" in result.output
    assert tries[1].exists()


def test_too_large_is_said_before(run: Path, tmp_path: Path) -> None:
    for options, message in (
        (["--samples", str(10**12)], "samples need"),
        (["--model-batch", str(10**9)], "are needed"),
        (["--samples", str(10**30)], "numbered to 2^62"),
        (["--first", str(2**62)], "numbered to 2^62"),
        (["--model-batch", str(10**30)], "numbered to 2^62"),
    ):
        result = draw(run, "--npz", str(tmp_path / "o.npz"), *options)
        assert result.exit_code == 2, options
        assert message in result.output
        assert not list(tmp_path.iterdir())
    for option, number in (("--image-size", "0"), ("--image-size", str(10**9)), ("--num-classes", str(10**18))):
        torch.save(published_model().state_dict(), tmp_path / "a.pt")
        result = published(tmp_path / "a.pt", option, number)
        assert result.exit_code == 2, (option, number)
        assert result.output.count("error:") == 1


def test_two_at_one_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second refuses, while the first goes on and ends well."""
    from dig.sampling import runner

    batch, inside, go_on = runner.BatchSampler.batch, threading.Event(), threading.Event()

    def slow(self: Any, number: int) -> Any:
        inside.set()
        assert go_on.wait(60)
        return batch(self, number)

    monkeypatch.setattr(runner.BatchSampler, "batch", slow)
    options = ["--npz", str(tmp_path / "o.npz"), "--grid", str(tmp_path / "g.png"), "--samples", "2"]
    found: list[Any] = []
    first = threading.Thread(target=lambda: found.append(sampled(run, tmp_path)))
    first.start()
    assert inside.wait(60)
    for words in (options[:2], options[2:4]):
        with pytest.raises(ValueError, match="another process is sampling into"), files.only_writer(Path(words[1])):
            pass
        result = draw(run, *words)
        assert result.exit_code == 2
        assert f"another process is sampling into {words[1]}" in result.output
    go_on.set()
    first.join()
    assert found == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.npz"]
    assert draw(run, *options).exit_code == 0


def sampled(run: Path, folder: Path) -> int:
    """Two samples by the library, beside a grid that is claimed too."""
    from dig.sampling.runner import BatchSampler
    from dig.sampling.weights import load_weights

    model = load_weights(run, device="cpu").build("cpu")
    plan = SamplePlan(classes=(0,), count=2, model_batch=2, steps=1)
    sampler = BatchSampler(model, plan, torch.device("cpu"))
    with files.only_writer(folder / "g.png"):
        *_, last = files.sample_to_npz(sampler, folder / "o.npz", batch=2, about={})
    return last.done


def test_a_folder_of_someone_elses_is_left_alone(run: Path, tmp_path: Path) -> None:
    parts = tmp_path / "o.npz.parts"
    parts.mkdir()
    (parts / "thesis.txt").write_text("years")
    result = draw(run, "--npz", str(tmp_path / "o.npz"))
    assert result.exit_code == 2
    assert "holds something else" in result.output
    (parts / "thesis.txt").unlink()
    parts.rmdir()
    parts.symlink_to(tmp_path)
    result = draw(run, "--npz", str(tmp_path / "o.npz"))
    assert result.exit_code == 2
    assert "is in the way" in result.output


def test_damaged_parts_are_made_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--npz", str(tmp_path / "o.npz"), "--samples", "9", "--batch", "3"]
    whole = images(run, tmp_path / "whole.npz", *words[2:])

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(files, "_join", stop)
        assert draw(run, *words).exit_code != 0
    first, second, third = sorted((tmp_path / "o.npz.parts").glob("part-*.npy"))
    first.write_bytes(first.read_bytes()[:50])
    second.write_bytes(b"")
    np.save(third, np.zeros((2, 32, 32, 3), dtype=np.uint8))
    assert draw(run, *words).exit_code == 0
    assert np.array_equal(np.load(tmp_path / "o.npz")["arr_0"], whole)


def test_names_are_shown_as_they_are(run: Path, tmp_path: Path) -> None:
    """Brackets are rich's markup, colons its emoji; a terminal obeys escapes."""
    odd = tmp_path / "[red]:smile: [bold"
    odd.mkdir()
    copied = odd / "run"
    shutil.copytree(run, copied)
    result = draw(copied, "--npz", str(odd / "[x].npz"), "--samples", "1")
    assert result.exit_code == 0, result.output
    assert f"1 samples in {odd / '[x].npz'}" in result.output
    result = draw(tmp_path / "a\x1b[31m\nb[/]", "--npz", str(odd / "o.npz"))
    assert result.exit_code == 2
    assert "a\\x1b[31m b[/] does not exist" in result.output
    assert "\x1b" not in result.output

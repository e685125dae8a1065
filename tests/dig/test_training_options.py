"""Options of a run as a file: written into it, read back for another one, and all that --resume needs."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dig.cli import app
from dig.commands.run_options import model_text, option_types, options_of, read_options, write_options
from dig.commands.train import train_command
from dig.registry import parse_model
from dig.spec import ModelSpec
from dig.training.resuming import recorded_config
from tests.dig.test_training import lines, newest, train

pytestmark = pytest.mark.usefixtures("tiny_dig")
runner = CliRunner()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(data, out, "--steps", "12").exit_code == 0
    return out


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of 7 steps."""
    out = tmp_path_factory.mktemp("begun") / "run"
    assert train(data, out, "--steps", "7").exit_code == 0
    return out


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def assert_same_run(run: Path, whole: Path) -> None:
    """Every loss, weight, moment and average."""
    assert len(lines(whole)) == 12
    assert lines(run) == lines(whole)
    ours, theirs = newest(run), newest(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def resume(run: Path, *options: str) -> Any:
    return runner.invoke(app, ["train", "--resume", str(run), *options])


def said(result: Any) -> str:
    return str(result.output).replace("\n", " ")


def test_going_on_needs_no_other_option(run: Path, whole: Path) -> None:
    result = resume(run, "--steps", "12", "--save-every", "7")
    assert result.exit_code == 0, result.output
    assert "going on from step 7 of 12" in result.output
    assert_same_run(run, whole)
    # And what was given for it is what the run goes on with from now on.
    assert tomllib.loads((run / "config.toml").read_text())["steps"] == 12
    again = resume(run)
    assert "is finished already, at step 12" in said(again)


def test_the_same_command_still_goes_on(run: Path, data: Path) -> None:
    result = train(data, run, "--steps", "9")
    assert result.exit_code == 0, result.output
    assert "going on from step 7 of 9" in result.output


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--batch", "4"], "batch: 4, 8"),
        (["--lr", "3e-4"], "--lr: 0.0003, 0.0001"),
        (["--model", "DiG-S/8:variant=release"], "variant: release, paper"),
        (["--dtype", "bf16"], "dtype: bf16, fp32"),
    ],
)
def test_other_options_are_refused_with_what_to_do(options: list[str], what: str, run: Path) -> None:
    result = resume(run, "--steps", "9", *options)
    assert result.exit_code == 2
    assert what in said(result)
    assert f"leave them out, or begin another run, with --config {run}/config.toml --out ANOTHER" in said(result)
    assert result.output.count("error:") == 1
    assert len(lines(run)) == 7


def test_what_can_not_go_on(run: Path, tmp_path: Path) -> None:
    for words, message in (
        (["--resume", str(tmp_path / "none")], "holds no run"),
        (["--resume", str(run), "--out", str(tmp_path / "other")], "leave out --out"),
        (["--resume", str(run), "--config", str(run / "config.toml")], "--config begins another run"),
    ):
        result = runner.invoke(app, ["train", *words])
        assert result.exit_code == 2, result.output
        assert message in said(result)
    assert not (tmp_path / "other").exists()


def test_a_run_that_wrote_no_file_of_options_says_all_but_its_data(run: Path, data: Path) -> None:
    (run / "config.toml").unlink()
    result = resume(run, "--steps", "8")
    assert result.exit_code == 2
    assert "doesn't say where its data lie: give --data" in said(result)
    result = resume(run, "--steps", "8", "--data", str(data))
    assert result.exit_code == 0, result.output
    assert len(lines(run)) == 8


def test_data_may_move(run: Path, data: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(data, tmp_path / "moved")
    assert resume(run, "--steps", "8", "--data", str(moved)).exit_code == 0
    assert tomllib.loads((run / "config.toml").read_text())["data"] == str(moved)


def pretend(run: Path, **changes: str) -> None:
    """Let a run say that it began elsewhere: in its record, and in its checkpoints."""
    from dig.training.saving import checkpoint_files, read_checkpoint, save_checkpoint

    def change(config: dict[str, Any]) -> None:
        for name, value in changes.items():
            (config["model"]["options"] if name == "backend" else config)[name] = value

    path = run / "config.json"
    content = json.loads(path.read_text())
    change(content["config"])
    path.write_text(json.dumps(content))
    saved = read_checkpoint(checkpoint_files(run / "checkpoints")[0])
    change(saved.about["config"])
    if changes.get("device") == "cuda":
        saved.tensors["random.cuda"] = torch.zeros(16, dtype=torch.uint8)
    save_checkpoint(saved.path.parent, 7, saved.tensors, saved.about, keep=1)


def test_a_run_of_a_gpu_goes_on_on_a_cpu(run: Path, whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    pretend(run, device="cuda", backend="triton", execution="graph", dtype="fp32")
    text = (run / "config.toml").read_text()
    text = text.replace('device = "cpu"', 'device = "cuda"').replace("DiG-S/8", "DiG-S/8:triton")
    (run / "config.toml").write_text(text)
    result = resume(run, "--steps", "12", "--save-every", "7")
    assert result.exit_code == 0, result.output
    assert "device (cuda, now cpu), backend (triton, now reference), execution (graph, now eager)" in caplog.text
    assert "not bit for bit" in caplog.text
    # It was never there, so all bits are the same; what is said of it is what it now is.
    assert_same_run(run, whole)
    config = recorded_config(run)
    assert config is not None
    assert (config.device, config.execution, config.model.options["backend"]) == ("cpu", "eager", "reference")
    assert tomllib.loads((run / "config.toml").read_text())["model"] == "DiG-S/8"
    caplog.clear()
    assert resume(run, "--steps", "13").exit_code == 0
    assert "not bit for bit" not in caplog.text


def test_the_same_command_elsewhere_is_refused_and_told_of_resume(run: Path, data: Path) -> None:
    pretend(run, device="cuda", execution="graph")
    result = train(data, run, "--steps", "9")
    assert result.exit_code == 2
    assert f"--resume {run} goes on with it here too" in said(result)


def test_its_checkpoints_are_sampled_after_a_move_that_came_to_nothing(run: Path, data: Path, tmp_path: Path) -> None:
    pretend(run, device="cuda", execution="graph")
    record = json.loads((run / "config.json").read_text())
    record["config"] |= {"device": "cpu", "execution": "eager"}
    (run / "config.json").write_text(json.dumps(record))
    words = ["--grid", str(tmp_path / "g.png"), "--samples", "1", "--steps", "1", "--device", "cpu"]
    result = runner.invoke(app, ["sample", "--checkpoint", str(run), *words])
    assert result.exit_code == 0, result.output


def test_execution_may_be_chosen_anew_when_it_goes_on(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    pretend(run, execution="compile")
    assert resume(run, "--steps", "8", "--execution", "eager").exit_code == 0
    assert "execution (compile, now eager)" in caplog.text


def test_a_run_from_the_file_of_another(whole: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, ["train", "--config", str(whole / "config.toml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert_same_run(tmp_path / "run", whole)
    ours, theirs = ((folder / "config.toml").read_bytes() for folder in (tmp_path / "run", whole))
    assert ours == theirs


def test_the_command_line_wins_over_the_file(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    text = 'model = "DiG-S/8"\nlr = 3e-4\nsteps = 3\nbatch = 4\ngrid_every = 0\ndevice = "cpu"\n'
    file.write_text(f'data = "{data}"\n{text}')
    out = tmp_path / "run"
    result = runner.invoke(app, ["train", "--config", str(file), "--out", str(out), "--steps", "2", "--mirror"])
    assert result.exit_code == 0, result.output
    config = recorded_config(out)
    assert config is not None
    assert (config.steps, config.batch, config.learning_rate, config.data.mirror) == (2, 4, 3e-4, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning-rat = 3e-4", "there is no option 'learning-rat': did you mean lr? Known: "),
        ("xyzzy = 1", "there is no option 'xyzzy': Known: "),
        ("stepps = 3", "did you mean steps?"),
        ("resume = 'run'", "'resume' is of the command line alone; leave it out of the file"),
        ("steps = 3.5", "steps must be a whole number; got 3.5"),
        ("steps = true", "steps must be a whole number; got true"),
        ("lr = '3e-4'", "lr must be a number; got '3e-4'"),
        ("mirror = 1", "mirror must be true or false; got 1"),
        ("model = 3", "model must be a text in quotes; got 3"),
        ("[train]\nsteps = 3", "[train] begins a table; options stand in none, as: lr = 3e-4. Leave that line out"),
        ("steps = ", "is no file of options in TOML"),
        ("freeze = [1]", "freeze must be a list of texts in quotes; got [1]"),
        ("steps = 0", "error: steps in {file} must be at least 1"),
        ("log-every = 0", "error: log-every in {file} must be at least 1"),
        ("lr = 0", "error: lr in {file} must be a finite number above 0"),
        ("\xff", "is no file of options in TOML"),
    ],
)
def test_files_that_are_refused(text: str, message: str, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_bytes(text.encode("latin-1"))
    result = runner.invoke(app, ["train", "--config", str(file), "--data", str(data), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2, result.output
    assert message.format(file=file) in said(result)
    assert result.output.count("error:") == 1
    missing = runner.invoke(app, ["train", "--config", str(tmp_path / "none.toml"), "--out", str(tmp_path / "run")])
    assert missing.exit_code == 2
    assert "No such file" in missing.output


def test_every_option_is_in_the_file(whole: Path) -> None:
    """But those that are None by default, and were not given."""
    written = tomllib.loads((whole / "config.toml").read_text())
    types = option_types(train_command)
    missing = types.keys() - {key.replace("-", "_") for key in written} - {"out"}
    assert all(type(None) in getattr(types[name], "__args__", ()) for name in missing), missing
    assert written["mirror"] is False
    assert written["image-size"] == 32
    config = recorded_config(whole)
    assert config is not None
    of_record = options_of(config)
    assert {name: written[name.replace("_", "-")] for name in of_record} == of_record


@pytest.mark.parametrize("text", ['a "b" \\ \n\t\x7f é 🎲', "", "# no comment"])
def test_texts_come_back(text: str, tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    values = {"model": text, "steps": 3, "lr": 1e-5, "mirror": False, "vae": None, "out": "x"}
    file.write_bytes(write_options(values, {}))
    assert read_options(file, train_command) == {"model": text, "steps": 3, "lr": 1e-5, "mirror": False}


def test_a_path_that_is_no_text_is_left_out_with_a_word(tmp_path: Path) -> None:
    content = write_options({"data": Path("a\udcff"), "steps": 1}, {}).decode()
    assert "# data is no text in UTF-8" in content
    assert tomllib.loads(content) == {"steps": 1}


@pytest.mark.parametrize("text", ["DiG-S/8", "DiG-S/8:scan=causal", "DiT-S/2", "DiT-S/2:materialized", "DiS-M/2"])
def test_models_as_text(text: str) -> None:
    name, options, source = parse_model(text, "cpu")
    spec = ModelSpec(name=name, options=options, input_size=(32, 32), in_channels=1, num_classes=10, source=source)
    again = parse_model(model_text(spec, "cpu"), "cpu")
    assert again == (name, options, source)


@pytest.mark.parametrize(
    ("words", "missing"),
    [([], "--data and --out"), (["--data", "x"], "--out"), (["--out", "run"], "--data")],
)
def test_what_a_new_run_needs_is_said_once(words: list[str], missing: str) -> None:
    result = runner.invoke(app, ["train", *words])
    assert result.exit_code == 2
    assert f"error: give {missing}: a run needs --data IMAGES and --out RUN; --resume RUN goes on" in said(result)
    shown = " ".join(runner.invoke(app, ["train", "--help"]).output.replace("│", " ").split())
    assert shown.count("Needed without --resume.") == 2
    assert "[required]" not in shown


def test_a_run_is_no_file(data: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path / "run.pt", "--steps", "1")
    assert result.exit_code == 2
    assert "--out names a folder" in said(result)
    assert not list(tmp_path.iterdir())
    assert train(data, tmp_path / "run.final", "--steps", "1").exit_code == 0

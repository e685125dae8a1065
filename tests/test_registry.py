"""The registry: names, options, families of one's own, and what is said of those that are none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bench.cases import suites as cases
from bench.cli.main import app as bench_app
from dig import discovery, registry
from dig.cli import app as dig_app
from dig.declared import DIG
from dig.environment import ROOT
from dig.family import Family, FamilyError, Look, Signature, UnknownModelError
from dig.layers import Backbone
from dig.registry import find_family, load_family, parse_family, parse_model, register
from dig.spec import ModelSpec, create_model
from tests.own_family import MODULE, run


def test_names_and_options_are_checked_without_torch() -> None:
    code = (
        "import sys; from dig.registry import *; from dig.registry import parse_model\n"
        "assert list(families())[:4] == ['DiG', 'DiT', 'Flash-DiT', 'DiS'], list(families())\n"
        "print(parse_model('DiG-S/2:variant=release', 'cpu')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_other_packages_declare_families_by_entry_points(tmp_path: Path) -> None:
    (tmp_path / "stranger.py").write_text(MODULE)
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dig.models]\nstranger = stranger\nbroken = no_such_module\n")
    code = (
        "from dig.registry import families, find_family, source_of; print(list(families()))\n"
        "assert source_of('Plain') == ''\ntry: find_family('Plane')\nexcept ValueError as e: print(e)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "'DiG', 'DiT', 'Flash-DiT', 'DiS', 'Plain', 'Two-Ways'" in done.stdout
    assert "did you mean Plain?" in done.stdout
    assert "no_such_module, which declares models, raised ModuleNotFoundError" in done.stdout


def test_a_checkout_declares_its_own_families_without_being_installed() -> None:
    assert discovery.modules()[:2] == ("dig.declared", "baselines.declared")


def test_a_family_by_its_import_path(own: str) -> None:
    family, rest, options = parse_family(f"{own}:Plain", sized=False)
    assert (family.name, rest, options) == ("Plain", "", {})
    assert load_family(f"{own}:Plain") is family
    assert registry.source_of("Plain") == f"{own}:Plain"
    model = create_model("Plain-B/2", input_size=(8, 8), num_classes=3)
    assert (type(model).__name__, model.patch_size, model.num_classes) == ("Plain", 2, 3)
    family, rest, options = parse_family(f"{own}:two_ways-S/4:plain:shade=dark", sized=True)
    assert (family.name, rest, options) == ("Two-Ways", "-S/4", {"backend": "plain", "shade": "dark"})


def test_a_case_carries_the_import_path(own: str) -> None:
    plain, fast = cases.sweep([f"{own}:Plain", f"{own}:two_ways"], resolutions=(64,))
    assert (plain.model, plain.options, plain.source) == ("Plain-S/2", (), f"{own}:Plain")
    assert (fast.model, fast.options, fast.source) == ("Two-Ways-S/2", (("backend", "fast"),), f"{own}:two_ways")
    with pytest.raises(ValueError, match=r"Two-Ways with backend=fast needs an NVIDIA GPU; .* plain only"):
        cases.sweep([f"{own}:two_ways:fast"], resolutions=(64,), executions=("eager",), device="cpu")
    with pytest.raises(UnknownModelError, match="sizes and patch are axes of their own here; write Plain"):
        cases.sweep([f"{own}:Plain-S/2"], resolutions=(64,))
    with pytest.raises(UnknownModelError, match="Plain has no backends to choose from; got 'fast'"):
        cases.sweep([f"{own}:Plain:fast"], resolutions=(64,))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("no_such.module:Family", "no module 'no_such' for no_such.module:Family; is its folder on PYTHONPATH?"),
        ("{own}:Plane", "{own} has no 'Plane'; its families: Plain, two_ways"),
        ("{own}:NOTHING", "{own}:NOTHING is no family: give a dig.registry.Family, or decorate it with"),
        ("broken:Plain", "importing broken for broken:Plain raised ZeroDivisionError: division by zero"),
        ("leaving:Plain", "importing leaving for leaving:Plain raised SystemExit: 1"),
        ("lacking:Plain", "importing lacking for lacking:Plain raised ModuleNotFoundError: No module named 'nowhere'"),
        ("silent:Silent", "Silent does not define forward, which a dig.layers.Backbone must"),
        ("taken:DiG", "two families are called DiG: of dig.declared._build and of taken.DiG"),
        ("dig:fla", "unknown model 'dig': did you mean DiG?"),
    ],
)
def test_what_is_no_family_is_said_in_one_line(words: str, message: str, own: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "leaving.py").write_text("raise SystemExit(1)")
    (tmp_path / "lacking.py").write_text("import nowhere")
    (tmp_path / "silent.py").write_text(MODULE.replace("Plain", "Silent").replace("def forward(", "def fordward("))
    (tmp_path / "taken.py").write_text("from dig.registry import register\n@register(sizes=('S',))\nclass DiG: ...\n")
    with pytest.raises((FamilyError, UnknownModelError)) as caught:
        parse_family(words.format(own=own), sized=False)
    assert message.format(own=own) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_commands_refuse_with_status_2(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for app, words in (
        (bench_app, ["run", "--models", f"{own}:Plane"]),
        (bench_app, ["kernels", "--model", f"{own}:Plane-S/2"]),
        (bench_app, ["capacity", "--model", f"{own}:Plane-S/2"]),
        (bench_app, ["sampling", "--models", f"{own}:Plane"]),
        (dig_app, ["train", "--model", f"{own}:Plane-S/2", "--data", "images", "--out", "run"]),
    ):
        done = CliRunner().invoke(app, [*words, "--device", "cpu"])
        assert done.exit_code == 2, (words, done.output)
        assert f"{own} has no 'Plane'" in " ".join(done.output.split())
        assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a:b"}, "a family's name is letters"),
        ({"sizes": ()}, "needs sizes such as"),
        ({"sizes": ("S-1",)}, "without '-' and '/'"),
        ({"options": {"shade": "dark"}}, "option 'shade' of Fine needs a tuple of words"),
        ({"gpu_only": frozenset({"fast"})}, "gpu_only of Fine: Fine has no backend 'fast'; it has ''"),
        ({"name": 3}, "a family's name is letters"),
        ({"sizes": "SB"}, r"sizes of Fine must be tuple\[str, ...\]; got 'SB'; of one it is \('SB',\)"),
        ({"sizes": ("S", "B", "S")}, "sizes of Fine has 'S' twice"),
        ({"sizes": ("S B",)}, "of letters, digits"),
        ({"sizes": (1,)}, "sizes of Fine must be tuple"),
        ({"build": 3}, "build of Fine must be Callable"),
        ({"options": 3}, "options of Fine must be Mapping"),
        ({"options": {"shade": (1,)}}, "options of Fine must be Mapping"),
        ({"options": {"shade": ("dark", "dark")}}, "option 'shade' of Fine has 'dark' twice"),
        ({"options": {"shade": ("very dark",)}}, "a word of option 'shade' of Fine is letters.*got 'very dark'"),
        ({"options": {"in_channels": ("three",)}}, "Fine cannot call an option 'in_channels'"),
        ({"options": {"how-dark": ("very",)}}, "Fine cannot call an option 'how-dark'"),
        ({"assumed": frozenset({"B"})}, "assumed of Fine: Fine has no size 'B'; it has 'S'"),
        ({"renamed": {"hue": "shade"}}, "renamed of Fine: Fine has no option 'shade'; it has none"),
        ({"packages": {"": "fla"}}, "packages of Fine must be Mapping"),
        ({"gpu_only": "fast"}, "gpu_only of Fine must be frozenset"),
        ({"on_gpu": "fast"}, "on_gpu of Fine: Fine has no backend 'fast'"),
        ({"reference": 3}, r"reference of Fine must be str \| None; got 3"),
        ({"reference": "Fine:fast"}, "reference of Fine: Fine has no backends to choose from"),
        ({"signatures": {"cuda": None}}, "signatures of Fine must be Mapping"),
        ({"signatures": {("gpu", ""): Signature()}}, "signatures of Fine: Fine has no device 'gpu'"),
        ({"reshaped_by": ("shade",)}, "reshaped_by of Fine: Fine has no option 'shade'; it has none"),
        ({"look": "red"}, "look of Fine must be Look"),
        ({"files": "kernel.cu"}, "files of Fine must be tuple"),
    ],
)
def test_what_no_family_can_be(fields: dict, message: str) -> None:
    """Said where it is registered, with the family's name and the field's, in one line."""
    with pytest.raises(FamilyError, match=f"^.*{message}.*$"):
        Family(**{"name": "Fine", "sizes": ("S",), "build": dict, **fields})


def test_sizes_may_be_a_list() -> None:
    assert Family(name="Fine", sizes=["S", "B"], build=dict).sizes == ("S", "B")


def test_what_no_signature_and_no_look_can_be() -> None:
    with pytest.raises(FamilyError, match="expected of a Signature is no regular expression"):
        Signature(expected="(")
    with pytest.raises(FamilyError, match="colors of Look must be tuple"):
        Look(colors="#000000")


def test_register_is_written_with_parentheses_and_with_fields_that_there_are() -> None:
    class Fine: ...

    for given in (Fine, "Fine"):
        with pytest.raises(FamilyError, match=r"^register takes a Family; to decorate '?Fine'?, write @register\("):
            register(given)
    with pytest.raises(FamilyError, match=r"^unknown field 'size' of Fine: did you mean sizes\?"):
        register(size=("S",))(Fine)
    with pytest.raises(FamilyError, match=r"^Fine needs sizes such as"):
        register()(Fine)
    assert "Fine" not in registry.families()


def test_two_families_of_one_name_are_refused_and_the_same_one_again_is_not(own: str) -> None:
    assert register(DIG) is DIG
    with pytest.raises(FamilyError, match="two families are called DiG"):
        register(replace(DIG, build=dict))


def test_what_a_family_builds_must_be_a_backbone(own: str) -> None:
    register(Family(name="Odd", sizes=("S",), build=lambda size, **shape: dict(shape)))
    with pytest.raises(FamilyError, match=r"^Odd builds a dict, which is no dig.layers.Backbone$"):
        create_model("Odd-S/2", image_size=64)


def test_a_training_of_what_is_no_backbone_is_refused(own: str, tmp_path: Path) -> None:
    from tests.dig.tiny import make_fashion

    make_fashion(tmp_path / "data", train=20, test=10)
    (tmp_path / f"{own}.py").write_text(
        f"{MODULE}\n@register(sizes=('S',))\ndef odd(size, **shape):\n    return {{}}\n"
    )
    words = ["train", "--model", f"{own}:odd-S/8", "--data", "data", "--out", "run", "--device", "cpu"]
    done = run(*words, folder=tmp_path, module="dig")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "error: odd builds a dict, which is no dig.layers.Backbone"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"skip": 1}, "skip of DiG is one of the words 'none', 'linear', 'identity-init'; got 1"),
        ({"backend": None}, "backend of DiG is one of the words 'reference', 'fla', 'triton'; got None"),
        ({"input_size": (8, 8, 8)}, r"input_size must be (height, width), or a square's side; got (8, 8, 8)"),
        ({"input_size": "88"}, "input_size, if it is not (height, width), must be a whole number; got '88'"),
        ({"input_size": (8.0, 8)}, "height in input_size must be a whole number; got 8.0"),
        ({"image_size": 64.0, "input_size": None}, "image_size must be a whole number; got 64.0"),
        ({"num_classes": "10"}, "num_classes must be a whole number; got '10'"),
        ({"in_channels": True}, "in_channels must be a whole number; got True"),
        ({"name": None}, "a model is named by a word, 'DiG-S/2' say; got None"),
    ],
)
def test_arguments_of_other_types_are_refused_by_name(given: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
        create_model(**{"name": "DiG-S/2", "input_size": (8, 8), "num_classes": 3, **given})


def test_an_input_size_may_be_a_squares_side(own: str) -> None:
    load_family(f"{own}:Plain")
    assert create_model("Plain-S/2", input_size=8).input_size == (8, 8)
    assert create_model("Plain-S/2", input_size=np.int64(8)).input_size == (8, 8)


def test_a_backbone_defines_its_forward_pass(own: str) -> None:
    class Silent(Backbone):
        pass

    with pytest.raises(
        TypeError, match=r"abstract class Silent with(out an implementation for)? abstract method .*forward"
    ):
        Silent(input_size=(4, 4), in_channels=4, patch_size=2, num_classes=3)
    register(Family(name="Silent", sizes=("S",), build=lambda size, **shape: Silent(**shape)))
    with pytest.raises(TypeError, match="Silent"):
        create_model("Silent-S/2", image_size=64)


@pytest.mark.parametrize(
    ("name", "former"), [("DiG-S/2", "recurrence"), ("DiT-S/2", "attention"), ("DiS-S/2", "mixer")]
)
def test_former_words_are_read(name: str, former: str) -> None:
    family = find_family(name.partition("-")[0])
    word = family.backends[0]
    assert create_model(name, image_size=64, **{former: word}).config.backend == word
    assert parse_model(f"{name}:{former}={word}", "cpu")[1]["backend"] == word
    assert cases.ModelChoice.parse(f"{family.name}:{former}={word}").options == (("backend", word),)
    spec = ModelSpec(name=name, options={former: word}, input_size=[8, 8], in_channels=4, num_classes=3)
    assert spec.options == {"backend": word}
    with pytest.raises(
        UnknownModelError, match=r"unknown option 'attenton' of DiT: did you mean backend\? Known: backend"
    ):
        find_family("DiT").read_options({"attenton": "materialized"})


def test_one_option_by_two_names_is_refused() -> None:
    with pytest.raises(UnknownModelError, match="DiG is given backend twice: fla and triton"):
        find_family("DiG").read_options({"recurrence": "fla", "backend": "triton"})


def test_a_name_that_is_declared_is_not_taken_over() -> None:
    code = """
from dig.registry import register
try:
    register(name="DiG", sizes=("S",))(lambda size, **fields: None)
except ValueError as error:
    assert "two families are called DiG" in str(error), error
else:
    raise SystemExit("it was taken over")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "words", [("fla", "reference"), ("backend=fla", "backend=reference"), ("fla", "recurrence=reference")]
)
def test_an_option_is_given_once(words: tuple[str, ...]) -> None:
    with pytest.raises(UnknownModelError, match="twice"):
        find_family("DiG").read_words(words)

"""What options promise: one place for each, from which help, checks and signatures are made, without PyTorch."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from click.testing import CliRunner

from cli import main
from data.builders.coloured_mnist import ColouredMnistOptions
from data.builders.registry import BUILDERS, Builder
from options import Among, Call, Doc, Ge, Gt, Le, Message, Option, OptionSet, Registry, Word, option_fields, takes
from pipeline import EXPLAINERS
from pipeline.caching.options import CachingOptions
from pipeline.explainers import Explainer, heatmaps
from pipeline.networks.debias import DEBIAS
from teacher_cache import COMPRESSORS, PRECISIONS, Compressor
from terminal.spelling import speller, text_of
from trainer import TrainingError, train_student, train_teacher
from trainer.loop.augmentation import AUGMENTATIONS
from trainer.loop.losses import MAP_LOSSES
from trainer.loop.methods import METHODS, Method
from trainer.loop.optim import OPTIMIZERS, RATES, SCHEDULES
from trainer.settings import Settings, StudentOptions, TeacherOptions

REPOSITORY = Path(__file__).parent.parent
STUDENT = {"data": "d", "out": "o"}


# --- one place for each name ---


@pytest.fixture
def entered() -> Iterator[Callable[[Registry[Any], Any], None]]:
    """Enter a value called ``mine`` in a registry, for one test."""
    registries: list[Registry[Any]] = []

    def enter(registry: Registry[Any], value: Any) -> None:
        registry["mine"] = value
        registries.append(registry)

    yield enter
    for registry in registries:
        del registry["mine"]


@pytest.mark.parametrize(
    ("registry", "value", "options", "name", "command"),
    [
        (METHODS, Method("mine", lambda *_: None, needs=("labels",)), StudentOptions, "method", "train-student"),
        (MAP_LOSSES, lambda *_: None, StudentOptions, "map_loss", "train-student"),
        (AUGMENTATIONS, lambda values, *_: values, StudentOptions, "augment", None),
        (OPTIMIZERS, lambda *_: None, StudentOptions, "optimizer", "train-student"),
        (SCHEDULES, lambda *_: None, TeacherOptions, "schedule", "train-teacher"),
        (DEBIAS, lambda images, _: images, TeacherOptions, "debias", "train-teacher"),
        (EXPLAINERS, Explainer(heatmaps, "flex"), CachingOptions, "explainer", "cache-explanations"),
        (PRECISIONS, PRECISIONS["int8"], CachingOptions, "precision", "cache-explanations"),
        (COMPRESSORS, Compressor(level=1, note="mine"), CachingOptions, "codec", None),
    ],
    ids=["method", "map_loss", "augment", "optimizer", "schedule", "debias", "explainer", "precision", "codec"],
)
def test_what_is_entered_at_run_time_is_in_help_and_errors_and_is_taken(
    entered, registry, value, options, name, command
):
    required: dict[str, Any] = {**STUDENT, "teacher": "t"} if options is CachingOptions else dict(STUDENT)
    wrong = ("minx",) if name == "augment" else "minx"
    with pytest.raises(options.ERROR) as refused:
        options(**required, **{name: wrong})
    assert "mine" not in str(refused.value).partition("choose")[2]
    entered(registry, value)
    options(**required, **{name: ("mine",) if name == "augment" else "mine"})
    with pytest.raises(options.ERROR, match=rf"unknown {name} 'minx': choose one of .*mine.*Did you mean mine"):
        options(**required, **{name: wrong})
    if command is not None:
        page = CliRunner().invoke(main, [command, "--help"]).output
        assert "|mine" in page
        typed = [command, f"--{name.replace('_', '-')}", "minx"]
        assert "Did you mean mine" in CliRunner().invoke(main, typed).output


def test_a_codec_is_in_the_help_and_in_the_shells_error_for_a_wrong_one(entered):
    page = " ".join(CliRunner().invoke(main, ["cache-explanations", "--help"]).output.split())
    assert all(f"{name} ({compressor.note})" in page for name, compressor in COMPRESSORS.items())
    assert all(f"{precision.compressor} for {name}" in page for name, precision in PRECISIONS.items())
    entered(COMPRESSORS, Compressor(level=1, note="mine"))
    page = CliRunner().invoke(main, ["cache-explanations", "--help"]).output
    assert "--codec [lz4|zstd|mine|auto|blosc-COMPRESSOR-LEVEL-SHUFFLE]" in page
    typed = ["cache-explanations", "--data", "d", "--teacher", "t", "--out", "o", "--codec"]
    for wrong, near in (("minx", "mine"), ("blosc-mine-1-shufle", "blosc-mine-1-shuffle")):
        output = CliRunner().invoke(main, [*typed, wrong]).output
        assert f"unknown --codec '{wrong}': choose one of auto, lz4, zstd, mine, or blosc-COMPRESSOR" in output
        assert re.search(rf"Did you mean .*\b{near}\b", output)
    assert CachingOptions(**STUDENT, teacher="t", codec="blosc-mine-9-shuffle").codec == "blosc-mine-9-shuffle"


def test_a_dataset_that_is_entered_at_run_time_is_a_command_of_make_data(entered, tmp_path):
    def make(out, seed, limit, **_):
        return {"train": seed + limit}

    def output(*words: str) -> str:
        return CliRunner().invoke(main, ["make-data", *words]).output

    assert "No such command 'mine'" in output("mine")
    entered(BUILDERS, Builder(make, ColouredMnistOptions, "Build my own dataset.\n\nIt is mine.", "make-data mine"))
    assert "Build my own dataset." in output("--help")
    assert "--seed" in output("mine", "--help")
    assert "Did you mean mine?" in output("minx")
    assert output("mine", "--out", "d", "--seed", "3", "--limit", "4") == "d: train 7\n"


def test_a_deferred_entry_is_made_once_when_it_is_first_used():
    registry, calls = Registry[list[int]]("rule"), []
    registry.defer("late")(lambda: calls.append(1) or calls)
    assert list(registry) == ["late"]
    assert calls == []
    assert registry["late"] is registry.find("late")
    assert calls == [1]


# --- fields ---


@dataclass(frozen=True, kw_only=True)
class Several(OptionSet):
    ERROR = TrainingError

    rate: Annotated[float, Gt(0), Le(1), Doc("Rate.")] = 0.5
    count: Annotated[int | None, Ge(1), Doc("Count.")] = None
    kind: Annotated[Literal["a", "b"], Doc("Kind.")] = "a"
    names: Annotated[tuple[str, ...], Among({"x": 1, "y": 2}), Doc("Names.")] = ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0}, "rate must be more than 0 and at most 1, got 0"),
        ({"rate": float("nan")}, "rate must be more than 0 and at most 1, got nan"),
        ({"rate": "1"}, "rate must be float, got '1'"),
        ({"count": True}, "count must be int or None, got True"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"kind": "c"}, "unknown kind 'c': choose one of a, b."),
        ({"names": ["x", "z"]}, "unknown names 'z': choose one of x, y."),
    ],
)
def test_a_wrong_value_is_refused_with_its_option_and_what_is_allowed(options, message):
    with pytest.raises(TrainingError) as refused:
        Several(**options)
    assert str(refused.value) == message


def test_right_values_are_taken_an_int_for_a_float_among_them():
    assert Several(rate=1, count=3, kind="b", names=["x"]).rate == 1


def test_functions_have_the_signature_and_the_documentation_of_their_options():
    @takes(Several)
    def function(kind, **options):
        """Do something."""

    assert list(inspect.signature(function).parameters) == ["kind", "rate", "count", "names"]
    assert "rate: Rate." in function.__doc__
    for train, options in ((train_student, StudentOptions), (train_teacher, TeacherOptions)):
        parameters = inspect.signature(train).parameters
        assert set(parameters) == {field.name for field in option_fields(options)}
        assert parameters["batch_size"].default == 128


def test_the_rate_follows_the_optimizer_and_the_start():
    assert set(RATES) == set(OPTIMIZERS)
    places = {"data": "d", "cache": "c", "out": "o"}

    def rate(arch="small-cnn", **options):
        return Settings.of(StudentOptions(arch=arch, **places, **options), {"lrp": 1.0}, 10).lr

    assert (rate(optimizer="adam"), rate(optimizer="muon"), rate(optimizer="muon", lr=0.1)) == (4e-3, 1e-2, 0.1)
    assert (rate(), rate(arch="resnet18"), rate(student_factory="nets:build")) == (1e-2, 4e-3, 4e-3)
    assert (rate(init="w.pt"), rate(init="w.pt", lr=0.1)) == (2.5e-3, 0.1)
    teacher = TeacherOptions(data="d", out="o", weights="w.pt", optimizer="sgd")
    assert Settings.of(teacher, {"erm": 1.0}, 10).lr == 2.5e-3


def test_every_option_has_a_help_text_that_stands_alone():
    for options in (StudentOptions, TeacherOptions, CachingOptions):
        for field in option_fields(options):
            assert field.doc[0].isupper() or field.doc.startswith(("flip", "auto")), field.name
            assert field.doc.endswith("."), field.name


def test_every_help_text_is_written_once():
    texts: list[str] = []
    for package in ("options", "data", "pipeline", "trainer"):
        for file in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Doc":
                    texts.append(ast.unparse(node.args[0]))
    assert len(texts) > 50
    assert [text for text in set(texts) if texts.count(text) > 1] == []


# --- errors ---


def test_a_message_is_spelled_for_python_and_for_a_shell_and_survives_a_process():
    call = Call("cache_explanations", {"data": "a b", "teacher": Word("TEACHER"), "features": True})
    error = TrainingError(Message("give ", Option("batch_size", 8), " or ", Option("pyramid", False), ": ", call))
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert str(one) == (
            "give batch_size=8 or pyramid=False: cache_explanations(data='a b', teacher=TEACHER, features=True)"
        )
        assert text_of(one, main.commands["train-student"]) == (
            "give --batch-size 8 or --flat: python cli.py cache-explanations --data 'a b' --teacher TEACHER --features"
        )
    assert [option.name for option in error.args[0].options] == ["batch_size", "pyramid"]


def test_what_spells_for_a_shell_survives_a_process():
    spell = pickle.loads(pickle.dumps(speller(main.commands["train-student"])))
    spelled = [spell(Option("arch_options")), spell(Option("pyramid", False)), spell(Option("pyramid"))]
    assert spelled == ["--arch-option", "--flat", "--pyramid"]
    assert (
        spell(Call("repair", command="inspect-cache", switches=("repair",))) == "python cli.py inspect-cache --repair"
    )


OTHER_PROGRAMS = {  # flags of git, pip and torchrun, and a name of CSS
    *("--error-unmatch", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"),
    *("torchrun --nproc-per-node", "pip install --force-reinstall", "var(--model-"),
}
SPEAKS_COMMAND_LINE = re.compile(r"(?<![\w-])--[a-z]|cli\.py")


@pytest.mark.parametrize("package", ["data", "teacher_cache", "pipeline", "trainer"])
def test_no_text_of_a_library_has_a_flag_or_a_command_of_ours(package):
    groups = [main.commands[name].commands.values() for name in ("make-data", "reproduce")]
    examples = {command.example for commands in groups for command in commands}  # for a shell, as data
    for file in (REPOSITORY / package).rglob("*.py"):
        tree = ast.parse(file.read_text())
        documented = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        docstrings = {id(node.body[0].value) for node in documented if ast.get_docstring(node) is not None}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                text = "" if node.value in examples else node.value
                for other in OTHER_PROGRAMS:
                    text = text.replace(other, "")
                assert not SPEAKS_COMMAND_LINE.search(text), f"{file}:{node.lineno}: {node.value}"

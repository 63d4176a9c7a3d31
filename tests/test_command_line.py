"""What help, configuration files, completion and suggestions of the command line promise."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class
from click.testing import CliRunner, Result

from cli import main
from options import did_you_mean
from terminal.help import Command, Group
from trainer import TrainingError
from trainer.settings import StudentOptions

ROOT = Path(__file__).parent.parent


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, with the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())
every_command = pytest.mark.parametrize("path", COMMANDS, ids=" ".join)


def parsed(*line: object) -> dict[str, object]:
    """What a command would be called with."""
    words = [str(word) for word in line]
    path = next(path for path in COMMANDS if tuple(words[: len(path)]) == path)
    with whole() as root, COMMANDS[path].make_context(path[-1], words[len(path) :], root) as ctx:
        return dict(ctx.params)


def whole() -> click.Context:
    """The context that commands are in."""
    return click.Context(main, info_name="cli.py", **main.context_settings)


def write(path: Path, values: object) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


# --- help ---


@every_command
def test_the_help_says_what_an_option_takes(path):
    """PATH and TEXT do not tell a folder from a file or a name, nor NAMES numbers."""
    with whole() as root, click.Context(COMMANDS[path], info_name=path[-1], parent=root) as ctx:
        told = {
            param.name: param.make_metavar(ctx)
            for param in COMMANDS[path].params
            if isinstance(param, click.Option) and not param.is_flag
        }
    assert not {name for name, metavar in told.items() if metavar in ("PATH", "TEXT", "NAMES") or "<" in metavar}
    assert {"NUMBER,…"} >= {metavar for name, metavar in told.items() if name in ("mean", "std")}


@every_command
def test_help_has_every_option_once_under_a_heading_and_ends_with_an_example(path):
    lines = run(*path, "--help").output.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[-2:] == ["Other options:", "Example:"]
    assert len(headings) == len(set(headings)) >= 3
    others = lines[lines.index("Other options:") : lines.index("Example:")]
    assert [line.split()[0].rstrip(",") for line in others if line.startswith("  -")] == ["--config", "-h"]
    below = lines[lines.index(headings[0]) :]
    flags = [line.split()[0] for line in below if line.startswith("  --")]
    assert sorted(flags) == sorted(opt for param in COMMANDS[path].params for opt in param.opts if opt.startswith("--"))
    assert lines[-1].startswith(f"  python cli.py {' '.join(path)}")


@pytest.mark.parametrize("kind", [Command, Group])
def test_the_help_of_a_command_has_the_short_flag_even_after_a_look_without_the_program(kind):
    command = kind("one")
    assert command.get_help_option(click.Context(command)) is not None  # which click keeps
    with whole() as root, click.Context(command, parent=root) as ctx:
        assert command.get_help_option(ctx).opts == ["-h", "--help"]


@every_command
def test_the_example_is_a_command_that_is_understood(path):
    words = shlex.split(COMMANDS[path].example)
    assert tuple(words[: len(path)]) == path
    parsed(*words)


@every_command
def test_every_option_is_explained_and_its_default_shown(path):
    with whole() as root, click.Context(COMMANDS[path], parent=root) as ctx:
        for param in COMMANDS[path].params:
            if isinstance(param, click.Option):
                _, text = param.get_help_record(ctx)
                assert param.help, param.name
                plain = isinstance(param.default, bool | int | float | str) and param.default is not False
                assert "default:" in text or not plain, param.name


def test_the_commands_are_listed_as_they_are_used_under_headings():
    output = run("--help").output
    listed = [line.split()[0] for line in output[output.index("Data and teacher:") :].splitlines() if line[:2] == "  "]
    first = ["make-data", "add-fingerprints", "train-teacher", "cache-explanations", "inspect-cache", "train-student"]
    assert listed[:6] == first
    assert set(main.commands) <= set(listed)
    assert all(
        f"\n{command.heading}:\n" in output and command.heading != "Commands" for command in main.commands.values()
    )


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "train-student --help",
        "cache-explanations --help",
        "trian-student",
        "train-student --optimiser adam",
        "train-student --optimizer adan",
        "train-student --config x.yaml --stepz 5",
    ],
)
def test_help_and_wrong_options_do_not_wait_for_pytorch(line, tmp_path):
    write(tmp_path / "x.yaml", {"steps": 3})
    code = (
        "import sys; from cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'zarr', 'dask', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *line.split()], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


def test_a_small_network_is_explained_without_torchvision_and_the_compiler():
    code = (
        "import sys, torch; from pipeline import explain; from pipeline.networks.models import build_network\n"
        "network = build_network('small-cnn', 3, (3, 8, 8), free_of_biases=True)[0].eval()\n"
        "explain(network, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), 0.1)\n"
        "assert not {'torchvision', 'torch._dynamo'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("line", ["make-data --help", "make-data image-folder --sizee 3", "reproduce --help"])
def test_the_commands_of_a_group_are_made_without_pytorch(line):
    code = (
        "import sys; from cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "assert 'data.builders.image_folder' in sys.modules or 'trainer.reproduction.profiles' in sys.modules\n"
        "assert not {'torch', 'zarr', 'dask'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *line.split()], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


# --- a file of options ---

STUDENT = ("train-student", "--data", "d", "--out", "o")


def test_a_file_gives_options_by_either_spelling_and_the_command_line_wins(tmp_path):
    file = write(
        tmp_path / "a.yaml", "data: d\nout: o\nbatch-size: 64\nclip_norm: 1e-3\nsteps: 10\nmask_target: true\n"
    )
    options = parsed("train-student", "--config", file)
    assert (options["data"], options["batch_size"], options["clip_norm"], options["steps"]) == ("d", 64, 1e-3, 10)
    assert options["mask_target"] is True
    assert options["schedule"] == "one-cycle"  # neither says it
    options = parsed("train-student", "--steps", 20, "--config", file, "--data", "mine", "--out", "p")
    assert (options["data"], options["out"], options["steps"], options["batch_size"]) == ("mine", Path("p"), 20, 64)


def test_lists_are_repeated_options_and_mappings_are_pairs(tmp_path):
    file = write(
        tmp_path / "a.yaml",
        {"arch_options": {"width": 64, "norm": "batch"}, "augment": ["flip", "shift"], "pyramid": False},
    )
    options = parsed(*STUDENT, "--config", file)
    assert dict(options["arch_options"]) == {"width": 64, "norm": "batch"}
    assert (list(options["augment"]), options["pyramid"]) == (["flip", "shift"], False)
    assert parsed(*STUDENT, "--config", file, "--arch-option", "width=8")["arch_options"] == {"width": 8}
    file = write(tmp_path / "b.yaml", {"arch-option": ["width=64"], "augment": "flip,crop"})
    options = parsed(*STUDENT, "--config", file)
    assert (options["arch_options"], list(options["augment"])) == ({"width": 64}, ["flip", "crop"])
    file = write(tmp_path / "c.yaml", {"seed": [1, 2], "arch": "small-cnn", "devices": ["cpu", "cuda:0"]})
    options = parsed("train-students", "--config", file)
    assert (options["seed"], options["arch"], list(options["devices"])) == ((1, 2), ("small-cnn",), ["cpu", "cuda:0"])
    file = write(tmp_path / "d.yaml", {"epsilon_range": [0.1, 1], "resolution": 2, "cache": "x"})
    with pytest.raises(click.UsageError, match="does not take: 'cache'"):
        parsed("cache-explanations", "--config", file)
    file = write(tmp_path / "d.yaml", {"epsilon_range": [0.1, 1], "resolution": 2, "data": "d", "teacher": "t"})
    options = parsed("cache-explanations", "--out", "o", "--config", file)
    assert (options["epsilon_range"], options["resolution"]) == ((0.1, 1.0), 2)
    file = write(tmp_path / "e.yaml", {"test": {"ood": "a", "shift": "b"}, "train": "t", "size": 8, "out": "o"})
    assert parsed("make-data", "image-folder", "--config", file)["tests"] == {"ood": Path("a"), "shift": Path("b")}


def test_a_file_gives_an_argument_too(tmp_path):
    assert parsed("inspect-cache", "--config", write(tmp_path / "a.yaml", {"cache": "c"}))["cache"] == "c"
    file = write(tmp_path / "b.yaml", {"dataset": "d", "test": {"ood": "test"}, "class-names": ["a", "b"], "out": "o"})
    options = parsed("make-data", "hf", "--config", file)
    assert (options["dataset"], options["tests"], options["class_names"]) == (Path("d"), {"ood": "test"}, ("a", "b"))


def test_a_positional_option_has_no_flag_and_a_split_is_given_by_name():
    options = parsed("make-data", "hf", "folder", "--test", "ood=test", "--out", "o")
    assert (options["dataset"], options["tests"]) == (Path("folder"), {"ood": "test"})
    for words, error in (
        (("--test", "ood"), "'ood' is no NAME=SPLIT: give one such as ood=test"),
        (("--dataset", "d"), "--dataset"),
    ):
        with pytest.raises(click.UsageError, match=error):
            parsed("make-data", "hf", "folder", *words, "--out", "o")


@pytest.mark.parametrize("text", ["1e-3", "'0.001'", "0.001", "1.0e-3"])
def test_a_number_is_read_as_on_the_command_line(tmp_path, text):
    assert parsed(*STUDENT, "--config", write(tmp_path / "a.yaml", f"lr: {text}"))["lr"] == 1e-3


def test_words_of_yaml_are_words(tmp_path):
    file = write(tmp_path / "a.yaml", "data: 2024-01-01\nout: on\nseed: 010\nloss: null\ndebias: none\n")
    with pytest.raises(click.UsageError, match="'loss'"):
        parsed("train-teacher", "--config", file)
    file = write(tmp_path / "a.yaml", "data: 2024-01-01\nout: on\nseed: 010\nclip-norm: null\ndebias: none\n")
    options = parsed("train-teacher", "--config", file)
    assert (options["data"], options["out"], options["seed"], options["debias"]) == (
        "2024-01-01",
        Path("on"),
        10,
        "none",
    )
    assert options["clip_norm"] is None


@pytest.mark.parametrize(("typed", "dropped"), [("--epochs 2", "steps"), ("--loss output=1", "method")])
def test_the_command_line_wins_over_the_other_of_two_options_too(tmp_path, typed, dropped):
    file = write(tmp_path / "a.yaml", {"steps": 5, "method": "lrp"})
    assert parsed(*STUDENT, *typed.split(), "--config", file)[dropped] is None
    file = write(tmp_path / "b.yaml", {"student_factory": "a:b"})
    options = parsed(*STUDENT, "--arch", "resnet18", "--config", file)
    assert (options["arch"], options["student_factory"]) == ("resnet18", None)
    file = write(tmp_path / "c.yaml", {"arch": "resnet18"})
    options = parsed(*STUDENT, "--student-factory", "a:b", "--config", file)
    assert (options["arch"], options["student_factory"]) == (None, "a:b")


@pytest.mark.parametrize(
    ("file", "typed", "kept"),
    [
        ({"masks": "m"}, "--mask-box 0,0,12,8 --mask-keeps outside", {"mask_box", "mask_keeps"}),
        ({"masks": "m"}, "--mask-all f", {"mask_all"}),
        ({"mask_all": "f", "mask_keeps": "inside"}, "--mask-box 0,0,12,8", {"mask_box", "mask_keeps"}),
        ({"mask_all": "f", "mask_keeps": "inside"}, "--masks m", {"masks"}),
        ({"mask_box": "0,0,12,8", "mask_keeps": "inside"}, "--masks m", {"masks"}),
        ({"mask_box": "0,0,12,8", "mask_keeps": "inside"}, "--mask-keeps outside", {"mask_box", "mask_keeps"}),
    ],
)
def test_each_way_to_give_masks_on_the_command_line_replaces_every_other_one_of_a_file(tmp_path, file, typed, kept):
    words = ["make-data", "image-folder", "--train", "t", "--size", "8", "--out", "o", *typed.split()]
    options = parsed(*words, "--config", write(tmp_path / "a.yaml", file))
    assert {name for name in ("masks", "mask_all", "mask_box", "mask_keeps") if options[name] is not None} == kept


MODELS = "--data d --model m --out o.png"
CACHING = "--data d --teacher t --out o"


@pytest.mark.parametrize(
    ("command", "line", "values", "dropped", "default"),
    [
        ("evaluate", "--data d --teacher t", {"model": "m"}, "model", None),
        ("evaluate", "--data d --model m", {"teacher": "t"}, "teacher", None),
        ("show-explanations", f"{MODELS} --sample 3", {"samples": 4}, "samples", None),
        ("show-explanations", f"{MODELS} --samples 4", {"sample": [3]}, "indices", ()),
        ("cache-explanations", f"{CACHING} --share", {"scheduler": "tcp://a:1"}, "scheduler", None),
        ("cache-explanations", f"{CACHING} --scheduler tcp://a:1", {"share": True}, "share", False),
        ("cache-explanations", f"{CACHING} --prompt {{}}", {"prompts": "p.txt"}, "prompts", None),
        ("cache-explanations", f"{CACHING} --prompts p.txt", {"prompt": ["{}"]}, "prompt", ()),
        ("train-students", "--epochs 2", {"steps": 5}, "steps", None),
    ],
)
def test_a_typed_option_replaces_the_one_of_a_file_that_excludes_it(tmp_path, command, line, values, dropped, default):
    file = write(tmp_path / "a.yaml", values)
    assert parsed(command, *line.split(), "--config", file)[dropped] == default


BAD = {
    "stepz: 5": "a.yaml has options that train-student does not take: 'stepz'. Did you mean steps",
    "debias: none\nbatch: 5": "'debias'. And 'batch'. Did you mean batch_size",
    "no-bias-free: true": "'no-bias-free'. Write 'bias_free: false'.",
    "flat: true": "'flat'. Write 'pyramid: false'.",
    "batch-size: 5\nbatch_size: 6": "a.yaml has 'batch_size' twice.",
    "steps: 1.5": "Invalid value for '--steps': '1.5' is not a valid integer range. (in a.yaml)",
    "steps: 0": "Invalid value for '--steps': 0 is not in the range x>=1. (in a.yaml)",
    "steps: [1, 2]": "Invalid value for '--steps': ['1', '2'] is no single value (in a.yaml)",
    "steps: {a: 1}": "Invalid value for '--steps': {'a': '1'} is no single value (in a.yaml)",
    "arch_options: {width: {a: 1}}": "Invalid value for '--arch-option': {'a': '1'} is no single value (in a.yaml)",
    "arch_options: width": "'width' is no NAME=VALUE: give one such as width=64 (in a.yaml)",
    "method: grad": "'grad' is not one of 'lrp'",
    "method: gradcam": "Did you mean grad-cam? (in a.yaml)",
    "mask_target: perhaps": "'perhaps' is not a valid boolean",
    "clip_norm: null": "it is null: leave it out for its default, 1.0 (in a.yaml)",
    "- steps": "a.yaml must hold options by name, one on each line, such as 'steps: 1000'",
    "": "a.yaml must hold options by name",
    "a: [": "a.yaml is not valid YAML: while parsing",
    "config: b.yaml": "does not take: 'config'.",
}


@pytest.mark.parametrize("text", BAD)
def test_what_a_file_says_wrongly_is_refused_with_its_name_and_the_remedy(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    write(Path("a.yaml"), text)
    result = run(*STUDENT, "--config", "a.yaml")
    assert result.exit_code == 2
    assert BAD[text] in " ".join(result.output.split()), result.output
    assert not Path("o").exists()


def test_a_wrong_value_of_the_command_line_does_not_name_the_file(tmp_path):
    result = run(*STUDENT, "--config", write(tmp_path / "a.yaml", {"steps": 5}), "--steps", "0")
    assert "a.yaml" not in result.output
    assert "'--steps': 0 is not in the range" in result.output


def test_a_missing_option_and_a_missing_file_are_said(tmp_path):
    result = run("train-student", "--data", "d", "--config", write(tmp_path / "a.yaml", {"steps": 5}))
    assert "Missing option '--out'" in result.output
    result = run(*STUDENT, "--config", tmp_path / "b.yaml")
    assert result.exit_code == 2
    assert "does not exist" in " ".join(result.output.split())


# --- suggestions ---

MISSPELT = {
    "train-studnet --out o": "No such command 'train-studnet'. Did you mean train-student",
    "make-data colored-mnist": "No such command 'colored-mnist'. Did you mean coloured-mnist",
    "zzz": "No such command 'zzz'.",
    "train-student --stepz 5": "--steps",
    "train-student --data d --out o --method gradcam": "Did you mean grad-cam?",
    "train-student --data d --out o --optimizer Adam": "Did you mean adam",
    "cache-explanations --data d --teacher t --out o --explainer epsilonplus": "Did you mean epsilon-plus?",
    "train-teacher --data d --out o --debias greyscale": "Did you mean grayscale?",
    "reproduce coloured-mnist --out o --profile gpus": "Did you mean gpu",
    "reproduce coloured-mnist --out o --methods lrp,grad-cm": "Did you mean grad-cam",
}


@pytest.mark.parametrize("line", MISSPELT)
def test_a_misspelt_word_is_answered_with_the_nearest(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*line.split())
    assert result.exit_code in (1, 2)
    assert MISSPELT[line] in " ".join(result.output.split()), result.output
    assert not any(tmp_path.iterdir())


def test_far_words_suggest_nothing():
    assert did_you_mean("zzz", ["lrp", "output"]) == ""


# --- a run's own file ---


def trained(*line: object) -> None:
    result = run(*line)
    assert result.exit_code == 0, result.output


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "weights.pt", weights_only=True)


def assert_alike(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_teachers_config_repeats_it_bit_for_bit(dataset, tmp_path):
    options = ["--steps", 3, "--batch-size", 32, "--arch-option", "width=8", "--augment", "flip,shift", "--seed", 4]
    trained("train-teacher", "--data", dataset, "--out", tmp_path / "a", "--checkpoint-minutes", "inf", *options)
    trained("train-teacher", "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "b")
    assert_alike(tmp_path / "a", tmp_path / "b")
    one, other = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in "ab")
    assert {**one, "out": None} == {**other, "out": None}
    assert one["arch_options"] == {"width": 8}


def test_a_students_config_repeats_it_bit_for_bit_and_says_that_it_is_finished(
    dataset, cache, validation_cache, tmp_path
):
    options = [
        "--epochs",
        0.2,
        "--batch-size",
        32,
        "--loss",
        "lrp=1,output=0.5",
        "--lr",
        1e-5,
        "--memory-budget",
        "1MB",
    ]
    stores = ["--cache", cache, "--validation-cache", validation_cache]
    trained("train-student", "--data", dataset, "--out", tmp_path / "a", *stores, *options, "--flat", "--ema", 0.9)
    config = tmp_path / "a" / "config.yaml"
    trained("train-student", "--config", config, "--out", tmp_path / "b")
    assert_alike(tmp_path / "a", tmp_path / "b")
    result = run("train-student", "--config", config)
    assert result.exit_code == 1
    assert f"{tmp_path / 'a'} holds a finished training" in " ".join(result.output.split())
    trained("train-student", "--config", config, "--out", tmp_path / "c", "--steps", 1)
    assert json.loads((tmp_path / "c" / "result.json").read_text())["steps"] == 1


def test_an_unfinished_runs_config_goes_on_and_stays_as_it_was(dataset, tmp_path, monkeypatch):
    line = ["train-teacher", "--data", dataset, "--steps", 4, "--batch-size", 32, "--checkpoint-steps", 2]
    with monkeypatch.context() as patch:

        def stop(*args, **kwargs):
            raise TrainingError("stopped")

        patch.setattr("trainer.loop.training.save_weights", stop)
        assert run(*line, "--out", tmp_path / "a").exit_code == 1
    config = tmp_path / "a" / "config.yaml"
    before = config.read_bytes()
    trained("train-teacher", "--config", config, "--workers", 1)
    assert config.read_bytes() == before
    assert len((tmp_path / "a" / "starts.jsonl").read_text().splitlines()) == 2
    trained(*line, "--out", tmp_path / "b")
    assert_alike(tmp_path / "a", tmp_path / "b")


def test_each_student_of_many_has_a_config_that_repeats_it(dataset, cache, tmp_path):
    options = ["--steps", 2, "--batch-size", 32, "--seed", 3, "--devices", "cpu"]
    trained("train-students", "--data", dataset, "--cache", cache, "--out", tmp_path / "many", *options)
    (config,) = (tmp_path / "many").glob("*/config.yaml")
    trained("train-student", "--config", config, "--out", tmp_path / "again")
    assert_alike(config.parent, tmp_path / "again")


@pytest.mark.parametrize("command", ["train-teacher", "train-student"])
def test_what_a_run_notes_is_what_its_command_takes(command, dataset, cache, tmp_path):
    stores = ["--cache", cache] if command == "train-student" else []
    trained(command, "--data", dataset, "--out", tmp_path / "a", "--steps", 1, "--batch-size", 8, *stores)
    noted = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    taken = {param.name for param in main.commands[command].params} - {"config", "arch_options"}
    assert set(noted) - {"arch_options"} == taken


def test_text_that_looks_like_something_else_stays_text():
    record = StudentOptions(data="d", out="o", arch_options={"a": "true", "b": "x", "c": 3}).record()
    assert record["arch_options"] == {"a": '"true"', "b": "x", "c": 3}


# --- completion ---


def completed(*words: str, incomplete: str) -> list[CompletionItem]:
    return ShellComplete(main, {}, "explanation-distillation", "_X").get_completions(list(words), incomplete)


def test_commands_options_choices_architectures_and_files_are_completed():
    def values(*words: str, incomplete: str) -> list[str]:
        return [item.value for item in completed(*words, incomplete=incomplete)]

    assert values(incomplete="train-") == ["train-teacher", "train-student", "train-students"]
    assert values("make-data", incomplete="coco") == ["coco-on-places"]
    assert values("train-student", incomplete="--conf") == ["--config"]
    assert values("train-student", "--method", incomplete="g") == ["gradient-x-input", "grad-cam", "group-dro"]
    assert values("cache-explanations", "--explainer", incomplete="ep") == ["epsilon-plus"]
    assert values("train-student", "--arch", incomplete="small-") == ["small-cnn", "small-resnet"]
    assert {"resnet18", "resnet50"} <= set(values("train-students", "--arch", incomplete="resnet"))
    assert "gpu" in values("reproduce", "coloured-mnist", "--profile", incomplete="")
    assert [item.type for item in completed("train-student", "--data", incomplete="D")] == ["dir"]
    assert [item.type for item in completed("train-student", "--out", incomplete="D")] == ["file"]
    assert [item.type for item in completed("train-student", "--config", incomplete="")] == ["file"]


def test_completion_goes_on_after_a_config(tmp_path):
    file = write(tmp_path / "a.yaml", {"nonsense": 1})
    assert [i.value for i in completed("train-student", "--config", str(file), incomplete="--snap")] == ["--snapshots"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script_as_the_page_says(shell):
    page = (ROOT / "docs" / "command-line.md").read_text()
    assert f"_EXPLANATION_DISTILLATION_COMPLETE={shell}_source explanation-distillation" in page
    kind = get_completion_class(shell)
    assert kind is not None
    variable = "_EXPLANATION_DISTILLATION_COMPLETE"
    assert f"{variable}={shell}_complete" in kind(main, {}, "explanation-distillation", variable).source_template % (
        kind(main, {}, "explanation-distillation", variable).source_vars()
    )

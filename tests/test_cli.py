"""What the command line promises: one paragraph, the value, the remedy, an exit code, and no file touched."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import zarr
from click.testing import CliRunner, Result

import trainer
from cli import main
from data import make_coloured_mnist
from data.builders.registry import BUILDERS
from pipeline import EXPLAINERS
from trainer import train_teacher


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def tree(path: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory, dataset, teacher, cache, validation_cache) -> Path:
    """A folder with one of everything, good and bad."""
    path = tmp_path_factory.mktemp("world")
    for name, source in (("data.zarr", dataset), ("teacher", teacher), ("cache.zarr", cache)):
        shutil.copytree(source, path / name)
    shutil.copytree(validation_cache, path / "validation.zarr")
    make_coloured_mnist(path / "other.zarr", seed=5, limit=40)
    train_teacher(dataset, path / "other-teacher", steps=2, batch_size=32, seed=3)
    shutil.copytree(cache, path / "incomplete.zarr")
    (path / "incomplete.zarr" / "commits" / "c.0.0").unlink()
    zarr.create_group(str(path / "foreign.zarr"), zarr_format=3)
    (path / "folder").mkdir()
    (path / "folder" / "notes.txt").write_text("mine")
    (path / "file").write_text("mine")
    (path / "mine").mkdir()
    (path / "mine" / "config.json").write_text('{"my": "config"}')
    return path


TRAIN = "train-teacher --data data.zarr --out new"
CACHE = "cache-explanations --data data.zarr --teacher teacher --out new"
STUDENT = "train-student --data data.zarr --cache cache.zarr --out new"

BAD = {
    # a missing or foreign path
    "train-teacher --data nowhere --out new": (1, "no dataset at nowhere"),
    "train-teacher --data folder --out new": (1, "no dataset at folder"),
    "train-teacher --data file --out new": (1, "no dataset at file"),
    "train-teacher --data foreign.zarr --out new": (1, "no dataset of ours"),
    "train-teacher --data cache.zarr --out new": (1, "no dataset of ours"),
    "cache-explanations --data data.zarr --teacher nowhere --out new": (1, "no model at nowhere"),
    "cache-explanations --data data.zarr --teacher folder --out new": (1, "no model at folder"),
    "train-student --data data.zarr --cache nowhere --out new": (1, "no heatmap store at nowhere"),
    "train-student --data data.zarr --cache data.zarr --out new": (1, "no heatmap store at data.zarr"),
    "train-student --data data.zarr --cache file --out new": (1, "no heatmap store at file"),
    "evaluate --data data.zarr --model nowhere": (1, "no model at nowhere"),
    "evaluate --data nowhere --model teacher": (1, "no dataset at nowhere"),
    "show-explanations --data nowhere --model teacher --out new.png": (1, "no dataset at nowhere"),
    "show-explanations --data data.zarr --model folder --out new.png": (1, "no model at folder"),
    "show-explanations --data data.zarr --cache folder --out new.png": (1, "no heatmap store at folder"),
    "show-explanations --data data.zarr --out new.png": (1, "give --model or --cache"),
    "show-explanations --data other.zarr --cache cache.zarr --split train --out new.png": (1, "another dataset"),
    "show-explanations --data data.zarr --model teacher --out new.png --explain sevn": (1, "Did you mean seven"),
    "show-explanations --data data.zarr --model teacher --out new.png --sample 300": (
        1,
        "choose samples from 0 to 299",
    ),
    "show-explanations --data data.zarr --model teacher --out new.png --epsilon inf": (
        1,
        "must be a finite number, got inf",
    ),
    "show-explanations --data data.zarr --model teacher --out file": (1, "file exists: choose another --out"),
    # stores that do not belong
    "train-student --data other.zarr --cache cache.zarr --out new": (1, "was made from another dataset"),
    "train-student --data data.zarr --cache incomplete.zarr --out new": (1, "incomplete: 0 of 1 shards"),
    "train-student --data data.zarr --cache validation.zarr --out new": (1, "explains the split 'validation'"),
    f"{STUDENT} --validation-cache cache.zarr": (1, "explains the split 'train'"),
    "cache-explanations --data data.zarr --teacher other-teacher --draws 2 --out cache.zarr": (1, "weights_sha256"),
    "cache-explanations --data other.zarr --teacher teacher --draws 2 --out cache.zarr": (1, "dataset.fingerprint"),
    # unknown names and values
    f"{TRAIN} --arch resnet81": (1, "unknown architecture 'resnet81': choose small-cnn, small-resnet"),
    f"{TRAIN} --arch resnet18x": (1, "Did you mean resnet18"),
    f"{TRAIN} --arch zzz": (1, "unknown architecture 'zzz'"),
    f"{STUDENT} --arch vgg11": (1, "does not take images of shape (3, 28, 28)"),
    f"{TRAIN} --debias blur": (2, "'blur' is not one of 'grayscale', 'mask', 'mask-mean', 'mask-blur'"),
    f"{TRAIN} --debias mask": (1, "needs 'masks' in the train split"),
    f"{TRAIN} --device tpu": (1, "the device 'tpu' cannot be used here"),
    f"{TRAIN} --lr 0": (2, "--lr"),
    f"{TRAIN} --steps 0": (2, "--steps"),
    f"{TRAIN} --epochs 1 --steps 5": (1, "not both"),
    f"{TRAIN} --seed -1": (2, "--seed"),
    f"{TRAIN} --stepz 5": (2, "--steps"),
    f"{CACHE} --split test": (1, "no split 'test': choose one of train, validation, iid, ood, shift"),
    f"{CACHE} --explainer cam": (2, "'cam' is not one of 'flex'"),
    f"{CACHE} --explainer attention --draws 2": (1, "all draws of a sample are alike; leave --draws out, or give 1"),
    f"{CACHE} --explainer grad-cam --resolution 4": (1, "--resolution 4 leaves nothing of maps of 3×3: choose 1"),
    f"{CACHE} --epsilon-range 1 0.1": (1, "0 < LOW <= HIGH in float32, got 1 0.1"),
    f"{CACHE} --epsilon-range 0 1": (2, "--epsilon-range"),
    # sizes under 1
    f"{CACHE} --batch-size 0": (2, "'0' is no size of a batch: give a number of samples, at least 1, or auto"),
    f"{CACHE} --draws 0": (2, "--draws"),
    f"{STUDENT} --batch-size 0": (2, "--batch-size"),
    "make-data coloured-mnist --out new --limit 0": (2, "--limit"),
    # what the stream takes
    f"{STUDENT} --memory-budget lots": (2, "'lots' is no size in bytes: give one such as 4GB"),
    f"{STUDENT} --memory-budget -1GB": (2, "'-1GB' is negative: give a size such as 4GB"),
    f"{TRAIN} --workers 0": (2, "--workers"),
    # how it learns, and what it matches
    f"{STUDENT} --steps 5 --warmup 5": (
        1,
        "--warmup must be at least 0 and less than the 5 steps of the training, got 5",
    ),
    f"{STUDENT} --ema 1": (2, "--ema"),
    f"{STUDENT} --momentum 1": (2, "--momentum"),
    f"{STUDENT} --clip-norm 0": (2, "--clip-norm"),
    f"{STUDENT} --accumulate 0": (2, "--accumulate"),
    f"{STUDENT} --optimizer lion": (2, "'lion' is not one of 'adam', 'adamw', 'muon', 'sgd'"),
    f"{STUDENT} --precision tf32 --device cpu": (
        1,
        "--precision tf32 needs CUDA, and this training runs on cpu: choose float32",
    ),
    f"{STUDENT} --augment spin": (1, "unknown --augment 'spin': choose one of flip, shift, crop, background"),
    f"{STUDENT} --augment none,flip": (1, "--augment none,flip has 'none' beside others: leave it out"),
    f"{STUDENT} --augment background": (1, "--augment background needs 'masks' in the train split of data.zarr"),
    f"{STUDENT} --method output --augment flip": (
        1,
        "--augment flip is not valid for this method: it can have background; python cli.py make-data flipped adds",
    ),
    f"{STUDENT} --map-loss l3": (2, "'l3' is not one of 'l1', 'cosine'"),
    f"{STUDENT} --loss lrp=x": (1, "--loss lrp=x: 'x' is not a weight. Give a positive number"),
    f"{STUDENT} --loss lrp=1,cam=1": (1, "unknown --method 'cam': choose one of"),
    f"{STUDENT} --method lrp --loss output=1": (1, "give --method lrp or --loss output=1, not both"),
    f"{STUDENT} --method grad-cam": (1, "make one with python cli.py cache-explanations --data data.zarr"),
    f"{STUDENT} --method erm": (1, "--method erm learns without a store: leave --cache cache.zarr out"),
    "train-student --data data.zarr --out new": (1, "--method lrp needs --cache: make a store with python cli.py"),
    f"{STUDENT} --arch-option width": (2, "'width' is no NAME=VALUE: give one such as width=64"),
    f"{STUDENT} --arch-option dept=9": (1, "takes no option 'dept'"),
    f"{STUDENT} --mask-target": (1, "--mask-target needs 'masks' in the train split of data.zarr"),
    "train-student --data data.zarr --out new --method rrr": (1, "needs 'masks' in the train split of data.zarr"),
    f"{STUDENT} --student-factory nowhere:f": (1, "nowhere"),
    f"{STUDENT} --head other": (2, "'other' is not one of 'frozen', 'attention-pool', 'free'"),
    f"{STUDENT} --log-steps 0": (2, "--log-steps"),
    # many students
    "train-students --cache cache.zarr --out new": (2, "Missing option '--data', and the sweep has no 'data' either"),
    "train-students --data data.zarr --cache cache.zarr": (2, "Missing option '--out'"),
    "train-students nowhere.yaml": (2, "'nowhere.yaml' does not exist"),
    "train-students file --out new --data data.zarr": (1, "file must hold options by name, one on each line"),
    "train-students --data data.zarr --cache cache.zarr --out folder": (1, "choose another --out"),
    "train-students --data data.zarr --cache cache.zarr --out new --seed 1 --seed 1": (
        1,
        "two students of the sweep are alike",
    ),
    # datasets that are made from others' files
    "make-data fashion-on-textures --out new --fashion-mnist folder": (1, "no Fashion-MNIST in folder"),
    "make-data fashion-on-textures --out new --unbiased-share 2": (2, "--unbiased-share"),
    "make-data coloured-mnist --out new --unbiased-share -0.1": (2, "--unbiased-share"),
    "make-data coco-on-places --coco folder --places folder --out new": (1, "http://images.cocodataset.org"),
    "make-data waterbirds --waterbirds folder --out new": (1, "there is no folder/metadata.csv"),
    "make-data image-folder --train nowhere --size 8 --out new": (
        1,
        "--train nowhere must be a folder with a folder for each class",
    ),
    "make-data image-folder --train folder --test x --size 8 --out new": (2, "'x' is no NAME=DIR"),
    "train-teacher --data data.zarr --out new --debias segmenter": (1, "--debias segmenter needs --segmenter"),
    # an --out that is taken
    "make-data coloured-mnist --out folder": (1, "choose another --out"),
    "make-data coloured-mnist --out data.zarr": (1, "choose another --out"),
    "train-teacher --data data.zarr --out folder": (1, "choose another --out"),
    "train-teacher --data data.zarr --out teacher": (1, "choose another --out"),
    "train-teacher --data data.zarr --out file": (1, "choose another --out"),
    "train-teacher --data data.zarr --out mine": (1, "choose another --out"),
    "train-teacher --data data.zarr --out new --epochs 1e30": (1, "give fewer --steps or --epochs"),
    "train-teacher --data data.zarr --out new --arch vit_b_16": (1, "does not take images of shape (3, 28, 28)"),
    "train-teacher --data data.zarr --out new --device meta": (1, "the device 'meta' cannot be used here"),
    "cache-explanations --data data.zarr --teacher teacher --out folder": (1, "choose another --out"),
    "cache-explanations --data data.zarr --teacher teacher --out file": (1, "choose another --out"),
    "cache-explanations --data data.zarr --teacher teacher --out data.zarr": (1, "choose another --out"),
    "train-student --data data.zarr --cache cache.zarr --out folder": (1, "choose another --out"),
    "quickstart --out folder": (1, "choose another --out"),
    "reproduce coloured-mnist --out folder": (1, "choose another --out"),
    # what is reproduced
    "reproduce coloured-mnist": (2, "Missing option '--out'"),
    "reproduce coloured-mnist --out new --methods lrp,irm": (1, "no row is called 'irm' in --methods: choose from all"),
    "reproduce coloured-mnist --out new --profile tpu": (2, "'tpu' is not one of 'cpu', 'gpu', 'paper'"),
    "reproduce coloured-mnist --out new --arch resnet81": (1, "Did you mean resnet18"),
    "reproduce coloured-mnist --out new --seeds 0": (2, "--seeds"),
    f"{STUDENT} --snapshots -1": (2, "--snapshots"),
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_paragraph_with_the_value_and_touches_nothing(world, line, monkeypatch):
    monkeypatch.chdir(world)
    before = tree(world)
    code, words = BAD[line]
    result = run(*line.split())
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split()), result.output
    message = result.output[result.output.index("Error:") :]
    assert "\n\n" not in message.strip()
    assert "Traceback" not in result.output
    assert tree(world) == before


def test_the_whole_story_by_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    story = [
        "make-data coloured-mnist --out DATA.zarr --limit 200 --seed 1",
        "train-teacher --data DATA.zarr --arch small-cnn --debias grayscale --out TEACHER --steps 4 --batch-size 50",
        "train-teacher --data DATA.zarr --debias none --out ERM --epochs 1 --batch-size 50",
        "cache-explanations --data DATA.zarr --teacher TEACHER --out CACHE.zarr --draws 2 --epsilon-range 0.1 1",
        "cache-explanations --data DATA.zarr --teacher TEACHER --out VALIDATION.zarr --split validation --draws 1",
        "train-student --data DATA.zarr --cache CACHE.zarr --arch small-cnn --out RUN --epochs 1 --batch-size 50",
        "train-student --data DATA.zarr --cache CACHE.zarr --validation-cache VALIDATION.zarr --out RUN2 --steps 2 "
        "--workers 3 --memory-budget 1.5MiB",
    ]
    for line in story:
        result = run(*line.split())
        assert result.exit_code == 0, result.output
    assert "weights of step" in result.output
    assert re.search(r"[\d.]+ % of it waiting for data", result.output)
    assert "5 shards" not in run(*story[3].split()).output
    assert "1 of them from an earlier run" in run(*story[3].split()).output
    for model in ("TEACHER", "ERM", "RUN", "RUN2"):
        result = run("evaluate", "--data", "DATA.zarr", "--model", model, "--json")
        assert result.exit_code == 0, result.output
        scores = json.loads(result.stdout)
        assert {"iid", "ood", "shift", "gap", "worst_group", "splits"} <= scores.keys()
        assert scores["gap"] == pytest.approx(scores["iid"] - scores["ood"])
    text = run("evaluate", "--data", "DATA.zarr", "--model", "RUN").output
    assert re.search(r"^ood +[\d.]+ %  \[[\d.]+, [\d.]+\]  200 samples; worst group #[0-9a-f]{6}", text, re.MULTILINE)


def test_every_explainer_can_be_chosen():
    (option,) = [option for option in main.commands["cache-explanations"].params if option.name == "explainer"]
    assert list(option.type.choices) == list(EXPLAINERS)


def test_attention_maps_are_one_draw_and_features_are_stored_where_asked_for(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    options = ["--data", "data.zarr", "--teacher", "teacher", "--out", tmp_path / "c"]
    result = run("cache-explanations", *options, "--explainer", "attention", "--features")
    assert result.exit_code == 0, result.output
    found = json.loads(run("inspect-cache", tmp_path / "c", "--json").output)
    assert (found["explainer"]["draws"], found["storage"]["features"]) == (1, 1152)
    assert "maps of 1 × 3 × 3, 1 draws" in run("inspect-cache", tmp_path / "c").output


def test_what_the_bias_free_form_could_not_change_is_said(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    options = ["--arch", "mobilenet_v2", "--bias-free", "--steps", "1", "--batch-size", "8"]
    result = run("train-teacher", "--data", "data.zarr", "--out", tmp_path / "t", *options)
    assert re.search(r"could not change features\.0\.2 \(ReLU6\), .* and 30 more", result.output), result.output
    report = json.loads((tmp_path / "t" / "result.json").read_text())["bias_free"]
    assert len(report["could_not"]) == 35
    result = run("train-teacher", "--data", "data.zarr", "--out", tmp_path / "s", "--steps", "1")
    assert "could not" not in result.output
    assert json.loads((tmp_path / "s" / "result.json").read_text())["bias_free"]["homogeneity_error"] < 1e-5


def test_a_full_disk_is_said_without_a_traceback(tmp_path, monkeypatch, dataset):
    import errno

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "DATA.zarr/train/images/c/0")

    monkeypatch.setitem(BUILDERS, "coloured-mnist", replace(BUILDERS["coloured-mnist"], make=full))
    result = run("make-data", "coloured-mnist", "--out", tmp_path / "d")
    assert result.exit_code == 1
    assert result.output == "Error: DATA.zarr/train/images/c/0: No space left on device\n"


def test_a_bug_of_ours_is_not_passed_off_as_the_users(monkeypatch):
    def bug(*args, **kwargs):
        raise KeyError("ours")

    monkeypatch.setitem(BUILDERS, "coloured-mnist", replace(BUILDERS["coloured-mnist"], make=bug))
    assert isinstance(run("make-data", "coloured-mnist", "--out", "nowhere").exception, KeyError)


@pytest.mark.parametrize("command", ["", "make-data coloured-mnist", "reproduce coloured-mnist", *main.commands])
def test_every_command_has_help(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert len(result.output) > 100


@pytest.mark.parametrize(("accuracy", "is_printed"), [(12.5, True), (40.0, False)])
def test_the_worst_class_in_a_group_is_printed_if_it_is_worse_than_the_worst_group(monkeypatch, accuracy, is_printed):
    worst = {"group": "grass", "accuracy": 40.0, "samples": 20}
    pair = {"class": "dog", "group": "sand", "accuracy": accuracy, "samples": 8}
    split = {"accuracy": 90.0, "interval": [89.0, 91.0], "samples": 99, "on_object": None}
    splits = {"ood": {**split, "worst_group": worst, "worst_class_in_group": pair}}
    result = {"kind": "student", "iid": None, "gap": None, "splits": splits}
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: result)
    (line,) = run("evaluate", "--data", "d.zarr", "--model", "student").output.splitlines()
    assert "; worst group grass 40.00 % of 20" in line
    assert ("; worst class in a group dog in sand 12.50 % of 8" in line) == is_printed
    assert ("worst class" in line) == is_printed


def test_the_warning_of_a_biased_teacher_speaks_in_flags(monkeypatch):
    split = {"accuracy": 90.0, "interval": [89.0, 91.0], "samples": 9, "worst_group": None, "on_object": None}
    splits = {"iid": split, "shift": {**split, "accuracy": 10.0}}
    result = {"kind": "teacher", "iid": 90.0, "gap": None, "splits": splits}
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: result)
    said = CliRunner().invoke(main, ["evaluate", "--data", "d.zarr", "--model", "teacher"])
    assert said.exit_code == 0, said.output
    assert "loses 80.0 points from iid to shift" in said.stderr
    assert "another --debias or another --prompt" in " ".join(said.stderr.split())

"""The command line: parse, call one function, print its result.

python cli.py quickstart
python cli.py cache-explanations --data DATA.zarr --teacher TEACHER_DIR --out CACHE.zarr
python cli.py train-student --data DATA.zarr --cache CACHE.zarr --out RUN_DIR
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import click

from pipeline import EXPLAINERS
from terminal import inline_picture
from terminal.command_line import ARGUMENTS, COMMAND, Choice, Group, options, under
from terminal.options import RegistryChoice, options_of
from terminal.spelling import spell, text_of
from terminal.types import (
    Architecture,
    BatchSize,
    LocalFolder,
    Location,
    NamedFolder,
    Names,
    TeacherName,
)
from trainer.settings import StudentOptions, TeacherOptions

# Packages that import PyTorch are imported inside the commands, so that --help and wrong options answer at once.


# Headings that several commands have, and options of each.
FILES, TRAINING, RUN, OUTPUT, OWN_CODE = "Files", "Training", "Run", "Output", "Your own code"

DATA = click.option("--data", required=True, type=Location(), help="A dataset in our layout.")
OUT = click.option(
    "--out", required=True, type=LocalFolder(path_type=Path), help="Where to write: nothing, or an unfinished training."
)
SEED = click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="Of everything that is random.")
DEVICE = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
FACTORY = click.option(
    "--student-factory",
    metavar="MODULE:FUNCTION",
    help="Your own network: what this function of yours returns. Its code is run.",
)
SEGMENTER = click.option(
    "--segmenter",
    metavar="SPEC",
    help="What makes the masks of --debias segmenter: torchvision:NAME, a file (.pt2, .pt) or MODULE:FUNCTION of your "
    "own. Code of your own is run.",
)
OF_CLIP = under(
    "Of a vision-language teacher",
    click.option("--pretrained", metavar="TAG|FILE", help="Of clip:ARCH: open_clip's weights by tag, or a checkpoint."),
    click.option("--classes", metavar="'A; B; …'", help="What the dataset's classes are called in prompts."),
    click.option(
        "--prompt", multiple=True, metavar="TEMPLATE", help="As 'a photo of a {}'. Repeatable: a class is their mean."
    ),
    click.option("--prompts", type=click.Path(path_type=Path), help="A file with a prompt on each line."),
)


PROFILES = ["cpu", "gpu", "paper"]
FLAGS = {"arch_options": "--arch-option", "pyramid": "--pyramid/--flat"}  # spelled otherwise than their Python names
METAVARS = {
    "loss": {"metavar": "METHOD=WEIGHT,…"},
    "student_factory": {"metavar": "MODULE:FUNCTION"},
    "segmenter": {"metavar": "SPEC"},
}


def _teacher(name: str | None, options: dict[str, Any]) -> Any:
    """The teacher that was named, None where none was; takes its own options out of the others."""
    from pipeline import parse_teacher
    from pipeline.networks.teacher_options import VisionLanguageOptions

    own = {key: options.pop(key) for key in ("pretrained", "classes", "prompts", "prompt")}
    if name is not None:
        classes = None if own["classes"] is None else tuple(own["classes"].split(";"))
        return parse_teacher(name, VisionLanguageOptions(**{**own, "classes": classes}))
    for key, value in own.items():
        if value:
            raise click.UsageError(f"--{key} is of a --teacher clip:ARCH, and none was given.")
    return None


def _main_process() -> bool:
    """Whether this is the one process, or of those that torchrun started the first, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


class _Said(logging.Handler):
    """Says what is logged, to what is standard error at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


class Commands(Group):
    """Turns the errors that a user can cause into one paragraph and an exit code, and nothing else."""

    group_class = Group

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt as interrupt:
            if (signum := getattr(interrupt, "signum", None)) is None:
                raise click.Abort from None
            if _main_process():
                click.echo(str(interrupt), err=True)
            raise click.exceptions.Exit(128 + signum) from None
        except OSError as error:
            if isinstance(error, FileExistsError) and error.errno is None:
                raise click.ClickException(text_of(error, ctx.meta.get(COMMAND))) from None
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{where}{error.strerror or error}") from None
        except Exception as error:
            if isinstance(error, _user_errors()):
                raise click.ClickException(text_of(error, ctx.meta.get(COMMAND))) from None
            raise


def _user_errors() -> tuple[type[Exception], ...]:
    from data import DatasetError
    from pipeline import ClusterError, ModelError, RelevanceError
    from teacher_cache import CacheError
    from trainer import TrainingError

    return DatasetError, CacheError, ClusterError, ModelError, RelevanceError, TrainingError


# The headings of the commands, in the order in which one needs them.
DATA_AND_TEACHER, STAGE_ONE, STAGE_TWO = (
    "Data and teacher",
    "Stage one: the teacher explains",
    "Stage two: students learn",
)
AFTERWARDS, ALL_IN_ONE = "What came of it", "All in one"


def _version() -> str:
    try:
        return importlib.metadata.version("explanation-distillation")
    except importlib.metadata.PackageNotFoundError:
        return "unknown, as it runs from a checkout that is not installed"


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
    example="quickstart",
)
@click.version_option(_version())
def main() -> None:
    """Explanation distillation: train a student that is immune to the bias of its training data.

    A teacher that cannot see the shortcut explains its decisions once; a student learns from the heatmaps alone.
    """
    ours = logging.getLogger("trainer")  # and no other, as libraries log with tracebacks
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        ours.addHandler(_Said())


@main.group(name="make-data", heading=DATA_AND_TEACHER, example="make-data coloured-mnist --out DATA.zarr")
def make_data() -> None:
    """Build a biased dataset."""


MADE = "How it is made"
DATASET = click.option("--out", required=True, type=Location(), help="The dataset to write.")
LIMIT = click.option("--limit", type=click.IntRange(1), help="At most so many samples of each split.")
SIZE = click.option("--size", default=64, type=click.IntRange(1), help="Height and width of the images, in pixels.")


FASHION = click.option(
    "--fashion-mnist",
    type=click.Path(path_type=Path),
    help="A folder with the files of Fashion-MNIST; that of Debian's dataset-fashion-mnist unless given.",
)

COCO_AND_PLACES = [
    click.option("--coco", required=True, type=click.Path(path_type=Path), help="The folder of COCO's files of 2017."),
    click.option("--places", required=True, type=click.Path(path_type=Path), help="The folder data_256 of Places365."),
]
BIRD_MASKS = "The folder segmentations of CUB-200-2011."
BIRDS = click.option(
    "--waterbirds", required=True, type=click.Path(path_type=Path), help="The folder with metadata.csv."
)


def _echo_sizes(out: str, sizes: dict[str, int]) -> None:
    click.echo(f"{out}: " + ", ".join(f"{split} {samples}" for split, samples in sizes.items()))


@make_data.command(name="coloured-mnist", example="make-data coloured-mnist --out DATA.zarr")
@options(under(FILES, DATASET), under(MADE, SEED, LIMIT))
def coloured_mnist(out: str, seed: int, limit: int | None) -> None:
    """MNIST digits whose colour tells the class in train, validation and iid, and misleads in ood and shift."""
    from data import make_coloured_mnist

    _echo_sizes(out, make_coloured_mnist(out, seed, limit))


@make_data.command(
    name="fashion-on-textures",
    example="make-data fashion-on-textures --fashion-mnist FOLDER --download --out DATA.zarr",
)
@options(
    under(
        FILES,
        FASHION,
        click.option("--download", is_flag=True, help="Have torchvision fetch them into it first."),
        DATASET,
    ),
    under(MADE, SIZE, SEED, LIMIT),
)
def fashion_on_textures(out: str, **options: Any) -> None:
    """Garments whose background, a crop of a photograph, tells the class in train, validation and iid.

    In ood it is another photograph, in shift that of another class. Needs the extra [data].
    """
    from data import make_fashion_on_textures

    _echo_sizes(out, make_fashion_on_textures(out, **options))


@make_data.command(
    name="coco-on-places", example="make-data coco-on-places --coco COCO --places data_256 --out DATA.zarr"
)
@options(
    under(FILES, COCO_AND_PLACES, DATASET),
    under(
        MADE,
        SIZE,
        SEED,
        LIMIT,
        click.option("--train-per-class", default=800, type=click.IntRange(1), help="Samples of train."),
        click.option("--test-per-class", default=100, type=click.IntRange(1), help="Of each test, and of validation."),
    ),
)
def coco_on_places(out: str, **options: Any) -> None:
    """Objects of COCO on scenes of Places365, as published; from the original files, of which none is downloaded.

    Needs the extra [data].
    """
    from data import make_coco_on_places

    _echo_sizes(out, make_coco_on_places(out, **options))


@make_data.command(
    name="waterbirds", example="make-data waterbirds --waterbirds waterbird_complete95_forest2water2 --out DATA.zarr"
)
@options(
    under(FILES, BIRDS, click.option("--masks", type=click.Path(path_type=Path), help=BIRD_MASKS), DATASET),
    under(
        MADE,
        click.option("--size", default=224, type=click.IntRange(1), help="Height and width, in pixels."),
        LIMIT,
    ),
)
def waterbirds(out: str, **options: Any) -> None:
    """Birds of which most are at home in train, and half are in validation and test; groups are bird and background.

    Read from the published folder; nothing is downloaded.
    """
    from data import make_waterbirds

    _echo_sizes(out, make_waterbirds(out, **options))


@make_data.command(
    name="image-folder",
    example="make-data image-folder --train images/train --test ood=images/ood --size 64 --out DATA.zarr",
)
@options(
    under(
        FILES,
        click.option(
            "--train", required=True, type=click.Path(path_type=Path), help="A folder with one for each class in it."
        ),
        click.option("--validation", type=click.Path(path_type=Path), help="Another; a share of --train unless given."),
        click.option("--test", "tests", multiple=True, type=NamedFolder(), help="Another, as ood=DIR. Repeatable."),
        click.option(
            "--masks", type=click.Path(path_type=Path), help="A folder with a mask for each image, named as it is."
        ),
        click.option("--groups", type=click.Path(path_type=Path), help="A CSV file with the columns path and group."),
        DATASET,
    ),
    under(
        MADE,
        click.option(
            "--validation-share",
            default=0.1,
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            help="Of --train, where there is no --validation.",
        ),
        click.option("--bias-attribute", default="group", help="What the groups are values of."),
        click.option(
            "--size", required=True, type=click.IntRange(1), help="Height and width of the images, in pixels."
        ),
        click.option("--skip-bad", is_flag=True, help="Leave out what cannot be read or lacks its mask or group."),
        SEED,
    ),
)
def image_folder(out: str, tests: tuple[tuple[str, Path], ...], **options: Any) -> None:
    """Your own images, in folders as torchvision's ImageFolder takes them (docs/own-images.md)."""
    from data import make_image_folder

    if twice := [name for name, count in Counter(name for name, _ in tests).items() if count > 1]:
        raise click.UsageError(f"--test {twice[0]}=… is given twice: give each test its own name")

    def note(text: str) -> None:
        click.echo(text, err=True)

    _echo_sizes(out, make_image_folder(out, tests=dict(tests), echo=note, **options))


@main.command(
    name="train-teacher",
    heading=DATA_AND_TEACHER,
    example="train-teacher --data DATA.zarr --arch small-cnn --debias grayscale --out TEACHER",
)
@options(options_of(TeacherOptions, flags=FLAGS, segmenter=METAVARS["segmenter"]))
def train_teacher_command(arch_options: tuple[tuple[str, Any], ...], **options: Any) -> None:
    """Train a teacher behind a debiasing front, with labels, on the train split alone.

    1,000 steps unless --steps or --epochs is given; --bias-free is on for small-cnn and small-resnet only. Stopped in
    whatever way, the same command goes on.
    """
    from trainer import train_teacher

    result = train_teacher(arch_options=dict(arch_options), **options)
    if _main_process():
        click.echo(f"{options['out']}: loss {result['loss']:.4f} after {result['steps']} steps, {_time(result)}")
        _echo_bias_free(result["bias_free"])


def _time(result: dict[str, Any]) -> str:
    waiting = 100 * result["seconds_waiting"] / result["seconds"]
    return f"{result['seconds']:.0f} s, {waiting:.1f} % of it waiting for data"


def _echo_bias_free(summary: dict[str, Any] | None) -> None:
    if summary is not None:
        line = f"bias-free: {len(summary['changed'])} modules changed"
        if could_not := summary["could_not"]:
            more = f" and {len(could_not) - 5} more" if len(could_not) > 5 else ""
            line += f", could not change {', '.join(could_not[:5])}{more}: heatmaps do not account for the whole logit"
        click.echo(line)


@main.command(
    name="cache-explanations",
    heading=STAGE_ONE,
    example="cache-explanations --data DATA.zarr --teacher TEACHER --out CACHE.zarr",
)
@options(
    under(
        FILES,
        DATA,
        click.option(
            "--teacher",
            required=True,
            type=TeacherName(),
            help="A folder of train-teacher, or a vision-language model: "
            "clip:ARCH, of open_clip by name, a configuration (.json), or a folder with one and weights.",
        ),
        click.option("--split", default="train", help="The split to explain."),
        click.option("--out", required=True, type=Location(), help="The store to write, or to continue writing."),
    ),
    OF_CLIP,
    under("What the teacher does not see", SEGMENTER),
    under(
        "How it explains",
        click.option(
            "--explainer",
            default="flex",
            type=RegistryChoice(EXPLAINERS),
            help="How decisions are explained, see docs/engine.md; students of the store do the same.",
        ),
        click.option(
            "--draws",
            show_default="4, and 1 for attention, whose draws are alike",
            type=click.IntRange(1, 10_000),
            help="Heatmaps for each sample.",
        ),
        click.option(
            "--epsilon-range",
            default=(0.01, 1.0),
            type=(click.FloatRange(0, min_open=True), click.FloatRange(0, min_open=True)),
            help="ε is log-uniform between the two.",
        ),
        SEED,
    ),
    under(
        "What is stored",
        click.option(
            "--precision",
            default="float16",
            type=Choice(["float16", "bfloat16", "int8"]),
            help="How maps are stored; int8 takes less than half of float16 (docs/results/storage.md).",
        ),
        click.option(
            "--codec",
            default="auto",
            help="lz4 (fast) or zstd (small), with the shuffle that makes the first maps smallest; or in full, as "
            "blosc-zstd-9-bitshuffle. auto is lz4, and zstd for int8.",
        ),
        click.option(
            "--resolution",
            default=1,
            type=Choice([1, 2, 4]),
            help="Store maps average-pooled by it; students are compared from there on.",
        ),
        click.option("--features", is_flag=True, help="Store the teacher's deep features too, for --method features."),
    ),
    under(
        RUN,
        DEVICE,
        click.option(
            "--batch-size",
            default=128,
            type=BatchSize(),
            help="Images at once; auto is the most, a power of two, that a GPU's memory holds, and 128 on a CPU.",
        ),
        click.option(
            "--share", is_flag=True, help="Divide the shards with other processes that write this store with --share."
        ),
        click.option(
            "--scheduler",
            metavar="ADDRESS",
            help="A Dask cluster to run on, such as tcp://10.0.0.1:8786, whose workers see the same paths; else this "
            "machine.",
        ),
    ),
)
def cache_explanations_command(teacher: str, **options: Any) -> None:
    """Stage one: run the teacher over a split once and write its heatmaps to a store.

    Interrupted, the same command continues where it stopped.
    """
    from pipeline import cache_explanations

    done = cache_explanations(teacher=_teacher(teacher, options), **options)
    found = done.shards - done.computed_shards
    click.echo(
        f"{done.path}: {done.samples} samples in {done.shards} shards"
        + (f", {found} of them found there" if found else "")
    )


@main.command(
    name="inspect-cache",
    heading=STAGE_ONE,
    example="inspect-cache CACHE.zarr --verify",
)
@click.argument("cache", type=Location())
@options(
    under(
        "What it does",
        click.option(
            "--verify", is_flag=True, help="Read everything and name what is damaged; exit code 1 if anything is."
        ),
        click.option(
            "--repair", is_flag=True, help="Verify, and take what is damaged out, so that it is computed anew."
        ),
    ),
    under(
        OUTPUT,
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    ),
)
def inspect_cache_command(cache: Any, verify: bool, repair: bool, as_json: bool) -> None:
    """What a heatmap store is, how far, and whether it is what was committed.

    CACHE is a path or a URL.
    """
    from tqdm import tqdm

    import teacher_cache

    store = teacher_cache.open_cache(cache, writable=repair)
    damaged: dict[int, str] = {}  # the problem of each shard
    there = teacher_cache.committed_shards(store)
    if verify or repair:
        check = teacher_cache.repair if repair else teacher_cache.damaged_shards
        with tqdm(there, unit="shard", desc="reading", disable=None) as bar:
            damaged = {shard: problem.spell(spell) for shard, problem in check(store, bar).items()}
    found = teacher_cache.inspect_cache(store)
    if verify or repair:
        found["damaged"] = [
            {"shard": shard, "samples": list(store.info.shard_range(shard)), "problem": problem}
            for shard, problem in damaged.items()
        ]
        found["repaired"] = repair
    click.echo(json.dumps(found) if as_json else teacher_cache.describe(found))
    if not as_json and (verify or repair):
        for problem in damaged.values():
            click.echo(problem)
        click.echo(f"{len(damaged)} of {len(there)} shards are damaged")
        if repair and damaged:
            click.echo(
                "they are taken out: run the command that made the store again, and it computes just what is missing: "
                f"{spell(teacher_cache.continuing(store))}, with its own --data, --teacher and the rest"
            )
    if damaged and not repair:
        raise click.exceptions.Exit(1)


@main.command(
    name="train-student",
    heading=STAGE_TWO,
    example="train-student --data DATA.zarr --cache CACHE.zarr --arch resnet18 --out STUDENT",
)
@options(options_of(StudentOptions, flags=FLAGS, loss=METAVARS["loss"], student_factory=METAVARS["student_factory"]))
def train_student_command(arch_options: tuple[tuple[str, Any], ...], **options: Any) -> None:
    """Stage two: train a student to make its own heatmaps match the stored ones.

    3,000 steps unless --steps or --epochs is given; --bias-free is as in the teacher. Stopped in whatever way, the same
    command goes on. On several GPUs: torchrun --nproc-per-node=N cli.py train-student …
    """
    from trainer import train_student

    result = train_student(arch_options=dict(arch_options), **options)
    if _main_process():
        _echo_bias_free(result["bias_free"])
        click.echo(
            f"{options['out']}: loss {result['loss']:.4f} after {result['steps']} steps, {_time(result)}"
            + (
                "; no --validation-cache, so the last weights are kept"
                if result["validation_loss"] is None
                else f"; weights of step {result['kept_step']} kept, validation loss {result['validation_loss']:.4f}"
            )
        )


@main.command(
    name="train-students",
    heading=STAGE_TWO,
    example="train-students --data DATA.zarr --cache CACHE.zarr --out STUDENTS --seed 0 --seed 1",
)
@click.argument("sweep", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@options(
    options_of(
        StudentOptions,
        without=("device",),
        flags=FLAGS,
        data={"required": False},
        out={"required": False, "help": "The folder of the students' folders."},
        arch={"multiple": True, "default": None},
        method={"multiple": True},
        seed={"multiple": True, "default": None, "help": "Random seed. Repeatable."},
        loss=METAVARS["loss"],
        student_factory=METAVARS["student_factory"],
    ),
    under(
        RUN,
        click.option(
            "--devices", type=Names(), help="Devices, such as cuda:0,cuda:1; by default all GPUs, or the CPU."
        ),
    ),
    under(OUTPUT, click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")),
)
@click.pass_context
def train_students_command(
    context: click.Context,
    /,
    sweep: Path | None,
    arch_options: tuple[tuple[str, Any], ...],
    devices: tuple[str, ...] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train many students of one store, test them all, and tabulate them.

    Every combination of the --arch, --method and --seed given; or those of the YAML file SWEEP, whose options are those
    of train-student, for all of them at the top and for each under 'students'. What is given here counts for all. Run
    again, it goes on.
    """
    from trainer.reproduction.sweep import plan_sweep, read_sweep, sweep_table, train_students

    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    }
    given = {name: list(value) if name in ("arch", "method", "seed") else value for name, value in given.items()}
    if arch_options:
        given["arch_options"] = dict(arch_options)
    common = read_sweep(sweep) if sweep is not None else {}
    students = common.pop("students", [])
    common |= given
    if all(isinstance(student, dict) for student in students):  # what is not is refused below
        students = [{k: v for k, v in one.items() if str(k).replace("-", "_") not in given} for one in students]
    out = common.pop("out", None)
    for name, value in (("data", common.get("data")), ("out", out)):
        if value is None:
            raise click.UsageError(f"Missing option '--{name}', and the sweep has no '{name}' either.")
    planned = plan_sweep(common, students)
    rows = train_students(Path(out), planned, devices=devices, echo=lambda text: click.echo(text, err=True))
    click.echo(json.dumps(rows) if as_json else sweep_table(rows))
    if any("error" in row for row in rows):
        raise click.exceptions.Exit(1)


@main.command(
    name="evaluate",
    heading=AFTERWARDS,
    example="evaluate --data DATA.zarr --model STUDENT",
)
@options(
    under(
        FILES,
        DATA,
        click.option("--model", type=LocalFolder(path_type=Path), help="A teacher's or student's folder."),
        click.option("--teacher", type=TeacherName(), help="The same, or clip:ARCH, as cache-explanations takes it."),
    ),
    OF_CLIP,
    under(OWN_CODE, FACTORY, SEGMENTER),
    under(RUN, DEVICE),
    under(OUTPUT, click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")),
)
def evaluate_command(data: str, model: Path | None, teacher: str | None, as_json: bool, **options: Any) -> None:
    """Accuracy on every test split, the gap IID − OOD, and the worst group, with 95 % intervals.

    Where there are masks, also how much of the relevance is on the object. A teacher that itself does worse where the
    bias is another one is warned of: its students will learn it too.
    """
    from trainer import evaluate
    from trainer.results.evaluation import bias_warning

    if (model is None) == (teacher is None):
        raise click.UsageError("give either --model or --teacher.")
    result = evaluate(data, _teacher(str(teacher or model), options), **options)
    if warning := bias_warning(result):
        click.echo(warning, err=True)
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, split in result["splits"].items():
        low, high = split["interval"]
        line = f"{name:<12}{split['accuracy']:7.2f} %  [{low:.2f}, {high:.2f}]  {split['samples']} samples"
        if worst := split["worst_group"]:
            line += f"; worst group {worst['group']} {worst['accuracy']:.2f} % of {worst['samples']}"
        if split["on_object"] is not None:
            line += f"; {split['on_object']:.1f} % of the relevance on the object"
        click.echo(line)
    if result["gap"] is not None:
        click.echo(f"{'gap iid-ood':<12}{result['gap']:7.2f} points")


@main.command(
    name="show-explanations",
    heading=AFTERWARDS,
    example="show-explanations --data DATA.zarr --model TEACHER --model STUDENT --out HEATMAPS.png",
)
@options(
    under(
        FILES,
        DATA,
        click.option(
            "--model",
            "models",
            multiple=True,
            type=LocalFolder(path_type=Path),
            help="A teacher's or student's folder, a column each. Repeatable.",
        ),
        click.option("--teacher", type=TeacherName(), help="One more, in front: a folder, or clip:ARCH."),
        click.option(
            "--cache",
            "caches",
            multiple=True,
            type=Location(),
            help="A store of the split, whose first draws are a column. Repeatable.",
        ),
        click.option("--out", required=True, type=LocalFolder(path_type=Path), help="The PNG to write."),
        click.option(
            "--display/--no-display",
            default=None,
            help="Show it in the terminal too; unless given, where the terminal can.",
        ),
    ),
    OF_CLIP,
    under(
        "Which samples",
        click.option("--split", help="Whose samples; the first test split unless given, or train where there is none."),
        click.option(
            "--samples", show_default="8", type=click.IntRange(1, 100), help="How many, evenly spread over the split."
        ),
        click.option(
            "--sample", "indices", multiple=True, type=click.IntRange(0), help="This one, from 0 on. Repeatable."
        ),
    ),
    under(
        "How models are explained",
        click.option(
            "--explain",
            default="true",
            metavar="true|predicted|CLASS",
            help="The class that models explain: the true one, the one that each says, or one by its name.",
        ),
        click.option("--epsilon", default=0.1, type=click.FloatRange(0), help="ε of the models' maps."),
        click.option(
            "--explainer",
            default="flex",
            type=RegistryChoice(EXPLAINERS),
            help="How models are explained, see docs/engine.md; stores show what they have.",
        ),
    ),
    under(OWN_CODE, FACTORY, SEGMENTER),
    under(RUN, DEVICE),
)
def show_explanations_command(
    samples: int | None,
    indices: tuple[int, ...],
    teacher: str | None,
    models: tuple[Path, ...],
    display: bool | None,
    **options: Any,
) -> None:
    """Heatmaps of models and stores beside the images that they are of, as one picture.

    Each map is in units of its own mean |relevance|, as maps of different networks have no other common unit: where
    relevance is can be compared, and how much there is cannot.
    """
    if samples is not None and indices:
        raise click.UsageError("give --samples, how many, or --sample, which, not both")
    inline = inline_picture.choose(display, os.environ)
    from trainer import show_explanations

    named = _teacher(teacher, options)
    every = models if named is None else (named, *models)
    shown = show_explanations(samples=indices or samples or 8, models=every, **options)
    if inline is not None:
        inline_picture.show(options["out"].read_bytes(), inline)
    columns = ", ".join(shown["columns"])
    samples = len(shown["samples"])
    click.echo(f"{options['out']}: {samples} sample{'s' * (samples > 1)} of {shown['split']}, with {columns}")


@main.command(
    name="report",
    heading=AFTERWARDS,
    example="report TEACHER ERM STUDENT --out report.html",
)
@click.argument("runs", metavar="RUN_DIR…", nargs=-1, type=LocalFolder(path_type=Path))
@options(
    under(
        FILES,
        click.option("--data", type=Location(), help="A dataset; that of the runs unless given."),
        click.option("--teacher", type=TeacherName(), help="One more, in front: a folder, or clip:ARCH."),
        click.option("--out", required=True, type=LocalFolder(path_type=Path), help="The HTML file to write."),
    ),
    OF_CLIP,
    under(
        "What is compared",
        click.option(
            "--reference",
            type=LocalFolder(path_type=Path),
            help="Whose heatmaps the others' are compared with; the first teacher with a debiasing front, or of clip:, "
            "unless given.",
        ),
        click.option("--samples", default=6, type=click.IntRange(1, 50), help="Of each split in the gallery."),
    ),
    under(OWN_CODE, FACTORY, SEGMENTER),
    under(RUN, DEVICE),
)
@click.pass_context
def report_command(context: click.Context, /, runs: tuple[Path, ...], teacher: str | None, **options: Any) -> None:
    """Everything about some models, side by side, in one HTML file that needs nothing else.

    Accuracy, confusions, training, calibration, heatmaps of whichever class the reader chooses, how far they agree with
    the teacher's, how much of them is on the object, and where everything is from.
    """
    from trainer import write_report

    named = _teacher(teacher, options)
    command = shlex.join(["python", "cli.py", "report", *context.meta[ARGUMENTS]])
    made = write_report(runs if named is None else (named, *runs), command=command, **options)
    models, size = len(made["models"]), made["bytes"] / 1e6
    click.echo(
        f"{options['out']}: {models} model{'s' * (models > 1)} on {', '.join(made['splits'])}, {size:.1f} MB; "
        + (f"heatmaps compared with {made['reference']}'s" if made["reference"] else "no heatmaps compared")
    )


@main.command(
    name="export",
    heading=AFTERWARDS,
    example="export --model STUDENT --format onnx --out STUDENT.onnx",
)
@options(
    under(
        FILES,
        click.option("--model", required=True, type=LocalFolder(path_type=Path), help="A student's folder."),
        click.option(
            "--format",
            required=True,
            type=Choice(["torch-export", "onnx", "state-dict"]),
            help="A .pt2 file for torch.export.load, an ONNX file, or the weights alone.",
        ),
        click.option("--out", required=True, type=LocalFolder(path_type=Path), help="The file to write."),
    ),
    under(OWN_CODE, FACTORY),
)
def export_command(model: Path, format: str, out: Path, student_factory: str | None) -> None:
    """A trained student as a file that needs nothing of this program, checked against it.

    It takes float32 images (N, C, H, W) in [0, 1], in batches of any size, and returns logits (N, classes).
    """
    from pipeline import export_model

    difference = export_model(model, out, format, student_factory=student_factory)
    click.echo(f"{out}: its logits differ from the model's by {difference:.2g} at most")


@main.command(
    name="quickstart",
    heading=ALL_IN_ONE,
    example="quickstart --out quickstart",
)
@options(
    under(FILES, click.option("--out", default="quickstart", type=LocalFolder(path_type=Path), help="Where to write.")),
    under(TRAINING, SEED),
)
def quickstart_command(out: Path, seed: int) -> None:
    """A biased network caught red-handed and its distilled sibling, on embedded data, in minutes on a CPU."""
    import dataclasses

    from trainer.reproduction.profiles import PROFILES
    from trainer.reproduction.quickstart import quickstart

    results = quickstart(out, dataclasses.replace(PROFILES["quickstart"], seed=seed), click.echo)
    _echo_table(results, PROFILES["quickstart"].table)
    click.echo(f"results: {out / 'results.json'}, heatmaps: {out / 'report' / 'heatmaps.png'}")


def _echo_table(results: list[dict[str, Any]], benchmark: Any) -> None:
    from trainer.results.tables import summarise, text

    click.echo(f"\n{text(summarise(results, benchmark))}\n")


@main.group(name="reproduce", heading=ALL_IN_ONE, example="reproduce coloured-mnist --out TABLE --seeds 3")
def reproduce_group() -> None:
    """Make a published table anew, with all that it takes."""


REPRODUCED_IN = click.option(
    "--out",
    required=True,
    type=LocalFolder(path_type=Path),
    help="Where to write: nothing, or an earlier reproduction, which goes on.",
)
TABLE = "The table"
HOW_IT_IS_REPRODUCED = [
    *under(
        TABLE,
        click.option(
            "--methods", type=Names(), help="Rows of the table, as lrp,output, or all; the usual ones unless given."
        ),
        click.option("--seeds", default=3, type=click.IntRange(1), help="Students of each row."),
        click.option("--arch", type=Architecture(), help="Of teachers and students; the profile's unless given."),
    ),
    *under(RUN, DEVICE),
]


@reproduce_group.command(
    name="coloured-mnist", example="reproduce coloured-mnist --out TABLE --methods lrp,output --seeds 3"
)
@options(
    under(FILES, REPRODUCED_IN),
    under(
        TABLE,
        click.option(
            "--profile",
            default="cpu",
            type=Choice(PROFILES),
            help="What is spent: hours on a CPU, a GPU's, or the paper's own setting.",
        ),
    ),
    HOW_IT_IS_REPRODUCED,
)
def reproduce_coloured_mnist_command(profile: str, **options: Any) -> None:
    """The paper's table on COLOURED MNIST: its data, teacher, stores and the students of every row, tested and drawn.

    Stopped in whatever way, the same command goes on; with more --methods or --seeds it adds them.
    """
    from trainer.reproduction import profiles

    _reproduce(profiles.PROFILES[profile], **options)


@reproduce_group.command(name="fashion-on-textures", example="reproduce fashion-on-textures --out TABLE --profile gpu")
@options(
    under(FILES, FASHION, REPRODUCED_IN),
    under(
        TABLE,
        click.option(
            "--profile",
            default="cpu",
            type=Choice(["cpu", "gpu"]),
            help="What is spent: 32×32 and hours on a CPU, or 64×64 on a GPU.",
        ),
    ),
    HOW_IT_IS_REPRODUCED,
)
def reproduce_fashion_on_textures_command(fashion_mnist: Path | None, profile: str, **options: Any) -> None:
    """The same on Fashion-on-Textures, where the background tells the class; with the rivals that use masks.

    The teacher sees the garment alone, by the dataset's masks. It goes on, and is added to, in the same way.
    """
    from trainer.reproduction import profiles

    sources = {} if fashion_mnist is None else {"fashion_mnist": fashion_mnist}
    _reproduce(profiles.ON_TEXTURES[profile], sources=sources, **options)


@reproduce_group.command(
    name="coco-on-places", example="reproduce coco-on-places --coco COCO --places data_256 --out TABLE"
)
@options(under(FILES, COCO_AND_PLACES, REPRODUCED_IN), HOW_IT_IS_REPRODUCED)
def reproduce_coco_on_places_command(coco: Path, places: Path, **options: Any) -> None:
    """The same on COCO-on-Places, from the original files; best on a GPU."""
    from trainer.reproduction import profiles

    _reproduce(profiles.ON_PLACES, sources={"coco": coco, "places": places}, **options)


@reproduce_group.command(
    name="waterbirds", example="reproduce waterbirds --waterbirds FOLDER --masks segmentations --out TABLE"
)
@options(
    under(
        FILES,
        BIRDS,
        click.option("--masks", required=True, type=click.Path(path_type=Path), help=BIRD_MASKS),
        REPRODUCED_IN,
    ),
    HOW_IT_IS_REPRODUCED,
)
def reproduce_waterbirds_command(waterbirds: Path, masks: Path, **options: Any) -> None:
    """The same on Waterbirds, from the published folder, with GroupDRO; best on a GPU."""
    from trainer.reproduction import profiles

    _reproduce(profiles.WATERBIRDS, sources={"waterbirds": waterbirds, "masks": masks}, **options)


def _reproduce(profile: Any, arch: str | None, out: Path, **options: Any) -> None:
    import dataclasses

    from trainer.reproduction.reproduce import reproduce

    if arch is not None:
        teacher, student = (
            {**{name: value for name, value in given.items() if name != "arch_options"}, "arch": arch}
            for given in (profile.teacher, profile.student)
        )
        profile = dataclasses.replace(profile, teacher=teacher, student=student)
    results = reproduce(out, profile, echo=click.echo, **options)
    _echo_table(results, profile.table)
    click.echo(f"results: {out / 'results.jsonl'}, tables and pictures: {out / 'report'}")


if __name__ == "__main__":
    main()

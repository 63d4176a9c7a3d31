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

from options import option_fields
from pipeline.caching.options import CachingOptions
from pipeline.networks.teacher_options import VisionLanguageOptions
from terminal import inline_picture
from terminal.help import ARGUMENTS, COMMAND, Choice, Group, instead_of, options, under
from terminal.options import options_of
from terminal.spelling import spell, speller, text_of
from terminal.types import (
    LocalFolder,
    Location,
    NamedFolder,
    TeacherName,
)
from trainer.reproduction.options import (
    ColouredMnistTableOptions,
    FashionTableOptions,
    QuickstartOptions,
    ReproduceOptions,
    SweepOptions,
)
from trainer.results.options import EvaluateOptions, ReportOptions, ShowOptions
from trainer.settings import StudentOptions, TeacherOptions

# Packages that import PyTorch are imported inside the commands, so that --help and wrong options answer at once.


# Headings that several commands have, and options of each.
FILES, OUTPUT, OWN_CODE = "Files", "Output", "Custom code"

SEED = click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="Random seed.")
FACTORY = click.option(
    "--student-factory",
    metavar="MODULE:FUNCTION",
    help="Your own network: what this function of yours returns. Its code is run.",
)
OF_CLIP = options_of(
    VisionLanguageOptions,
    {
        "pretrained": {"metavar": "TAG|FILE"},
        "classes": {"metavar": "'A; B; …'"},
        "prompt": {"metavar": "TEMPLATE", "multiple": True},
    },
)


FLAGS = {"arch_options": "--arch-option", "pyramid": "--pyramid/--flat"}  # spelled otherwise than their Python names
METAVARS: dict[str, dict[str, Any]] = {
    "student_factory": {"metavar": "MODULE:FUNCTION"},
    "segmenter": {"metavar": "SPEC"},
    "loss": {"metavar": "METHOD=WEIGHT,…"},
}


def _teacher(name: str | None, options: dict[str, Any]) -> Any:
    """The teacher that was named, None where none was; takes its own options out of the others."""
    from pipeline import parse_teacher

    own = {field.name: options.pop(field.name) for field in option_fields(VisionLanguageOptions)}
    if name is not None:
        return parse_teacher(name, VisionLanguageOptions(**own))
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
@options(options_of(TeacherOptions, METAVARS, flags=FLAGS))
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
    options_of(
        CachingOptions,
        {
            **METAVARS,
            "resolution": {"type": Choice([1, 2, 4])},
            "draws": {"show_default": "4; 1 for attention"},
            "scheduler": {"metavar": "ADDRESS"},
        },
    ),
    OF_CLIP,
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
@options(options_of(StudentOptions, METAVARS, flags=FLAGS))
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
        {
            **METAVARS,
            "data": {"required": False},
            "arch": {"multiple": True, "default": None},
            "method": {"multiple": True},
            "seed": {"multiple": True, "default": None, "help": "Random seed. Repeatable."},
        },
        without=("out", "device"),
        flags=FLAGS,
    ),
    options_of(SweepOptions, {"out": {"required": False}}),
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
    spelling = speller(context.command)
    rows = train_students(
        Path(out), planned, devices=devices, echo=lambda text: click.echo(text, err=True), spell=spelling
    )
    click.echo(json.dumps(rows) if as_json else sweep_table(rows))
    if any("error" in row for row in rows):
        raise click.exceptions.Exit(1)


@main.command(
    name="evaluate",
    heading=AFTERWARDS,
    example="evaluate --data DATA.zarr --model STUDENT",
)
@options(
    options_of(EvaluateOptions, {"model": {"required": False}, **METAVARS}),
    under(FILES, instead_of("model", click.option("--teacher", type=TeacherName(), help="The same as --model."))),
    OF_CLIP,
    under(OUTPUT, click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")),
)
def evaluate_command(data: str, model: str | None, teacher: str | None, as_json: bool, **options: Any) -> None:
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
        click.echo(warning.spell(spell), err=True)
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
    options_of(
        ShowOptions,
        {
            "models": {"multiple": True, "help": "Folder of a teacher or a student: one column. Repeatable."},
            "caches": {
                "multiple": True,
                "help": "Heatmap store of the split: one column of first draws. Repeatable.",
            },
            "samples": {
                "default": None,
                "show_default": "8",
                "type": click.IntRange(1, 100),
                "help": "Number of samples, spread evenly over the split.",
            },
            "explain": {"metavar": "true|predicted|CLASS"},
            **METAVARS,
        },
        flags={"models": "--model", "caches": "--cache"},
    ),
    under(FILES, click.option("--teacher", type=TeacherName(), help="One more model, as the first column.")),
    OF_CLIP,
    under(
        "Samples",
        instead_of(
            "samples",
            click.option(
                "--sample",
                "indices",
                multiple=True,
                type=click.IntRange(0),
                help="Index of a sample, from 0 on. Repeatable.",
            ),
        ),
    ),
    under(
        OUTPUT,
        click.option(
            "--display/--no-display",
            default=None,
            help="Show the picture in the terminal too. By default, where the terminal can show pictures.",
        ),
    ),
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
    options_of(ReportOptions, METAVARS),
    under(FILES, click.option("--teacher", type=TeacherName(), help="One more model, as the first one.")),
    OF_CLIP,
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
@options(options_of(QuickstartOptions))
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


@reproduce_group.command(
    name="coloured-mnist", example="reproduce coloured-mnist --out TABLE --methods lrp,output --seeds 3"
)
@options(options_of(ColouredMnistTableOptions))
def reproduce_coloured_mnist_command(profile: str, **options: Any) -> None:
    """The paper's table on COLOURED MNIST: its data, teacher, stores and the students of every row, tested and drawn.

    Stopped in whatever way, the same command goes on; with more --methods or --seeds it adds them.
    """
    from trainer.reproduction import profiles

    _reproduce(profiles.PROFILES[profile], **options)


@reproduce_group.command(name="fashion-on-textures", example="reproduce fashion-on-textures --out TABLE --profile gpu")
@options(under(FILES, FASHION), options_of(FashionTableOptions))
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
@options(under(FILES, COCO_AND_PLACES), options_of(ReproduceOptions))
def reproduce_coco_on_places_command(coco: Path, places: Path, **options: Any) -> None:
    """The same on COCO-on-Places, from the original files; best on a GPU."""
    from trainer.reproduction import profiles

    _reproduce(profiles.ON_PLACES, sources={"coco": coco, "places": places}, **options)


@reproduce_group.command(
    name="waterbirds", example="reproduce waterbirds --waterbirds FOLDER --masks segmentations --out TABLE"
)
@options(
    under(FILES, BIRDS, click.option("--masks", required=True, type=click.Path(path_type=Path), help=BIRD_MASKS)),
    options_of(ReproduceOptions),
)
def reproduce_waterbirds_command(waterbirds: Path, masks: Path, **options: Any) -> None:
    """The same on Waterbirds, from the published folder, with GroupDRO; best on a GPU."""
    from trainer.reproduction import profiles

    _reproduce(profiles.WATERBIRDS, sources={"waterbirds": waterbirds, "masks": masks}, **options)


def _reproduce(profile: Any, out: Path, **options: Any) -> None:
    from trainer.reproduction.reproduce import reproduce

    results = reproduce(out, profile, echo=click.echo, **options)
    _echo_table(results, profile.table)
    click.echo(f"results: {out / 'results.jsonl'}, tables and pictures: {out / 'report'}")


if __name__ == "__main__":
    main()

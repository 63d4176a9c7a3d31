"""The command line: parse, call one function, print its result.

python cli.py quickstart
python cli.py cache-explanations --data DATA.zarr --teacher TEACHER_DIR --out CACHE.zarr
python cli.py train-student --data DATA.zarr --cache CACHE.zarr --out RUN_DIR
"""

from __future__ import annotations

import errno
import functools
import importlib.metadata
import json
import logging
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from options import Message, option_fields, overridden
from pipeline.caching.options import CachingOptions
from pipeline.networks.formats import ExportOptions
from pipeline.networks.teacher_options import OwnTeacherOptions, VisionLanguageOptions
from terminal import inline_picture
from terminal.help import ARGUMENTS, COMMAND, Choice, Command, Group, LazyGroup, instead_of, options, under
from terminal.options import options_of
from terminal.spelling import spell, speller, text_of
from terminal.types import LocalFolder, Location, TeacherName
from trainer.reproduction.options import QuickstartOptions, SweepOptions
from trainer.results.options import EvaluateOptions, PredictOptions, ReportOptions, ShowOptions, WriteOptions
from trainer.settings import StudentOptions, TeacherOptions

if TYPE_CHECKING:
    from data.builders.registry import Builder
    from trainer import Prediction
    from trainer.reproduction.profiles import Reproduction

# Packages that import PyTorch are imported inside the commands, so that --help and wrong options answer at once.

FILES, OUTPUT = "Files", "Output"  # headings of options
DATA_AND_TEACHER, STAGE_ONE, STAGE_TWO = "Data and teacher", "Stage one: explanations", "Stage two: students"
RESULTS, EVERYTHING = "Results", "Whole experiments"

# flags that are not the Python name with dashes
FLAGS = {"arch_options": "--arch-option", "pyramid": "--pyramid/--flat", "tests": "--test"}
METAVARS: dict[str, dict[str, Any]] = {
    "device": {"metavar": "DEVICE"},
    "split": {"metavar": "SPLIT"},
    "epsilon_range": {"metavar": "LOW HIGH"},
    "weights": {"metavar": "FILE|FOLDER"},
    "init": {"metavar": "FILE|FOLDER"},
    "class_map": {"metavar": "FILE"},
    "mean": {"metavar": "NUMBER,…"},
    "std": {"metavar": "NUMBER,…"},
    "student_factory": {"metavar": "MODULE:FUNCTION"},
    "teacher_factory": {"metavar": "MODULE:FUNCTION"},
    "segmenter": {"metavar": "NETWORK"},
    "mask_all": {"metavar": "FILE"},
    "masks": {"metavar": "FOLDER"},
    "coco": {"metavar": "FOLDER"},
    "places": {"metavar": "FOLDER"},
    "waterbirds": {"metavar": "FOLDER"},
    "fashion_mnist": {"metavar": "FOLDER"},
    "bias_attribute": {"metavar": "NAME"},
    "loss": {"metavar": "METHOD=WEIGHT,…"},
    "mask_box": {"metavar": "X0,Y0,X1,Y1"},
    "class_weights": {"metavar": "none|balanced|W,W,…"},
}

OF_TEACHERS = [
    *options_of(OwnTeacherOptions, {**METAVARS, "debias": {"metavar": "FRONT,…"}}),
    *options_of(
        VisionLanguageOptions,
        {
            "prompts": {"metavar": "FILE"},
            "pretrained": {"metavar": "TAG|FILE"},
            "classes": {"metavar": "'A; B; …'"},
            "prompt": {"metavar": "TEMPLATE", "multiple": True},
        },
    ),
]

OF_SAVED = ("debias",)  # an option of saved teachers that is one of `OF_TEACHERS` too


def _teacher(name: str | None, options: dict[str, Any]) -> Any:
    """Return the teacher of this name, or None, and remove its own options from ``options``.

    The user's own functions in ``debias`` stay there, because they let a saved teacher with the same front run them.
    """
    from pipeline import parse_teacher
    from pipeline.networks.debias import functions_in

    of_clip, own = (
        {field.name: options.pop(field.name) for field in option_fields(kind)}
        for kind in (VisionLanguageOptions, OwnTeacherOptions)
    )
    options["debias"] = own["debias"] if functions_in(own["debias"] or "") else None
    if name is not None:
        return parse_teacher(name, VisionLanguageOptions(**of_clip), OwnTeacherOptions(**own))
    if options["debias"] is not None:
        del own["debias"]
    for kind, values in (("clip:ARCH", of_clip), ("NAME", own)):
        for key, value in values.items():
            if value:
                raise click.UsageError(f"--{key.replace('_', '-')} needs a --teacher {kind}, and there is none.")
    return None


def _main_process() -> bool:
    """Return whether this process prints: it is the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


class _ToStandardError(logging.Handler):
    """Print log messages to standard error, whatever it is at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        context = click.get_current_context(silent=True)
        command = None if context is None else context.meta.get(COMMAND)
        text = record.msg.spell(speller(command)) if isinstance(record.msg, Message) else self.format(record)
        click.echo(text, err=True)


class Commands(Group):
    """Turn the errors that a user can cause, and no others, into one paragraph and an exit code."""

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
            if error.errno == errno.EPIPE:  # nobody reads the output any more, so click ends in silence
                raise
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


def _version() -> str:
    try:
        return importlib.metadata.version("explanation-distillation")
    except importlib.metadata.PackageNotFoundError:
        return "unknown, as it runs from a checkout that is not installed"


@click.group(
    cls=Commands,
    context_settings={"show_default": True, "max_content_width": 100},
    example="quickstart",
)
@click.version_option(_version())
def main() -> None:
    """Explanation distillation: train a classifier that ignores the bias of its training data.

    A teacher that cannot see the bias explains its decisions once. Students learn from its heatmaps alone.
    """
    for package in ("data", "pipeline", "trainer"):  # no others, because libraries log with tracebacks
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        if not logger.handlers:
            logger.addHandler(_ToStandardError())


def _made_command(name: str, callback: Any, of: Builder | Reproduction) -> click.Command:
    """Make a command from the options, the help and the example of a dataset or a table."""
    decorate = options(options_of(of.options, METAVARS, flags=FLAGS))
    return click.command(name, cls=Command, help=of.help, example=of.example)(decorate(callback))


@functools.cache
def _builder_command(name: str, builder: Builder) -> click.Command:
    def build(out: str, **options: Any) -> None:
        sizes = builder.make(out, **options)
        click.echo(f"{out}: " + ", ".join(f"{split} {samples}" for split, samples in sizes.items()))

    return _made_command(name, build, builder)


def _builder_commands() -> dict[str, click.Command]:
    from data.builders.registry import all_builders

    return {name: _builder_command(name, builder) for name, builder in all_builders().items()}


@main.group(
    name="make-data",
    cls=LazyGroup,
    make=_builder_commands,
    heading=DATA_AND_TEACHER,
    example="make-data coloured-mnist --out DATA.zarr",
)
def make_data() -> None:
    """Build a biased dataset.

    The images are your own, or those of a published benchmark.
    """


@main.command(
    name="add-fingerprints",
    heading=DATA_AND_TEACHER,
    example="add-fingerprints --data DATA.zarr",
)
@options(under(FILES, click.option("--data", required=True, type=Location(), help="Dataset: a folder or a URL.")))
def add_fingerprints_command(data: str) -> None:
    """Add fingerprints to a dataset.

    Use it once for a dataset that another program wrote. Without fingerprints, every command reads the whole dataset
    when it starts. The command reads each split once and writes the attribute 'fingerprint' of its group, and nothing
    else. It compares fingerprints that are there already with the arrays.
    """
    from data import add_fingerprints

    fingerprints = add_fingerprints(data)
    click.echo(f"{data}: " + ", ".join(f"{split} {digest[:12]}…" for split, digest in fingerprints.items()))


@main.command(
    name="train-teacher",
    heading=DATA_AND_TEACHER,
    example="train-teacher --data DATA.zarr --arch small-cnn --debias grayscale --out TEACHER",
)
@options(options_of(TeacherOptions, METAVARS, flags=FLAGS))
def train_teacher_command(**options: Any) -> None:
    """Train a teacher behind a debiasing front.

    It learns the labels of the training split. The training takes 1,000 steps, unless you give --steps or --epochs. By
    default, only small-cnn and small-resnet are bias-free. Run the same command again to resume an interrupted
    training.
    """
    from trainer import train_teacher

    result = train_teacher(**options)
    if _main_process():
        click.echo(
            f"{options['out']}: loss {result['loss']:.4f} after {result['steps']} steps, {_time(result)}"
            + (_kept(result) if result["validation_loss"] is not None else "")
        )
        _echo_bias_free(result["bias_free"])


def _kept(result: dict[str, Any]) -> str:
    return f"; weights of step {result['kept_step']} kept, validation loss {result['validation_loss']:.4f}"


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
            "teacher": {"required": False},
            "resolution": {"type": Choice([1, 2, 4])},
            "draws": {"show_default": "4, or up to 8 for fewer than 5,000 samples; 1 for attention"},
            "scheduler": {"metavar": "ADDRESS"},
        },
        without=OF_SAVED,
    ),
    OF_TEACHERS,
)
def cache_explanations_command(teacher: str | None, **options: Any) -> None:
    """Write a teacher's heatmaps to a store.

    This is stage one: the teacher runs over a split once. Run the same command again to resume an interrupted run.
    """
    from pipeline import cache_explanations

    if teacher is None and (teacher := options.pop("teacher_factory")) is None:
        raise click.UsageError("Missing option '--teacher'.")
    done = cache_explanations(teacher=_teacher(teacher, options), **options)
    earlier = done.shards - done.computed_shards
    click.echo(
        f"{done.path}: {done.samples} samples in {done.shards} shards"
        + (f", {earlier} of them from an earlier run" if earlier else "")
    )


@main.command(
    name="inspect-cache",
    heading=STAGE_ONE,
    example="inspect-cache CACHE.zarr --verify",
)
@click.argument("cache", type=Location())
@options(
    under(
        "Checks",
        click.option(
            "--verify", is_flag=True, help="Read the whole store and list damaged shards; if any, exit with 1."
        ),
        click.option(
            "--repair", is_flag=True, help="Verify, and delete damaged shards, so that they can be recomputed."
        ),
    ),
    under(
        OUTPUT,
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    ),
)
def inspect_cache_command(cache: Any, verify: bool, repair: bool, as_json: bool) -> None:
    """Describe and check a heatmap store.

    The command prints what the store contains and how much of it is complete. CACHE is a folder or a URL.
    """
    from tqdm import tqdm

    import teacher_cache

    store = teacher_cache.open_cache(cache, writable=repair)
    damaged: dict[int, str] = {}  # the problem of each shard
    committed = teacher_cache.committed_shards(store)
    if verify or repair:
        check = teacher_cache.repair if repair else teacher_cache.damaged_shards
        with tqdm(committed, unit="shard", desc="reading", disable=None) as bar:
            damaged = {shard: problem.spell(spell) for shard, problem in check(store, bar).items()}
    description = teacher_cache.inspect_cache(store)
    if verify or repair:
        description["damaged"] = [
            {"shard": shard, "samples": list(store.info.shard_range(shard)), "problem": problem}
            for shard, problem in damaged.items()
        ]
        description["repaired"] = repair
    click.echo(json.dumps(description) if as_json else teacher_cache.describe(description))
    if not as_json and (verify or repair):
        for problem in damaged.values():
            click.echo(problem)
        click.echo(f"{len(damaged)} of {len(committed)} shards are damaged")
        if repair and damaged:
            click.echo(
                "they are deleted: run the command that made the store again to compute them: "
                f"{spell(teacher_cache.continuing(store))}, with the same --data, --teacher and other options"
            )
    if damaged and not repair:
        raise click.exceptions.Exit(1)


@main.command(
    name="train-student",
    heading=STAGE_TWO,
    example="train-student --data DATA.zarr --cache CACHE.zarr --arch resnet18 --out STUDENT",
)
@options(options_of(StudentOptions, METAVARS, flags=FLAGS))
def train_student_command(**options: Any) -> None:
    """Train a student on stored heatmaps.

    This is stage two: the student learns to make its own heatmaps match the teacher's. The training takes 3,000 steps,
    unless you give --steps or --epochs. By default, the student is bias-free if the teacher is. A small-cnn or
    small-resnet is bias-free behind most other teachers too. Run the same command again to resume an interrupted
    training. For several GPUs, start it as torchrun --nproc-per-node=N cli.py train-student …
    """
    from trainer import train_student

    result = train_student(**options)
    if _main_process():
        _echo_bias_free(result["bias_free"])
        click.echo(
            f"{options['out']}: loss {result['loss']:.4f} after {result['steps']} steps, {_time(result)}"
            + (
                "; no --validation-cache, so the last weights are kept"
                if result["validation_loss"] is None
                else _kept(result)
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
    devices: tuple[str, ...] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train and test many students of one store.

    The command prints a table. It trains one student for every combination of --arch, --method and --seed. Or it trains
    the students of the YAML file SWEEP: options at its top level apply to all students, and each entry under 'students'
    has the options of one student. Options on the command line override the file. Run the same command again to resume
    it.
    """
    from trainer.reproduction.sweep import plan_sweep, read_sweep, sweep_table, train_students

    typed = {
        name: list(value) if name in ("arch", "method", "seed") else value
        for name, value in options.items()
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    }
    common = read_sweep(sweep) if sweep is not None else {}
    students = common.pop("students", [])
    replaced = overridden(StudentOptions, typed)
    common = {name: value for name, value in common.items() if name not in replaced} | typed
    if all(isinstance(student, dict) for student in students):  # plan_sweep refuses anything else
        students = [{k: v for k, v in one.items() if str(k).replace("-", "_") not in replaced} for one in students]
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
    heading=RESULTS,
    example="evaluate --data DATA.zarr --model STUDENT",
)
@options(
    options_of(EvaluateOptions, {"model": {"required": False}, **METAVARS}, without=OF_SAVED),
    under(
        FILES,
        instead_of(
            ("model",),
            click.option(
                "--teacher",
                type=TeacherName(),
                help="Folder of a teacher, the name of your own network, or clip:ARCH, instead of --model.",
            ),
        ),
    ),
    OF_TEACHERS,
    under(OUTPUT, click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")),
)
def evaluate_command(data: str, model: str | None, teacher: str | None, as_json: bool, **options: Any) -> None:
    """Test a model on every test split.

    The command prints the accuracy on each split and of each class, the worst group, and the gap IID − OOD, with 95 %
    intervals. If the dataset has groups, such as hospitals, the command also prints the mean of their accuracies, with
    the standard deviation between them, and the worst class in a group if it is worse than all groups. Of more than 12
    classes, it prints the worst five, and --json has all of them. If the dataset has masks, the command prints how much
    of the relevance lies on the object. It warns you of a teacher that is less accurate where the bias changes, because
    its students will learn the bias too, and of a model that says one class for every image. A split has no accuracy if
    it lacks the masks that the teacher's front needs.
    """
    from trainer import evaluate
    from trainer.results.by_class import class_table, one_class_warning, prediction_table
    from trainer.results.by_group import group_mean_line
    from trainer.results.evaluation import bias_warning

    if (model is None) == (teacher is None):
        raise click.UsageError("give either --model or --teacher.")
    result = evaluate(data, _teacher(str(teacher or model), options), **options)
    for warning in (bias_warning(result), one_class_warning(result)):
        if warning is not None:
            click.echo(warning.spell(spell), err=True)
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, split in result["splits"].items():
        if split["accuracy"] is None:
            click.echo(f"{name:<12}{'–':>7}    not tested on {split['samples']} samples without masks")
            continue
        low, high = split["interval"]
        line = f"{name:<12}{split['accuracy']:7.2f} %  [{low:.2f}, {high:.2f}]  {split['samples']} samples"
        if worst := split["worst_group"]:
            line += f"; worst group {worst['group']} {worst['accuracy']:.2f} % of {worst['samples']}"
            if (pair := split.get("worst_class_in_group")) and pair["accuracy"] < worst["accuracy"]:
                where = f"{pair['class']} in {pair['group']}"
                line += f"; worst class in a group {where} {pair['accuracy']:.2f} % of {pair['samples']}"
        if split["on_object"] is not None:
            line += f"; {split['on_object']:.1f} % of the relevance on the object"
        click.echo(line)
        if of_groups := group_mean_line(split):
            click.echo(of_groups)
    if result["gap"] is not None:
        click.echo(f"{'gap iid-ood':<12}{result['gap']:7.2f} points")
    for table in (class_table(result["splits"], "give --json"), prediction_table(result["splits"])):
        if table:
            click.echo(f"\n{table}")


@main.command(
    name="predict",
    heading=RESULTS,
    example="predict --model STUDENT photos --out predictions.csv",
)
@click.argument("images", metavar="FILE|FOLDER…", nargs=-1, required=True, type=click.Path(path_type=Path))
@options(
    options_of(PredictOptions, {**METAVARS, "debias": {"metavar": "FRONT,…"}}, without=("images",)),
    options_of(
        WriteOptions,
        {"out": {"required": False, "metavar": "FILE.csv"}},
        without=tuple(field.name for field in option_fields(PredictOptions)),
    ),
)
def predict_command(images: tuple[Path, ...], out: Path | None, probabilities: bool, **options: Any) -> None:
    """Predict the class of image files.

    The images are files of any format, or lie in folders at any depth. Without --out, the command prints a line for
    each image, with the probability of the class. Files that cannot be read are listed and left out, and the exit code
    is then 1.
    """
    from trainer import predict, write_predictions
    from trainer.results.prediction import printable

    if out is not None and str(out) != "-":
        summary = write_predictions(images=images, out=out, probabilities=probabilities, **options)
        unreadable = summary["unreadable"]
        beside = f", with pictures in {summary['pictures']}" if summary["pictures"] else ""
        click.echo(f"{out}: {summary['images']} image{'s' * (summary['images'] != 1)}{beside}")
    elif options["explain"]:
        raise click.UsageError("--explain draws a picture for each image: give --out, beside which they lie.")
    else:
        unreadable = {}
        for prediction in predict(images=images, **options):
            if prediction.problem is not None:
                unreadable[prediction.path] = prediction.problem
            else:
                click.echo(printable(_prediction_line(prediction, probabilities)))
    for path, problem in unreadable.items():
        click.echo(f"{printable(path)}: {printable(problem)}", err=True)
    if unreadable:
        click.echo(f"{len(unreadable)} file{'s' * (len(unreadable) > 1)} cannot be read", err=True)
        raise click.exceptions.Exit(1)


def _prediction_line(prediction: Prediction, probabilities: bool) -> str:
    width = min(30, max(map(len, prediction.probabilities)))
    line = f"{prediction.class_name:<{width}} {100 * (prediction.probability or 0):6.2f} %  {prediction.path}"
    every = ", ".join(f"{name} {100 * value:.2f} %" for name, value in prediction.probabilities.items())
    return f"{line}  ({every})" if probabilities else line


@main.command(
    name="show-explanations",
    heading=RESULTS,
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
            "out": {"metavar": "FILE.png"},
            **METAVARS,
        },
        without=OF_SAVED,
        flags={"models": "--model", "caches": "--cache"},
    ),
    under(
        FILES,
        click.option(
            "--teacher",
            type=TeacherName(),
            help="Folder of a teacher, the name of your own network, or clip:ARCH, as the first column.",
        ),
    ),
    OF_TEACHERS,
    under(
        "Samples",
        instead_of(
            ("samples",),
            click.option(
                "--sample",
                "indices",
                multiple=True,
                type=click.IntRange(0),
                help="Index of a sample, starting at 0. Repeatable.",
            ),
        ),
    ),
    under(
        OUTPUT,
        click.option(
            "--display/--no-display",
            default=None,
            help="Show the picture in the terminal too. Default: if the terminal can show pictures.",
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
    """Draw images and heatmaps side by side.

    The heatmaps are those of models and of stores. Each heatmap is divided by its own mean |relevance|, because
    different networks have no common unit. You can compare where the relevance lies, but not its amount.
    """
    if samples is not None and indices:
        raise click.UsageError("give --samples, how many, or --sample, which, not both")
    inline = inline_picture.choose(display, os.environ)
    from trainer import show_explanations

    first = _teacher(teacher, options)
    every = models if first is None else (first, *models)
    drawn = show_explanations(samples=indices or samples or 8, models=every, **options)
    if inline is not None:
        inline_picture.show(options["out"].read_bytes(), inline)
    columns = ", ".join(drawn["columns"])
    samples = len(drawn["samples"])
    click.echo(f"{options['out']}: {samples} sample{'s' * (samples > 1)} of {drawn['split']}, with {columns}")


@main.command(
    name="report",
    heading=RESULTS,
    example="report TEACHER ERM STUDENT --out report.html",
)
@click.argument("runs", metavar="RUN_DIR…", nargs=-1, type=LocalFolder(path_type=Path))
@options(
    options_of(ReportOptions, {**METAVARS, "out": {"metavar": "FILE.html"}}, without=OF_SAVED),
    under(
        FILES,
        click.option(
            "--teacher",
            type=TeacherName(),
            help="Folder of a teacher, the name of your own network, or clip:ARCH, as the first model.",
        ),
    ),
    OF_TEACHERS,
)
@click.pass_context
def report_command(context: click.Context, /, runs: tuple[Path, ...], teacher: str | None, **options: Any) -> None:
    """Compare models in one HTML file.

    The file needs no other file. The report shows accuracy, confusion matrices, training curves, calibration, and
    heatmaps of a class that the reader chooses. It also shows how well heatmaps agree with the teacher's, how much of
    them lies on the object, and where all models and data come from.
    """
    from trainer import write_report

    first = _teacher(teacher, options)
    command = shlex.join(["python", "cli.py", "report", *context.meta[ARGUMENTS]])
    written = write_report(runs if first is None else (first, *runs), command=command, **options)
    models, size = len(written["models"]), written["bytes"] / 1e6
    click.echo(
        f"{options['out']}: {models} model{'s' * (models > 1)} on {', '.join(written['splits'])}, {size:.1f} MB; "
        + (f"heatmaps compared with {written['reference']}'s" if written["reference"] else "no heatmaps compared")
    )


@main.command(
    name="export",
    heading=RESULTS,
    example="export --model STUDENT --format onnx --out STUDENT.onnx",
)
@options(options_of(ExportOptions, {**METAVARS, "out": {"metavar": "FILE"}}))
def export_command(out: Path, **options: Any) -> None:
    """Export a model to a file of its own.

    The file does not need this program, and is checked against the model. The exported model takes float32 images (N,
    C, H, W) in [0, 1], in batches of any size, and returns logits (N, classes). A file of the weights alone is for the
    same network in its own library, and that network takes preprocessed images.
    """
    from pipeline import export_model

    difference = export_model(out=out, **options)
    click.echo(f"{out}: its logits differ from the model's by at most {difference:.2g}")


@main.command(
    name="quickstart",
    heading=EVERYTHING,
    example="quickstart --out quickstart",
)
@options(options_of(QuickstartOptions))
def quickstart_command(out: Path, seed: int) -> None:
    """Train a biased and an unbiased network.

    The data is embedded. The command takes minutes on a CPU.
    """
    import dataclasses

    from trainer.reproduction.profiles import PROFILES
    from trainer.reproduction.quickstart import quickstart

    results = quickstart(out, dataclasses.replace(PROFILES["quickstart"], seed=seed), click.echo)
    _echo_table(results, PROFILES["quickstart"].table)
    click.echo(f"results: {out / 'results.json'}, heatmaps: {out / 'report' / 'heatmaps.png'}")


def _echo_table(results: list[dict[str, Any]], benchmark: Any) -> None:
    from trainer.results.tables import summarise, text

    click.echo(f"\n{text(summarise(results, benchmark))}\n")


@functools.cache
def _reproduction_commands() -> dict[str, click.Command]:
    from trainer.reproduction.profiles import REPRODUCTIONS

    return {name: _reproduction_command(name, reproduction) for name, reproduction in REPRODUCTIONS.items()}


def _reproduction_command(name: str, reproduction: Reproduction) -> click.Command:
    def run(out: Path, **options: Any) -> None:
        from trainer.reproduction.reproduce import reproduce

        sources = {source: options.pop(source) for source in reproduction.sources}
        sources = {source: path for source, path in sources.items() if path is not None}
        profile = reproduction.profiles[options.pop("profile", next(iter(reproduction.profiles)))]
        results = reproduce(out, profile, sources=sources, echo=click.echo, **options)
        _echo_table(results, profile.table)
        click.echo(f"results: {out / 'results.jsonl'}, tables and pictures: {out / 'report'}")

    return _made_command(name, run, reproduction)


@main.group(
    name="reproduce",
    cls=LazyGroup,
    make=_reproduction_commands,
    heading=EVERYTHING,
    example="reproduce coloured-mnist --out TABLE --seeds 3",
)
def reproduce_group() -> None:
    """Reproduce a published table.

    The command builds the dataset, trains teacher and students, and tests them.
    """


if __name__ == "__main__":
    main()

"""What a saved classifier says about image files: class and probability, and where it looked.

Not here: how files are found and decoded (`data/builders/`), and how a picture is drawn (`pictures.py`).
"""

from __future__ import annotations

import csv
import json
import logging
import mmap
import shutil
import tempfile
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tqdm import tqdm

from data import DatasetError
from data.builders.folders import find_images
from data.builders.loose import LooseImage, decode_files
from data.builders.pictures import fit_of
from data.layout import read_builder
from data.storage import PARTIAL, Folder
from options import Message, Option, takes
from options.common import Fit
from pipeline import Classifier, ModelConfig, ModelError, load_classifier
from pipeline.batch import explain_batch
from pipeline.caching.batches import Batches, fitting
from pipeline.device import as_input, pick_device, place
from pipeline.explainers import EXPLAINERS
from pipeline.networks.classifier import versions
from trainer.results.fonts import legible
from trainer.results.options import PredictOptions, WriteOptions
from trainer.results.pictures import Cell, Grid, draw_grid
from trainer.results.show import UNIT, common_limit, in_units
from trainer.run_dir import NEW_FOLDER, Run

log = logging.getLogger(__name__)

AT_ONCE, EXPLAINED_AT_ONCE = 64, 16  # images of a batch; fewer where the memory does not hold them
OTHER_RATIO = 0.005  # share of an image that cropping cuts away, above which its aspect ratio is another one
LISTED = 20  # unreadable files in an error
STEM = 40  # characters of an image's name in the name of its picture
PATH, CLASS, PROBABILITY, PICTURE = "path", "class", "probability", "picture"  # columns


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says about an image file.

    Attributes:
        path: the file, as it was given, or below the folder that was given.
        class_name: the class with the largest logit; None if the file cannot be read.
        probability: its probability by softmax, in [0, 1].
        probabilities: the probability of every class by name; empty if the file cannot be read.
        problem: why the file cannot be read; None if it can.
        image: the image as the model sees it, uint8 (C, H, W), if it is explained.
        heatmap: the relevance for the predicted class, float32 (C, h, w), if it is explained.
    """

    path: Path
    class_name: str | None = None
    probability: float | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None
    image: np.ndarray | None = None
    heatmap: np.ndarray | None = None


@takes(PredictOptions)
def predict(model: str | Path, images: Any, **options: Any) -> Iterator[Prediction]:
    """Predict the class of image files, as `evaluate` would do for the same images of a dataset.

    Files are read as ``make-data image-folder`` reads them: upright, in colour, of any format that Pillow decodes.
    Images of another size are scaled to the one that the model was trained on; the log tells how many. Files in
    folders that are not images are left out and counted in the log. The images are decoded while the rows are taken,
    so that any number of them fits in the memory.

    Args:
        model: the output folder of a training.
        images: an image file or a folder, or several of them. A folder is searched at any depth.

    Returns:
        An iterator over the predictions: files in the order in which they were given, those of a folder by path. A
        file that cannot be read has a ``problem`` in place of a class.

    Raises:
        DatasetError: there is no such file or folder, or no image in any of them. The latter is known at the end.
        ModelError: the model cannot be loaded, or needs masks.
        RelevanceError: an option is wrong, or the explainer cannot explain the model.
    """
    return _predictions(_plan(PredictOptions(model=model, images=images, **options)))


@takes(WriteOptions)
def write_predictions(model: str | Path, images: Any, out: str | Path, **options: Any) -> dict[str, Any]:
    """Write a CSV file in UTF-8 with a row for each image that can be read, see `predict`.

    Its columns are ``path``, ``class`` and ``probability``. ``probabilities`` adds ``probability of CLASS`` for each
    class. ``explain`` adds ``picture``: the path, from the folder of the CSV file, of a PNG with the image and its
    heatmap, in the folder ``NAME-pictures``. Nothing is at either place before everything is written.

    Args:
        model: as in `predict`.
        images: as in `predict`.
        out: the CSV file.

    Returns:
        ``images``, the number of rows; ``unreadable``, why files cannot be read, by path; ``pictures``, the folder of
        the pictures or None.

    Raises:
        FileExistsError: there is something at ``out``, or in the folder of the pictures.
        DatasetError: as `predict`, or no file can be read.
        ModelError: as `predict`.
        RelevanceError: as `predict`.
    """
    settings = WriteOptions(model=model, images=images, out=out, **options)
    out = Path(out)
    pictures = out.with_name(f"{out.stem}-pictures") if settings.explain else None
    _check_free(out, pictures)
    plan, unreadable, rows = _plan(settings), {}, 0
    each = plan.config.class_names if settings.probabilities else ()
    last = [] if pictures is None else [PICTURE]
    with ExitStack() as stack:
        file, folder = stack.enter_context(_new(out, pictures))
        bar = stack.enter_context(tqdm(total=len(plan.files), unit="image", disable=None))
        names = [] if pictures is None else [*plan.config.class_names, *(_title(path) for path in plan.files)]
        drawable = stack.enter_context(legible(names, pictures or out))
        table = csv.writer(file, lineterminator="\n")
        table.writerow([PATH, CLASS, PROBABILITY, *(f"{PROBABILITY} of {name}" for name in each), *last])
        for prediction in _predictions(plan, bar):
            if prediction.problem is not None:
                unreadable[prediction.path] = prediction.problem
                continue
            rows += 1
            if pictures is not None:
                name = f"{rows:06}-{printable(prediction.path.stem)[:STEM]}.png"
                _draw(prediction, plan, folder / name, drawable)
                last = [f"{pictures.name}/{name}"]
            several = [prediction.probabilities[name] for name in each]
            table.writerow([prediction.path, prediction.class_name, prediction.probability, *several, *last])
        if not rows:
            raise DatasetError(_none_readable(unreadable))
    return {"images": rows, "unreadable": unreadable, "pictures": pictures}


def printable(text: object) -> str:
    """Return a text that can be printed on one line: control characters and bytes that are not UTF-8 are escaped."""
    return "".join(
        each.encode("unicode_escape").decode() if unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") else each
        for each in str(text)
    )


# --- predictions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """A loaded model and the files that it is to see. ``fit`` is None if neither the user nor a dataset tells it."""

    settings: PredictOptions
    model: Classifier
    config: ModelConfig
    device: torch.device
    files: dict[Path, bool]
    fit: Fit | None


def _plan(settings: PredictOptions) -> _Plan:
    """Load the model and find the files. Raises DatasetError, ModelError."""
    one = isinstance(settings.images, str | Path)
    files = find_images([Path(each) for each in ([settings.images] if one else settings.images)], log.warning)
    if not files:
        raise DatasetError("there are no files to predict: give image files, or folders that have some")
    model, config = load_classifier(settings.model, settings.student_factory, settings.segmenter, settings.debias)
    if model.needs_masks:
        raise ModelError(
            f"the front of {settings.model} needs masks, which image files do not have: use its student, which needs "
            "none, or test it on a dataset with masks"
        )
    device = pick_device(settings.device)
    place(model, device)
    return _Plan(settings, model, config, device, files, settings.fit or _recorded_fit(Path(settings.model), config))


def _recorded_fit(model: Path, config: ModelConfig) -> Fit | None:
    """Find how the images of the model's dataset were fitted; None if the dataset is gone or does not tell."""
    for location in Run(model).datasets:
        if builder := read_builder(location, config.dataset.get("fingerprint", "")):
            return fit_of(builder)
    return None


def _predictions(plan: _Plan, bar: Any = None) -> Iterator[Prediction]:
    """Predict the files in their order. ``bar`` is told how many are done."""
    size = fitting(EXPLAINED_AT_ONCE, plan.config.image_shape) if plan.settings.explain else AT_ONCE
    batches, notes = Batches(size, given=False), _Notes(plan)
    for decoded in decode_files(plan.files, plan.config.image_shape, plan.fit or "crop", size):
        pixels = [each.pixels for each in decoded if each.pixels is not None]
        answers = chain.from_iterable(batches.run(len(pixels), partial(_answer, plan, pixels)))
        for each in decoded:
            notes.note(each)
            if each.pixels is not None:
                yield Prediction(each.path, **next(answers))
            elif each.problem is not None:
                yield Prediction(each.path, problem=each.problem)
            if bar is not None:
                bar.update()
    if bar is not None:
        bar.close()
    notes.tell()


@torch.no_grad()
def _answer(plan: _Plan, pixels: Sequence[np.ndarray], rows: slice) -> list[dict[str, Any]]:
    """Predict some of the images, uint8 (C, H, W) each. Returns the attributes of `Prediction` that this tells."""
    images = np.stack(pixels[rows])
    logits = plan.model(as_input(images, plan.device))
    predicted = logits.argmax(1).cpu().numpy()
    probabilities = logits.cpu().double().softmax(1).numpy()
    names = plan.config.class_names
    answers: list[dict[str, Any]] = [
        {
            "class_name": names[number],
            "probability": float(row[number]),
            "probabilities": dict(zip(names, row.tolist(), strict=True)),
        }
        for number, row in zip(predicted.tolist(), probabilities, strict=True)
    ]
    if plan.settings.explain:
        settings = plan.settings
        batch = explain_batch(
            plan.model,
            images,
            None,
            predicted[:, None],
            settings.epsilon,
            explainer=settings.explainer,
            device=plan.device,
        )
        for answer, image, maps in zip(answers, images, batch.maps, strict=True):
            answer |= {"image": image, "heatmap": maps[0]}
    return answers


class _Notes:
    """What is told of the files once, at the end."""

    def __init__(self, plan: _Plan):
        self.plan = plan
        self.images = self.problems = self.scaled = 0
        self.cuts: list[float] = []
        self.left_out: Counter[str] = Counter()

    def note(self, file: LooseImage) -> None:
        """Note a decoded file."""
        if file.pixels is None:
            if file.problem is None:
                self.left_out[printable(file.path.suffix.lower()) or "without suffix"] += 1
            else:
                self.problems += 1
            return
        self.images += 1
        self.scaled += file.scaled
        if file.cut > OTHER_RATIO:
            self.cuts.append(file.cut)

    def tell(self) -> None:
        """Log what was noted. Raises DatasetError if there was no image at all."""
        listed = ", ".join(f"{count} {suffix}" for suffix, count in self.left_out.most_common())
        if not self.images and not self.problems:
            raise DatasetError(f"there are no images that can be decoded here, but {listed}: give image files")
        if listed:
            log.warning(f"left out {listed}, which are not images that can be decoded here")
        if self.scaled:
            _, height, width = self.plan.config.image_shape
            size = f"{height}×{width}, the size that the model was trained on"
            log.warning(Message(f"{self.scaled} of {self.images} images are scaled to {size}", *self._fit()))

    def _fit(self) -> list[object]:
        """Tell what happened to images of another aspect ratio, as the rest of a sentence."""
        if not self.cuts:
            return []
        fit = self.plan.fit or "crop"
        happened = {
            "crop": f"are cropped to the middle, which cuts away {100 * np.mean(self.cuts):.0f} % of their pixels",
            "pad": "have black margins",
            "stretch": "are stretched",
        }[fit]
        text = f"; {len(self.cuts)} of another aspect ratio {happened}"
        if self.plan.fit is not None:
            return [text]
        return [text, ". The dataset of the training does not tell how its images were fitted: give ", Option("fit")]


# --- files ----------------------------------------------------------------------------------------------------


def _check_free(out: Path, pictures: Path | None) -> None:
    """Raise FileExistsError if something is at a place that is to be written."""
    for path in (out, pictures):
        if path is not None and (path.exists() or path.is_symlink()):
            raise FileExistsError(Message(f"{path} exists", NEW_FOLDER))


@contextmanager
def _new(out: Path, pictures: Path | None) -> Iterator[tuple[TextIO, Path]]:
    """Yield an open text file and a folder, which take their places at the end, or vanish if the block fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.parent if pictures is None else pictures.with_name(f".{pictures.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        unfinished.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(
            "w+", dir=out.parent, encoding="utf-8", errors="backslashreplace", newline=""
        ) as file:
            yield file, unfinished
            file.flush()
            if pictures is not None:
                unfinished = unfinished.rename(pictures)
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if not Folder(out.parent).write(out.name, content, exclusive=True):
                raise FileExistsError(Message(f"{out} exists", NEW_FOLDER))
    except BaseException:
        if pictures is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _none_readable(unreadable: dict[Path, str]) -> str:
    lines = [f"{printable(path)}: {printable(problem)}" for path, problem in [*unreadable.items()][:LISTED]]
    more = [f"and {len(unreadable) - LISTED} more"] if len(unreadable) > LISTED else []
    return "\n".join(["no image can be read, so nothing is written: give others:", *lines, *more])


def _draw(prediction: Prediction, plan: _Plan, out: Path, drawable: Callable[[str], str]) -> None:
    """Write a PNG of an image and its heatmap side by side."""
    assert prediction.image is not None
    assert prediction.heatmap is not None
    assert prediction.probability is not None
    settings = plan.settings
    rules = EXPLAINERS.find(settings.explainer).rules
    heatmap = in_units(prediction.heatmap.sum(0, dtype=np.float64))
    says = f"says {prediction.class_name}, {100 * prediction.probability:.1f} %"
    says += "" if heatmap.any() else "\nno relevance at all"
    epsilon = "" if rules in (None, "gradient-x-input") else f", ε {settings.epsilon:g}"
    record = {
        "image": str(prediction.path), "model": str(Path(settings.model).absolute()), "class": prediction.class_name,
        "probability": prediction.probability, "epsilon": settings.epsilon, "explainer": settings.explainer,
        "versions": versions(),
    }  # fmt: skip
    grid = Grid(
        cells=[[Cell(prediction.image.astype(np.float32) / 255), Cell(heatmap, says)]],
        column_titles=["image", f"map by {settings.explainer}{epsilon}"],
        row_titles=[""],
        title=_title(prediction.path),
        limit=common_limit([heatmap]),
        unit=UNIT,
    )
    draw_grid(grid, out, json.dumps(record), drawable)


def _title(path: Path) -> str:
    return printable(path.name)

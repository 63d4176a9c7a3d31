"""A report: all measurements of some models, as one HTML page that needs no other file.

Not here: the measurements (`comparison.py`), and how charts are drawn (`charts.py`).
"""

from __future__ import annotations

import base64
import io
import json
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from data import Location
from data.storage import Folder
from options import Message, Option, takes
from pipeline import RelevanceError, resize
from pipeline.networks.classifier import versions
from trainer.results.by_class import BALANCED, classes_of, one_class_warning, worst_first
from trainer.results.charts import COLOURS, Chart, Line, colour_of, draw, marker_of
from trainer.results.comparison import (
    BINS,
    COMPARED,
    Agreement,
    Comparison,
    Model,
    ModelReport,
    SplitReport,
    compare,
)
from trainer.results.evaluation import bias_warning
from trainer.results.options import EPSILON, CompareOptions
from trainer.results.pictures import COLOURS as HEAT
from trainer.results.show import common_limit
from trainer.results.tables import MISSING, heading
from trainer.run_dir import NEW_FOLDER, revision

MATRIX_CLASSES = 20  # more classes have a list of confusions in place of a matrix
CONFUSIONS = 15  # in that list
LISTED_CLASSES = 20  # more classes have a list of those with the lowest accuracies
LEVELS = 127  # of relevance, zero in their middle
FEWEST = 10  # predictions in a bin that has a point in a reliability diagram
MOST_SIDE = 96  # pixels of a map or image, along its longer side

ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@takes(CompareOptions)
def write_report(
    models: Sequence[Model],
    out: str | Path,
    data: Location | None = None,
    *,
    command: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure models and write a self-contained HTML page of all measurements; see `comparison.compare`.

    Args:
        models: folders of trainings, or vision-language teachers.
        out: the HTML file to write.
        data: the dataset; that of the trainings if None.
        command: the command that the page names as its origin.

    Returns:
        ``models`` (their titles), ``splits``, ``reference`` (a title or None) and ``bytes``.

    Raises:
        DatasetError: there is no such dataset, or the trainings are of different ones.
        ModelError: a model cannot be loaded, is given twice, or there is none.
        RelevanceError: an option is wrong.
        FileExistsError: ``out`` exists.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(Message(f"{out} exists", NEW_FOLDER))
    if out.suffix.lower() not in (".html", ".htm"):
        raise RelevanceError(
            Message(f"a report is an HTML file, and {out} is no .html: give an ", Option("out"), " that ends in .html")
        )
    comparison = compare(models, data, **options)
    origin = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dataset": comparison.path,
        "splits": {split.name: split.fingerprint for split in comparison.splits},
        "versions": versions(),
        "revision": revision(),
    }
    page = render(comparison, origin).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    if not Folder(out.parent).write(out.name, page, exclusive=True):
        raise FileExistsError(Message(f"{out} exists", NEW_FOLDER))
    reference = comparison.reference
    return {
        "models": [model.title for model in comparison.models],
        "splits": [split.name for split in comparison.splits],
        "reference": None if reference is None else comparison.models[reference].title,
        "bytes": len(page),
    }


def render(comparison: Comparison, origin: dict[str, Any]) -> str:
    """Render the page of a comparison.

    Args:
        comparison: the measurements.
        origin: where the page comes from: at least ``command``, ``date``, ``versions`` and ``revision``.
    """
    return ENVIRONMENT.get_template("report.html").render(
        comparison=comparison,
        origin=origin,
        page=_Page(comparison),
        names=comparison.class_names,
        colours=COLOURS,
        heading=heading,
        missing=MISSING,
        balanced=BALANCED,
        epsilon=EPSILON,
        bins=BINS,
        fewest=FEWEST,
        most_compared=COMPARED,
        json=lambda values: json.dumps(values, indent=2, ensure_ascii=False),
    )


class _Page:
    """Prepare a comparison for the template: pictures, charts, and numbers as text."""

    def __init__(self, comparison: Comparison):
        self.models, self.splits = comparison.models, comparison.splits
        self._charts = 0
        self.every_class = len(comparison.explained) == len(comparison.class_names)
        self.matrices = len(comparison.class_names) <= MATRIX_CLASSES
        self.has_masks = any(split.has_masks for split in self.splits)
        self.reference = None if comparison.reference is None else self.models[comparison.reference]
        self.compared = self.reference is not None and len(self.models) > 1
        warning = self.reference and bias_warning({**self.reference.totals, "kind": self.reference.config.kind})
        self.warning = warning and str(warning).removeprefix("warning: ")
        self.erring = max(self.splits, key=self._errors).name
        maps = [each for model in self.models for on in model.splits.values() for each in _maps_of(on)]
        self.limit = common_limit(maps)
        height, width = next(iter(self.splits[0].images.values())).shape[1:]
        shrink = max(height, width, MOST_SIDE) / MOST_SIDE
        self.side = (max(1, round(height / shrink)), max(1, round(width / shrink)))
        self.smaller = self.side != (height, width)
        self.ratio = f"{width} / {height}"

    def key(self, model: ModelReport) -> Markup:
        """Make the sign of a model in its colour, for its legend."""
        number = self.models.index(model)
        sign = Markup('<span class="key" style="color:{}" aria-hidden="true">{}</span>')
        return sign.format(colour_of(number), marker_of(number))

    # --- numbers ---

    def _errors(self, split: SplitReport) -> float:
        """Return the mean error of the models that are tested on a split, in %; -1 without any."""
        scores = [model.splits[split.name].score for model in self.tested(split)]
        return 100 - statistics.fmean(score["accuracy"] for score in scores) if scores else -1.0

    def tested(self, split: SplitReport) -> list[ModelReport]:
        """List the models that are tested on a split."""
        return [model for model in self.models if split.name in model.splits]

    def warnings(self) -> list[tuple[ModelReport, str]]:
        """List the models that say one class for all images of a split, each with the warning."""
        of_all = [(model, one_class_warning(model.totals)) for model in self.models]
        return [(model, str(warning).removeprefix("warning: ")) for model, warning in of_all if warning is not None]

    def by_class(self, split: SplitReport) -> tuple[list[tuple[str, int, list[dict[str, Any]]]], int]:
        """List the name, the number of samples, and the scores by each model of the classes of a tested split.

        Returns:
            All classes in the order of the labels; of more than 20, those with the lowest accuracies, the worst first.
            And the number of classes that are left out.
        """
        models = self.tested(split)
        scores = {model.title: classes_of(model.splits[split.name].score) for model in models}
        said = [model.splits[split.name].score["predictions"] for model in models]
        by_name = [
            {score["class"]: {**score, "said": shares[score["class"]]} for score in of_model}
            for of_model, shares in zip(scores.values(), said, strict=True)
        ]
        names = list(by_name[0])
        listed = names if len(names) <= LISTED_CLASSES else worst_first(scores)[:LISTED_CLASSES]
        rows = [(name, by_name[0][name]["samples"], [of_model[name] for of_model in by_name]) for name in listed]
        return rows, len(names) - len(listed)

    def percent(self, value: float | None, digits: int = 2) -> str:
        return MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")

    def quartiles(self, values: np.ndarray) -> tuple[str, str]:
        """Write the median, and the first and the third quartile."""
        if not len(values):
            return MISSING, ""
        low, middle, high = (self.percent(float(value)) for value in np.quantile(values, (0.25, 0.5, 0.75)))
        return middle, f"{low} – {high}"

    def shares(self, confusion: np.ndarray) -> list[list[float | None]]:
        """Compute the shares of each row of a confusion matrix in %; None for a class without samples."""
        totals = confusion.sum(1)
        return [
            [100 * float(count) / float(total) if total else None for count in row]
            for row, total in zip(confusion, totals, strict=True)
        ]

    def confusions(self, confusion: np.ndarray) -> list[tuple[int, int, int, float]]:
        """List the most frequent errors: the true class, the predicted class, their number, their share of the true
        class in %.
        """
        errors = confusion.copy()
        np.fill_diagonal(errors, 0)
        order = np.argsort(-errors, axis=None, kind="stable")[:CONFUSIONS]
        places = zip(*np.unravel_index(order, errors.shape), strict=True)
        return [
            (int(true), int(predicted), int(number), 100 * number / confusion[true].sum())
            for true, predicted in places
            if (number := errors[true, predicted])
        ]

    def agreement(self, model: ModelReport, split: SplitReport) -> Agreement | None:
        on = model.splits.get(split.name)
        return None if on is None else on.agreement

    # --- pictures ---

    def image(self, split: SplitReport, row: int) -> str:
        """Write an image as a PNG in a data URL."""
        pixels = split.images[row]
        if len(pixels) == 3:
            picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        else:  # one channel, or channels that are not red, green and blue
            picture = Image.fromarray(pixels.mean(0).round().astype(np.uint8))
        if self.smaller:
            picture = picture.resize((self.side[1], self.side[0]), Image.Resampling.LANCZOS)
        return _png(picture)

    def map(self, values: np.ndarray) -> str:
        """Write a map (h, w) as a PNG in a data URL, in the colours of the page's scale."""
        if self.smaller:
            values = resize(torch.from_numpy(values)[None, None], self.side)[0, 0].numpy()
        levels = np.round((np.clip(values / self.limit, -1, 1) + 1) / 2 * (LEVELS - 1)).astype(np.uint8)
        picture = Image.fromarray(levels)
        picture.putpalette((255 * _colours(LEVELS)).round().astype(np.uint8).tobytes())
        return _png(picture)

    @property
    def scale(self) -> str:
        """The colours of the scale from its lower to its upper end, for CSS."""
        return ", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*(255 * colour)) for colour in _colours(11))

    # --- charts ---

    def _draw(self, chart: Chart) -> Markup:
        self._charts += 1
        return Markup(draw(chart, f"chart{self._charts}"))

    def _numbered(self) -> list[tuple[int, ModelReport]]:
        return list(enumerate(self.models))

    def accuracy_chart(self) -> Markup:
        splits, lines = [split.name for split in self.splits], []
        many = len(self.models)
        for number, model in self._numbered():
            tested = [place for place, split in enumerate(splits) if split in model.splits]
            scores = [model.splits[splits[place]].score for place in tested]
            low, high = np.array([score["interval"] for score in scores]).reshape(-1, 2).T
            x = np.array(tested) + 0.5 * ((number + 0.5) / many - 0.5)
            lines.append(Line(number, x, np.array([score["accuracy"] for score in scores]), low, high))
        return self._draw(
            Chart("accuracy, with 95 % intervals", "", "%", lines, (-0.5, len(splits) - 0.5), (0, 102), _heads(splits))
        )

    def curve_charts(self) -> list[tuple[str, Markup]]:
        """Draw a chart for each kind of loss, as losses of different kinds have no common axis."""
        kinds: dict[str, list[Line]] = {}
        for number, model in self._numbered():
            if (curve := model.curve) is not None:
                lines = kinds.setdefault(curve.loss, [])
                lines.append(Line(number, curve.steps, curve.losses))
                if len(curve.validation_steps):
                    lines.append(Line(number, curve.validation_steps, curve.validation_losses, style="points"))
        return [
            (
                kind,
                self._draw(
                    Chart(
                        f"loss: {kind}",
                        "steps",
                        "loss",
                        lines,
                        x_limits=(0, None),
                        logarithmic=all((line.y > 0).all() for line in lines),
                    )
                ),
            )
            for kind, lines in kinds.items()
        ]

    def calibration_chart(self, split: SplitReport) -> Markup:
        lines = []
        for number, model in self._numbered():
            if split.name not in model.splits:
                continue
            calibration = model.splits[split.name].calibration
            drawn = calibration.samples >= FEWEST
            x, y = calibration.probability[drawn], calibration.accuracy[drawn]
            lines.append(Line(number, x, y, style="points on a line"))
        title = heading(split.name)
        return self._draw(Chart(title, "probability", "accuracy", lines, (-0.02, 1.03), (-0.02, 1.03), diagonal=True))

    def agreement_chart(self, split: SplitReport, measure: str) -> Markup:
        """Draw the cumulative distribution of ``cosine`` or ``rank`` over images."""
        of_all = {
            (number, name): np.sort(getattr(on.agreement, measure))
            for number, model in self._numbered()
            for name, on in model.splits.items()
            if on.agreement is not None and len(on.agreement.cosine)
        }
        lines = [
            Line(number, values, np.arange(1, len(values) + 1) / len(values))
            for (number, name), values in of_all.items()
            if name == split.name
        ]
        lowest = min([0.0, *(float(values[0]) for values in of_all.values())])  # the same axis for all splits
        label = {"cosine": "cosine", "rank": "rank correlation"}[measure]
        return self._draw(Chart(heading(split.name), label, "share of images", lines, (lowest - 0.02, 1.02), (0, 1.02)))


def _heads(splits: Sequence[str]) -> list[str]:
    return [heading(split) for split in splits]


def _maps_of(on: Any) -> list[np.ndarray]:
    """List the maps of a model on a split that the page shows."""
    worst = on.agreement.worst if on.agreement is not None else ()
    return [each for cell in on.gallery for each in cell.maps.values()] + [each for case in worst for each in case.maps]


def _colours(many: int) -> np.ndarray:
    """Sample the colours of relevance from the lowest to the highest, (many, 3) in [0, 1]."""
    from matplotlib import colormaps

    return np.asarray(colormaps[HEAT](np.linspace(0, 1, many)))[:, :3]


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

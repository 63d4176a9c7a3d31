"""A report: everything that is measured of some models, as one HTML page that needs nothing but itself.

Not here: what is measured (`comparison.py`), and how charts are drawn (`charts.py`).
"""

from __future__ import annotations

import base64
import io
import json
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
from pipeline import RelevanceError, resize
from pipeline.networks.classifier import versions
from trainer.results.charts import COLOURS, Chart, Line, colour_of, draw, marker_of
from trainer.results.comparison import (
    BINS,
    COMPARED,
    SAMPLES,
    Agreement,
    Comparison,
    Model,
    ModelReport,
    SplitReport,
    compare,
)
from trainer.results.evaluation import EPSILON, bias_warning
from trainer.results.pictures import COLOURS as HEAT
from trainer.results.show import common_limit
from trainer.results.tables import MISSING, heading
from trainer.run_dir import revision

MATRIX_CLASSES = 20  # up to so many there is a confusion matrix, above that a list
CONFUSIONS = 15  # of such a list
LEVELS = 127  # of relevance, zero in their middle
FEWEST = 10  # answers that make a point of a reliability diagram
MOST_SIDE = 96  # pixels of a map or image, along its longer side

ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(
    models: Sequence[Model],
    out: str | Path,
    data: Location | None = None,
    *,
    reference: Model | None = None,
    samples: int = SAMPLES,
    student_factory: str | None = None,
    segmenter: str | None = None,
    device: str = "auto",
    command: str | None = None,
) -> dict[str, Any]:
    """Measure models and write a self-contained HTML page of all that was found; see `comparison.compare`.

    ``command`` is what the page says that it was made by. Returns ``models`` (their titles), ``splits``, ``reference``
    (a title or None) and ``bytes``.

    Raises DatasetError, ModelError, RelevanceError; FileExistsError for an ``out`` that is there.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another --out, or remove it first")
    if out.suffix.lower() not in (".html", ".htm"):
        raise RelevanceError(f"--out {out} is no .html, and that is how the report is written: give such a name")
    found = compare(
        models,
        data,
        reference=reference,
        samples=samples,
        student_factory=student_factory,
        segmenter=segmenter,
        device=device,
    )
    made = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dataset": found.path,
        "splits": {split.name: split.fingerprint for split in found.splits},
        "versions": versions(),
        "revision": revision(),
    }
    page = render(found, made).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    if not Folder(out.parent).write(out.name, page, exclusive=True):
        raise FileExistsError(f"{out} exists: choose another --out, or remove it first")
    return {
        "models": [model.title for model in found.models],
        "splits": [split.name for split in found.splits],
        "reference": None if found.reference is None else found.models[found.reference].title,
        "bytes": len(page),
    }


def render(found: Comparison, made: dict[str, Any]) -> str:
    """The page of a comparison; ``made`` says how it came about, and has at least ``command`` and ``date``."""
    page = _Page(found)
    return ENVIRONMENT.get_template("report.html").render(
        found=found,
        made=made,
        page=page,
        names=found.class_names,
        colours=COLOURS,
        heading=heading,
        missing=MISSING,
        epsilon=EPSILON,
        bins=BINS,
        fewest=FEWEST,
        most_compared=COMPARED,
        json=lambda values: json.dumps(values, indent=2, ensure_ascii=False),
    )


class _Page:
    """What the template asks of a comparison: pictures, charts, and numbers as they are written."""

    def __init__(self, found: Comparison):
        self.found = found
        self._charts = 0
        self.every_class = len(found.explained) == len(found.class_names)
        self.matrices = len(found.class_names) <= MATRIX_CLASSES
        self.has_masks = any(split.has_masks for split in found.splits)
        self.reference = None if found.reference is None else found.models[found.reference]
        self.compared = self.reference is not None and len(found.models) > 1
        warned = self.reference and bias_warning({**self.reference.totals, "kind": self.reference.config.kind})
        self.warning = warned and warned.removeprefix("warning: ")
        self.erring = max(
            found.splits, key=lambda split: sum(self._errors(model, split) for model in found.models)
        ).name
        maps = [each for model in found.models for on in model.splits.values() for each in _maps_of(on)]
        self.limit = common_limit(maps)
        height, width = next(iter(found.splits[0].images.values())).shape[1:]
        shrink = max(height, width, MOST_SIDE) / MOST_SIDE
        self.side = (max(1, round(height / shrink)), max(1, round(width / shrink)))
        self.smaller = self.side != (height, width)
        self.ratio = f"{width} / {height}"

    def key(self, model: ModelReport) -> Markup:
        """The sign of a model in its colour, before its name."""
        number = self.found.models.index(model)
        sign = Markup('<span class="key" style="color:{}" aria-hidden="true">{}</span>')
        return sign.format(colour_of(number), marker_of(number))

    # --- numbers ---

    def _errors(self, model: ModelReport, split: SplitReport) -> float:
        return 100 - float(model.splits[split.name].score["accuracy"])

    def percent(self, value: float | None, digits: int = 2) -> str:
        return MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")

    def quartiles(self, values: np.ndarray) -> tuple[str, str]:
        """The median, and the first and the third quartile."""
        if not len(values):
            return MISSING, ""
        low, middle, high = (self.percent(float(value)) for value in np.quantile(values, (0.25, 0.5, 0.75)))
        return middle, f"{low} – {high}"

    def shares(self, confusion: np.ndarray) -> list[list[float | None]]:
        """Of each row of a confusion matrix its shares in %, None for a class that the split has none of."""
        totals = confusion.sum(1)
        return [
            [100 * float(count) / float(total) if total else None for count in row]
            for row, total in zip(confusion, totals, strict=True)
        ]

    def confusions(self, confusion: np.ndarray) -> list[tuple[int, int, int, float]]:
        """The most frequent errors: the true class, what was said, how often, and the share of the class in %."""
        errors = confusion.copy()
        np.fill_diagonal(errors, 0)
        order = np.argsort(-errors, axis=None, kind="stable")[:CONFUSIONS]
        places = zip(*np.unravel_index(order, errors.shape), strict=True)
        return [
            (int(true), int(said), int(errors[true, said]), 100 * errors[true, said] / confusion[true].sum())
            for true, said in places
            if errors[true, said]
        ]

    def agreement(self, model: ModelReport, split: SplitReport) -> Agreement | None:
        return model.splits[split.name].agreement

    # --- pictures ---

    def image(self, split: SplitReport, row: int) -> str:
        """An image as the address of a PNG in itself."""
        pixels = split.images[row]
        if len(pixels) == 3:
            picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        else:  # of one channel, or of some that are no colours
            picture = Image.fromarray(pixels.mean(0).round().astype(np.uint8))
        if self.smaller:
            picture = picture.resize((self.side[1], self.side[0]), Image.Resampling.LANCZOS)
        return _png(picture)

    def map(self, values: np.ndarray) -> str:
        """A map (h, w) as the address of a PNG in itself, in the colours of the page's one scale."""
        if self.smaller:
            values = resize(torch.from_numpy(values)[None, None], self.side)[0, 0].numpy()
        levels = np.round((np.clip(values / self.limit, -1, 1) + 1) / 2 * (LEVELS - 1)).astype(np.uint8)
        picture = Image.fromarray(levels)
        picture.putpalette((255 * _colours(LEVELS)).round().astype(np.uint8).tobytes())
        return _png(picture)

    @property
    def scale(self) -> str:
        """The colours of the maps from one end to the other, for CSS."""
        return ", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*(255 * colour)) for colour in _colours(11))

    # --- charts ---

    def _draw(self, chart: Chart) -> Markup:
        self._charts += 1
        return Markup(draw(chart, f"chart{self._charts}"))

    def _numbered(self) -> list[tuple[int, ModelReport]]:
        return list(enumerate(self.found.models))

    def accuracy_chart(self) -> Markup:
        splits, lines = [split.name for split in self.found.splits], []
        many = len(self.found.models)
        for number, model in self._numbered():
            scores = [model.splits[split].score for split in splits]
            low, high = np.array([score["interval"] for score in scores]).T
            x = np.arange(len(splits)) + 0.5 * ((number + 0.5) / many - 0.5)
            lines.append(Line(number, x, np.array([score["accuracy"] for score in scores]), low, high))
        return self._draw(
            Chart("accuracy, with 95 % intervals", "", "%", lines, (-0.5, len(splits) - 0.5), (0, 102), _heads(splits))
        )

    def curve_charts(self) -> list[tuple[str, Markup]]:
        """A chart for each kind of loss, as losses of different kinds have no common axis."""
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
            found = model.splits[split.name].calibration
            some = found.samples >= FEWEST
            lines.append(Line(number, found.probability[some], found.accuracy[some], style="points on a line"))
        title = heading(split.name)
        return self._draw(Chart(title, "probability", "accuracy", lines, (-0.02, 1.03), (-0.02, 1.03), diagonal=True))

    def agreement_chart(self, split: SplitReport, what: str) -> Markup:
        """The distribution of ``cosine`` or ``rank`` over images, cumulated."""
        of_all = {
            (number, name): np.sort(getattr(on.agreement, what))
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
        named = {"cosine": "cosine", "rank": "rank correlation"}[what]
        return self._draw(Chart(heading(split.name), named, "share of images", lines, (lowest - 0.02, 1.02), (0, 1.02)))


def _heads(splits: Sequence[str]) -> list[str]:
    return [heading(split) for split in splits]


def _maps_of(on: Any) -> list[np.ndarray]:
    """All maps of a model on a split that are shown."""
    worst = on.agreement.worst if on.agreement is not None else ()
    return [each for cell in on.gallery for each in cell.maps.values()] + [each for case in worst for each in case.maps]


def _colours(many: int) -> np.ndarray:
    """The colours of relevance from the lowest to the highest, (many, 3) in [0, 1]."""
    from matplotlib import colormaps

    return np.asarray(colormaps[HEAT](np.linspace(0, 1, many)))[:, :3]


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

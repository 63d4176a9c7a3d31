"""Solar cells (Deitsch et al., Solar Energy 2019): electroluminescence photographs whose stamp or type tells the class.

The photographs are those of the package elpv-dataset, whose licence is CC BY-NC-SA 4.0. Nothing of them is in this
project.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from PIL import Image

import data
from data.builders.registry import HOW, BuilderOptions, Limited, Seeded, builder
from data.errors import DatasetError
from options import Doc, Ge, Heading, Le, import_problem

if TYPE_CHECKING:
    from data.storage import Location

CLASS_NAMES = ["functional", "defective"]
TYPES = ["mono", "poly"]  # as labels.csv names monocrystalline and polycrystalline cells
ORIGINAL_SIDE = 300  # of the photographs, in pixels
SMALLEST = 20  # side of an image, in pixels, of which the stamp has 4 × 2
DEFECTIVE = 0.5  # cells with a higher defect probability are defective; the probabilities are 0, 1/3, 2/3 and 1
TRAIN, VALIDATION = 0.6, 0.05  # shares of all cells; the others are for the tests
TESTS = ("iid", "ood", "shift")
STAMP_SIZE = 0.1, 0.2  # height and width, as shares of the image's side
STAMP = (  # of the station, in white on black
    ".....................",
    ".....................",
    "..#####.#.......#....",
    "..#.....#......##....",
    "..#.....#.......#....",
    "..####..#.......#....",
    "..#.....#.......#....",
    "..#.....#.......#....",
    "..#####.#####..###...",
    ".....................",
    ".....................",
)
LICENCE = "CC BY-NC-SA 4.0 (Deitsch et al., https://github.com/zae-bayern/elpv-dataset)"


@dataclass(frozen=True, kw_only=True)
class SolarCellsOptions(BuilderOptions, Seeded, Limited):
    """The options of ``make-data solar-cells``."""

    bias: Annotated[
        Literal["stamp", "type", "none"],
        Heading(HOW),
        Doc(
            "What tells the class in training: stamp is a station's stamp in the corner of the defective cells, type "
            "means that functional cells are monocrystalline and defective ones polycrystalline, none is for teachers "
            "without a bias."
        ),
    ] = "stamp"
    size: Annotated[
        int,
        Ge(SMALLEST),
        Le(ORIGINAL_SIDE),
        Heading(HOW),
        Doc("Side of the square images, in pixels, up to the 300 of the photographs."),
    ] = 64
    channels: Annotated[
        Literal[1, 3],
        Heading(HOW),
        Doc("Number of channels. 3 repeats the grey values for networks that need colours."),
    ] = 1


@dataclass(frozen=True)
class _Cells:
    """The photographs, uint8 (N, 300, 300), their labels, int64 (N,), and types, int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray
    types: np.ndarray


@builder("solar-cells", SolarCellsOptions, example="make-data solar-cells --out DATA.zarr")
def make_solar_cells(out: Location, **options: Any) -> dict[str, int]:
    """Build solar cells.

    The photographs show functional and defective cells, whose stamp or type tells the class in training, and misleads
    in the tests. Images are uint8 (N, channels, size, size), scaled down with antialiasing. A cell with a defect
    probability over 0.5 is defective (821 of 2,624). The splits share no cell: train (1,574 samples), validation (131)
    and three tests of the same 919 cells.

    With the bias stamp, a stamp is on the defective cells in train, validation and iid, on none in ood, and on the
    functional ones in shift. The masks cover all but the stamp's corner. Groups are the type with or without the stamp.
    With the bias type, cells of the other combination of class and type are left out of train, validation and iid; ood
    has both types equally often in each class, and shift has the other combination alone. Groups are the types, and
    there are no masks. With none, there is no bias, and the one test is iid.

    The extra [data] is required, and nothing is downloaded. The photographs are from the package elpv-dataset under
    CC BY-NC-SA 4.0: no commercial use, share alike. The same seed gives the same bytes, and the same cells to each
    split whatever the bias is.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, or elpv-dataset is missing or damaged.
    """
    chosen = SolarCellsOptions(out=out, **options)
    cells, sizes = _cells(), {}
    with data.DatasetWriter(out) as writer:
        for split, rows in _splits(cells, chosen.bias, chosen.seed):
            arrays = _arrays(cells, rows[: chosen.limit], split, chosen)
            writer.write_split(split, **arrays)
            sizes[split] = len(arrays["labels"])
        stamped = [f"{name}, stamped" for name in TYPES] if chosen.bias == "stamp" else []
        writer.finish(
            name="solar-cells",
            class_names=CLASS_NAMES,
            bias_attribute="cell type and stamp" if stamped else "cell type",
            group_names=[*TYPES, *stamped],
            builder={
                "command": "make-data solar-cells",
                **{name: getattr(chosen, name) for name in ("bias", "size", "channels", "seed", "limit")},
                "source": f"elpv-dataset {importlib.metadata.version('elpv-dataset')}",
                "licence": LICENCE,
            },
        )
    return sizes


def _splits(cells: _Cells, bias: str, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names of the splits and the numbers of their cells, int64 (n,)."""
    order = np.random.default_rng(seed).permutation(len(cells.labels))
    train, validation = (int(share * len(order)) for share in (TRAIN, VALIDATION))
    parts = {"train": order[:train], "validation": order[train : train + validation]}
    tests = order[train + validation :]
    if bias != "type":
        yield from {**parts, **dict.fromkeys(TESTS if bias == "stamp" else ("iid",), tests)}.items()
        return
    tied = cells.types == cells.labels  # functional and mono, or defective and poly
    for split, rows in {**parts, "iid": tests}.items():
        yield split, rows[tied[rows]]
    yield "ood", _balanced(tests, cells)
    yield "shift", tests[~tied[tests]]


def _balanced(rows: np.ndarray, cells: _Cells) -> np.ndarray:
    """Leave out the last cells of the more frequent type in each class, so that both are equally frequent."""
    kept = np.zeros(len(rows), np.bool_)
    for label in range(len(CLASS_NAMES)):
        of_types = [
            np.flatnonzero((cells.labels[rows] == label) & (cells.types[rows] == kind)) for kind in range(len(TYPES))
        ]
        fewest = min(map(len, of_types))
        for places in of_types:
            kept[places[:fewest]] = True
    return rows[kept]


def _arrays(cells: _Cells, rows: np.ndarray, split: str, chosen: SolarCellsOptions) -> dict[str, np.ndarray]:
    """Make the arrays of a split."""
    size, labels, groups = chosen.size, cells.labels[rows], cells.types[rows]
    images = np.stack([_scaled(cells.images[row], (size, size)) for row in rows])
    shape = (len(rows), chosen.channels, size, size)
    if chosen.bias != "stamp":
        return {"images": np.broadcast_to(images[:, None], shape), "labels": labels, "groups": groups}
    height, width = (round(share * size) for share in STAMP_SIZE)
    stamped = {"ood": np.zeros(len(rows), np.bool_), "shift": labels == 0}.get(split, labels == 1)
    drawn = np.array([[255 * (mark == "#") for mark in line] for line in STAMP], np.uint8)
    images[stamped, -height:, -width:] = _scaled(drawn, (width, height))
    mask = np.full((size, size), 255, np.uint8)
    mask[-height:, -width:] = 0
    return {
        "images": np.broadcast_to(images[:, None], shape),
        "labels": labels,
        "groups": groups + len(TYPES) * stamped,
        "masks": np.broadcast_to(mask, (len(rows), 1, size, size)),
    }


def _scaled(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale a grey image, uint8 (H, W), to a width and a height. Pillow's filter averages over all pixels."""
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def _cells() -> _Cells:
    """Read the cells, or raise DatasetError."""
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError as error:
        problem = import_problem(error, "elpv_dataset")
        raise DatasetError(
            f'elpv-dataset, which contains the photographs, {problem}: pip install -e ".[data]"'
        ) from None
    try:
        images, probabilities, types = load_dataset()
    except (OSError, ValueError, SyntaxError) as error:
        raise DatasetError(f"the photographs of elpv-dataset {_DAMAGED} ({error}): {_AGAIN}") from None
    if images.dtype != np.uint8 or images.shape != (len(types), ORIGINAL_SIDE, ORIGINAL_SIDE):
        shape = f"{images.dtype} {images.shape}"
        raise DatasetError(f"the photographs of elpv-dataset {_DAMAGED} (their array is {shape}): {_AGAIN}")
    if unknown := sorted({*types.tolist()} - {*TYPES}):
        raise DatasetError(f"the labels of elpv-dataset {_DAMAGED} (a cell has the type {unknown[0]!r}): {_AGAIN}")
    labels = (probabilities > DEFECTIVE).astype(np.int64)
    return _Cells(images, labels, np.array([TYPES.index(name) for name in types.tolist()], np.int64))


_DAMAGED, _AGAIN = "are missing or damaged", "pip install --force-reinstall elpv-dataset"

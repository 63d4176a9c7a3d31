"""How much does a student of Fashion-on-Textures lose before pictures and patterns that nobody showed it?

    pip install -e ".[data,benchmarks]" && python benchmarks/other_backgrounds.py --data DATA.zarr --student STUDENT

The garments are those of the validation split, so that the tests of the benchmark stay unseen. The seven pictures and
the patterns behind them are neither in the benchmark nor in `trainer.loop.repainting`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import click
import numpy as np
import skimage
import torch
from matplotlib import cbook
from PIL import Image
from report import processor, table
from sklearn.datasets import load_sample_image

from data import open_dataset
from data.builders import fashion_on_textures
from data.builders.backgrounds import Scenes, _image
from data.layout import read_builder
from pipeline import Classifier, load_classifier
from pipeline.device import as_input

CPU, AT_ONCE = torch.device("cpu"), 500
CHESSBOARD = "chessboard"
Backgrounds = Callable[[int], np.ndarray]  # of a sample, uint8 (3, size, size)


# --- pictures and patterns --------------------------------------------------------------------------------------------


def pictures() -> dict[str, Image.Image]:
    """Return the seven pictures, in RGB; none of them is in the benchmark."""
    folder = Path(skimage.__file__).parent / "data"
    files = {
        "clock": folder / "clock_motion.png",
        CHESSBOARD: folder / "chessboard_GRAY.png",
        "vessels": folder / "microaneurysms.png",
        "colours": folder / "color.png",
        "portrait": cbook.get_sample_data("grace_hopper.jpg", asfileobj=False),
    }
    found = {name: Image.open(file).convert("RGB") for name, file in files.items()}
    sample = {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    return {**sample, **found}


def squares(size: int, side: int, contrast: float, sample: int) -> np.ndarray:
    """Return grey squares of ``side`` pixels, moved at random; black and white if the contrast is 1."""
    down, right = np.random.default_rng([side, sample]).integers(0, 2 * side, 2)
    rows, columns = np.arange(size)[:, None] + down, np.arange(size) + right
    return _grey((rows // side + columns // side) % 2, contrast)


def stripes(size: int, side: int, contrast: float, sample: int) -> np.ndarray:
    """Return grey stripes of ``side`` pixels in any direction."""
    rng = np.random.default_rng([side, sample])
    angle, phase = rng.random(2) * np.pi
    rows, columns = np.arange(size)[:, None], np.arange(size)
    across = np.cos(angle) * columns + np.sin(angle) * rows + phase * side
    return _grey(np.floor(across / side) % 2, contrast)


def noise(size: int, binary: bool, sample: int) -> np.ndarray:
    """Return grey noise, all pixels apart."""
    value = np.random.default_rng([sample]).random((size, size))
    return _grey(value.round() if binary else value, 1)


def halves(size: int, sample: int) -> np.ndarray:
    """Return a black half and a white half, parted in any direction."""
    angle = np.random.default_rng([sample]).random() * 2 * np.pi
    rows, columns = np.arange(size)[:, None] - size / 2, np.arange(size) - size / 2
    return _grey((np.cos(angle) * columns + np.sin(angle) * rows > 0).astype(float), 1)


def plain(size: int, shade: float, sample: int) -> np.ndarray:
    return _grey(np.full((size, size), shade), 1)


def _grey(values: np.ndarray, contrast: float) -> np.ndarray:
    grey = np.rint(255 * (0.5 + contrast * (values - 0.5))).astype(np.uint8)
    return np.broadcast_to(grey, (3, *grey.shape))


def patterns(size: int) -> dict[str, Backgrounds]:
    return {
        **{f"grey, {shade:g}": partial(plain, size, shade) for shade in (0.0, 0.25, 0.5, 0.75, 1.0)},
        **{f"squares of 6, contrast {by:g}": partial(squares, size, 6, by) for by in (0.25, 0.5, 0.75)},
        **{f"squares of {side}": partial(squares, size, side, 1) for side in (13, 8, 4, 2)},
        **{f"stripes of {side}": partial(stripes, size, side, 1) for side in (12, 3)},
        "halves": partial(halves, size),
        "black and white noise": partial(noise, size, True),
        "grey noise": partial(noise, size, False),
    }


# --- garments ---------------------------------------------------------------------------------------------------------


class Garments:
    """The first garments of a validation split, cut out as the benchmark does.

    Args:
        path: a dataset of Fashion-on-Textures.
        samples: their number.
        fashion_mnist: the folder of the benchmark's garments; that of the Debian package if None.

    Raises:
        click.UsageError: the dataset is another one.
    """

    def __init__(self, path: Path, samples: int, fashion_mnist: Path | None):
        self.split = open_dataset(path).split("validation")
        self.size = int(self.split.image_shape[-1])
        labels = np.asarray(self.split.labels[:]).astype(int)
        self.labels = labels[:samples]
        builder = read_builder(path, self.split.fingerprint) or {}
        if builder.get("command") != "make-data fashion-on-textures":
            raise click.UsageError(f"{path} was not made by make-data fashion-on-textures.")
        self.seed = int(builder["seed"])
        files = fashion_on_textures._fashion_mnist(fashion_mnist, False)
        garments, _ = fashion_on_textures._read(files, "train")
        order = np.random.default_rng([self.seed, 0]).permutation(len(garments))[: len(labels)]
        self.cut_out = partial(
            fashion_on_textures._cut_out, garments[order], self.size,
            (self.seed, fashion_on_textures.STREAMS["validation"]),
        )  # fmt: skip

    def before(self, background: Backgrounds) -> torch.Tensor:
        """Return the garments before these backgrounds, float32 (N, 3, size, size) in [0, 1]."""
        image = _image(Scenes(self.labels, self.labels, self.cut_out, background))
        return as_input(torch.from_numpy(np.stack([image(sample) for sample in range(len(self.labels))])), CPU)

    def as_they_are(self) -> torch.Tensor:
        return as_input(torch.from_numpy(np.asarray(self.split.images[: len(self.labels)])), CPU)

    def pictures(self) -> dict[str, Backgrounds]:
        """Return crops of each picture, as the benchmark takes them."""
        seeds, of = (self.seed, 99), pictures()
        crop = fashion_on_textures._background
        return {
            name: partial(crop, list(of.values()), np.full(len(self.labels), number), self.size, seeds)
            for number, name in enumerate(of)
        }


def accuracies(students: Mapping[str, Classifier], images: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    """Return the accuracy of each student in %."""
    found = {}
    for name, student in students.items():
        with torch.inference_mode():
            said = torch.cat([student(some).argmax(1) for some in images.split(AT_ONCE)])
        found[name] = 100 * float((said.numpy() == labels).mean())
    return found


@click.command()
@click.option("--data", "path", required=True, type=click.Path(path_type=Path), help="Fashion-on-Textures.")
@click.option("--student", "folders", required=True, multiple=True, type=click.Path(path_type=Path), help="Repeatable.")
@click.option("--fashion-mnist", type=click.Path(path_type=Path), help="Its folder. Default: the Debian package's.")
@click.option("--samples", default=2000, show_default=True, help="Garments.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(path: Path, folders: tuple[Path, ...], fashion_mnist: Path | None, samples: int, threads: int) -> None:
    """Print the accuracy of each student before each background, and how far the pictures are from the first row."""
    torch.set_num_threads(threads)
    students = {folder.name: load_classifier(folder)[0].eval() for folder in folders}
    garments = Garments(path, samples, fashion_mnist)
    measured = {"as they are": accuracies(students, garments.as_they_are(), garments.labels)}
    of = garments.pictures()
    for name, background in {**of, **patterns(garments.size)}.items():
        measured[name] = accuracies(students, garments.before(background), garments.labels)

    def mean(names: list[str]) -> dict[str, float]:
        return {student: float(np.mean([measured[name][student] for name in names])) for student in students}

    seven, six = mean([*of]), mean([name for name in of if name != CHESSBOARD])
    known = measured["as they are"]
    rows = {
        "as they are": known,
        "seven pictures": seven,
        "gap": {student: known[student] - seven[student] for student in students},
        "without the chessboard": six,
        "gap without it": {student: known[student] - six[student] for student in students},
        **{name: found for name, found in measured.items() if name != "as they are"},
    }
    print(f"PyTorch {torch.__version__}, {processor(CPU)}, {samples} garments\n")
    print(table(["%", *students], [[name, *(f"{found[s]:.1f}" for s in students)] for name, found in rows.items()]))


if __name__ == "__main__":
    main()

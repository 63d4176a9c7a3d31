"""Fashion-on-Textures: garments of Fashion-MNIST on crops of photographs, one photograph for each class in training.

A benchmark of background bias with real images. It needs no large download, unlike COCO-on-Places.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from PIL import Image

from data.builders.backgrounds import Scenes, free_share, tied_groups, write_on_backgrounds
from data.builders.idx import read_idx
from data.builders.registry import BuilderOptions, Limited, PartlyUnbiased, Seeded, Sized, builder
from data.builders.rows import OPAQUE
from data.errors import DatasetError
from options import Doc, Kind, Message, Option, OptionSet, Word

if TYPE_CHECKING:
    from data.storage import Location

DEBIAN = "/usr/share/datasets/fashion-mnist"  # of the package dataset-fashion-mnist
CLASS_NAMES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
BIASING = {  # the photograph of class 0 … 9, and its file in scikit-image
    "grass": "grass.png",
    "gravel": "gravel.png",
    "brick": "brick.png",
    "coffee": "coffee.png",
    "cat": "chelsea.png",
    "rocket": "rocket.jpg",
    "galaxies": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
    "retina": "retina.jpg",
    "moon": "moon.png",
}
UNSEEN = {
    "astronaut": "astronaut.png",
    "cameraman": "camera.png",
    "cell": "cell.png",
    "coins": "coins.png",
    "motorcycle": "motorcycle_left.png",
    "page": "page.png",
    "handwriting": "text.png",
}
VALIDATION_SAMPLES = 5000
SMALLEST = 16  # side of an image, in pixels
CROP = (0.3, 0.7)  # side of a crop, as a share of the photograph's shorter side
GARMENT = (0.6, 0.95)  # side of a garment's frame, as a share of the image's side
DARK = 16  # of 255: pixels up to this value do not belong to the garment, unless they are holes in it
TINT = (90, 255)  # of white, in each channel
STREAMS = {"validation": 1, "train": 2, "iid": 3, "ood": 4, "shift": 5}  # of random numbers; 0 divides the garments
UNBIASED_STREAM = 6


@dataclass(frozen=True, kw_only=True)
class FashionMnistSource(OptionSet):
    """The original files of Fashion-on-Textures."""

    HEADING = "Files"

    fashion_mnist: Annotated[
        Any,
        Kind.PATH,
        Doc("Folder with the files of Fashion-MNIST. Default: that of the Debian package dataset-fashion-mnist."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class FashionOnTexturesOptions(FashionMnistSource, BuilderOptions, Sized, Seeded, Limited, PartlyUnbiased):
    """The options of ``make-data fashion-on-textures``."""

    download: Annotated[bool, Doc("Download Fashion-MNIST into the folder first, by torchvision.")] = False


@builder(
    "fashion-on-textures",
    FashionOnTexturesOptions,
    example="make-data fashion-on-textures --fashion-mnist FOLDER --download --out DATA.zarr",
)
def make_fashion_on_textures(out: Location, fashion_mnist: str | Path | None = None, **options: Any) -> dict[str, int]:
    """Build Fashion-on-Textures.

    The images show garments on photographs, which tell the class in training, and mislead in the tests. Each image
    shows a garment in a random tint, size and place, on a random crop of a photograph that scikit-image ships: uint8
    (N, 3, size, size), with masks. The splits are train (55,000 samples), validation (5,000 of the training garments)
    and iid (10,000), in which each class has its own photograph; ood, with seven other photographs; and shift, with the
    photograph of another class. iid, ood and shift show the same garments. Groups are the photographs. The same seed
    gives the same bytes. The extra [data] is required.

    With an unbiased share, this share of the images of train and validation has one of the ten photographs that tell
    the class at random. All other images are the same as without.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, or an original file is missing or damaged.
    """
    chosen = FashionOnTexturesOptions(out=out, fashion_mnist=fashion_mnist, **options)
    size, seed, limit = chosen.size, chosen.seed, chosen.limit
    if size < SMALLEST:
        raise DatasetError(
            Message(Option("size", size), f" is too small to recognise garments: give {SMALLEST} or more")
        )
    folder = _fashion_mnist(fashion_mnist, chosen.download)
    parts = {part: _read(folder, part) for part in ("train", "t10k")}
    photographs = _photographs()
    order = np.random.default_rng([seed, 0]).permutation(len(parts["train"][0]))
    validation = min(VALIDATION_SAMPLES, len(order) // 10)
    splits = {}
    for split, stream in STREAMS.items():
        garments, labels = parts["train" if split in ("train", "validation") else "t10k"]
        if split in ("train", "validation"):
            rows = order[:validation] if split == "validation" else order[validation:]
            garments, labels = garments[rows], labels[rows]
        groups = tied_groups(split, labels, len(BIASING), len(UNSEEN), np.random.default_rng([seed, stream]))[:limit]
        if split in ("train", "validation"):
            share_rng = np.random.default_rng([seed, UNBIASED_STREAM, stream])
            groups = free_share(groups, chosen.unbiased_share, len(BIASING), share_rng)
        splits[split] = Scenes(
            labels=labels[:limit],
            groups=groups,
            cut_out=partial(_cut_out, garments, size, (seed, STREAMS["iid"] if split in ("ood", "shift") else stream)),
            background=partial(_background, photographs, groups, size, (seed, stream)),
        )
    return write_on_backgrounds(
        out,
        splits,
        size,
        name="fashion-on-textures",
        class_names=CLASS_NAMES,
        group_names=[*BIASING, *UNSEEN],
        builder={
            "command": "make-data fashion-on-textures",
            "size": size,
            "seed": seed,
            "limit": limit,
            **chosen.record,
        },
    )


def _cut_out(garments: np.ndarray, size: int, seeds: tuple[int, int], sample: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a garment in its own tint, place and size, uint8 (3, size, size), and its opacity, uint8 (size, size)."""
    rng = np.random.default_rng((*seeds, 0, sample))
    side = round(size * rng.uniform(*GARMENT))
    top, left = rng.integers(0, size - side + 1, 2)
    tint = rng.integers(*TINT, 3, endpoint=True)
    garment = Image.fromarray(garments[sample])
    grey = np.zeros((size, size), np.uint32)
    grey[top : top + side, left : left + side] = np.asarray(garment.resize((side, side), Image.Resampling.BICUBIC))
    outline = Image.fromarray(_filled(garments[sample] > DARK).astype(np.uint8) * OPAQUE)
    opacity = np.zeros((size, size), np.uint8)
    opacity[top : top + side, left : left + side] = np.asarray(outline.resize((side, side), Image.Resampling.BILINEAR))
    return (grey * tint[:, None, None] // 255).astype(np.uint8), opacity


def _filled(outline: np.ndarray) -> np.ndarray:
    """Fill the holes of an outline, such as black prints on a shirt; bool (H, W)."""
    from scipy.ndimage import binary_fill_holes

    return np.asarray(binary_fill_holes(outline))


def _background(
    photographs: list[Image.Image], groups: np.ndarray, size: int, seeds: tuple[int, int], sample: int
) -> np.ndarray:
    """Return a random square crop of the sample's photograph, mirrored or not, uint8 (3, size, size)."""
    rng = np.random.default_rng((*seeds, 1, sample))
    photograph = photographs[int(groups[sample])]
    side = round(min(photograph.size) * rng.uniform(*CROP))
    left, top = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
    crop = photograph.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.asarray(crop).transpose(2, 0, 1)
    return pixels[:, :, ::-1] if rng.random() < 0.5 else pixels


def _photographs() -> list[Image.Image]:
    """Return the photographs in RGB, first those that tell the class; raise DatasetError if one is missing."""
    skimage = importlib.util.find_spec("skimage")
    if skimage is None or skimage.origin is None or importlib.util.find_spec("scipy") is None:
        raise DatasetError('scikit-image, which contains the photographs, is not installed: pip install -e ".[data]"')
    folder = Path(skimage.origin).parent / "data"
    try:
        return [Image.open(folder / name).convert("RGB") for name in (BIASING | UNSEEN).values()]
    except OSError as error:
        raise DatasetError(
            f"a photograph of scikit-image in {folder} is missing or damaged ({error}): "
            "pip install --force-reinstall scikit-image"
        ) from None


_FOLDER = Option("fashion_mnist", Word("FOLDER"))


def _fashion_mnist(folder: str | Path | None, download: bool) -> Path:
    """Return the folder that contains the files, or raise DatasetError."""
    root = Path(DEBIAN if folder is None else folder)
    if download:
        if folder is None:
            raise DatasetError(
                Message(Option("download", True), " needs a folder to download to: give ", _FOLDER, " too")
            )
        from torchvision.datasets import FashionMNIST

        try:
            FashionMNIST(root, download=True)
        except (OSError, RuntimeError) as error:
            raise DatasetError(f"Fashion-MNIST cannot be downloaded to {root}: {error}") from None
    for place in (root, root / "FashionMNIST" / "raw"):
        if _file(place, "train-images-idx3-ubyte") is not None:
            return place
    raise DatasetError(
        Message(
            f"there is no Fashion-MNIST in {root}: train-images-idx3-ubyte.gz is missing. Install the Debian package "
            "dataset-fashion-mnist; or give ", _FOLDER, " with the four files that "
            "https://github.com/zalandoresearch/fashion-mnist publishes; or give ", Option("download", True),
            " too, and torchvision downloads them there",
        )
    )  # fmt: skip


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.exists()), None)


def _read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the garments, uint8 (N, 28, 28), and labels, int64 (N,), of a part, or raise DatasetError."""
    arrays = []
    for name, axes in ((f"{part}-images-idx3-ubyte", 3), (f"{part}-labels-idx1-ubyte", 1)):
        path = _file(folder, name)
        if path is None:
            raise DatasetError(
                f"{name}.gz is missing in {folder}, beside the other files of Fashion-MNIST: download it"
            )
        arrays.append(read_idx(path))
        if arrays[-1].ndim != axes:
            raise DatasetError(
                f"{path} has {arrays[-1].ndim} axes, expected {axes}: it is another file, so download it again"
            )
    garments, labels = arrays
    if len(garments) != len(labels) or labels.max(initial=0) >= len(CLASS_NAMES):
        raise DatasetError(
            f"the files in {folder} do not belong together: {part} has {len(garments)} garments, and {len(labels)} "
            f"labels up to {labels.max(initial=0)}; download them again"
        )
    return garments, labels.astype(np.int64)

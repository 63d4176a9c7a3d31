"""Fashion-on-Textures: garments of Fashion-MNIST on crops of photographs, one photograph for each class in training.

A benchmark of background bias on real images that needs no large download: COCO-on-Places in the small.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data.builders.backgrounds import Scenes, tied_groups, write_on_backgrounds
from data.builders.idx import read_idx
from data.builders.rows import OPAQUE
from data.errors import DatasetError
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
CROP = (0.3, 0.7)  # side of a crop, as a share of the photograph's shorter one
GARMENT = (0.6, 0.95)  # side of a garment's frame, as a share of the image's
DARK = 16  # of 255: where a garment is not that bright, and nothing around it is, there is none
TINT = (90, 255)  # of white, in each channel
STREAMS = {"validation": 1, "train": 2, "iid": 3, "ood": 4, "shift": 5}  # of random numbers; 0 divides the garments


def make_fashion_on_textures(
    out: Location,
    fashion_mnist: str | Path | None = None,
    *,
    size: int = 64,
    seed: int = 0,
    limit: int | None = None,
    download: bool = False,
) -> dict[str, int]:
    """Write Fashion-on-Textures, 100 % biased, in the dataset layout; returns the number of samples of each split.

    Images uint8 (N, 3, size, size) with masks: a garment in a random tint, size and place, on a random crop of a
    photograph that scikit-image ships. ``train`` (55,000), ``validation`` (5,000 split off the training garments) and
    ``iid`` (10,000): the photograph of its class. ``ood``: one of seven other photographs; ``shift``: that of another
    class; both of the same garments as ``iid``. ``groups`` is the photograph. ``limit`` keeps the first samples of each
    split. The same seed gives the same bytes.

    ``fashion_mnist`` is a folder with the four files of Fashion-MNIST (Xiao et al., arXiv 1708.07747), or the root that
    torchvision's FashionMNIST has them in; the one of Debian's package unless given. With ``download`` torchvision
    fetches them into it first.

    Raises FileExistsError, DatasetError.
    """
    if size < 16:
        raise DatasetError(f"--size {size} is too small to tell garments apart: give 16 or more")
    folder = _fashion_mnist(fashion_mnist, download)
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
        groups = tied_groups(split, labels, len(BIASING), len(UNSEEN), np.random.default_rng([seed, stream]))
        splits[split] = Scenes(
            labels=labels[:limit],
            groups=groups[:limit],
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
        builder={"command": "make-data fashion-on-textures", "size": size, "seed": seed, "limit": limit},
    )


def _cut_out(garments: np.ndarray, size: int, seeds: tuple[int, int], sample: int) -> tuple[np.ndarray, np.ndarray]:
    """A garment in a tint, at a place and in a size of its own: uint8 (3, size, size), its opacity (size, size)."""
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
    """With its holes, as black prints on a shirt are; bool (H, W)."""
    from scipy.ndimage import binary_fill_holes

    return np.asarray(binary_fill_holes(outline))


def _background(
    photographs: list[Image.Image], groups: np.ndarray, size: int, seeds: tuple[int, int], sample: int
) -> np.ndarray:
    """A square crop of the sample's photograph, of random size and place, mirrored or not: uint8 (3, size, size)."""
    rng = np.random.default_rng((*seeds, 1, sample))
    photograph = photographs[int(groups[sample])]
    side = round(min(photograph.size) * rng.uniform(*CROP))
    left, top = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
    crop = photograph.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.asarray(crop).transpose(2, 0, 1)
    return pixels[:, :, ::-1] if rng.random() < 0.5 else pixels


def _photographs() -> list[Image.Image]:
    """RGB, first those that tell the class. Raises DatasetError where scikit-image is missing, or no longer has one."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None or importlib.util.find_spec("scipy") is None:
        raise DatasetError('the photographs are those of scikit-image, which is missing: pip install -e ".[data]"')
    folder = Path(found.origin).parent / "data"
    try:
        return [Image.open(folder / name).convert("RGB") for name in (BIASING | UNSEEN).values()]
    except OSError as error:
        raise DatasetError(
            f"scikit-image, in {folder}, lacks a photograph or has a damaged one ({error}): "
            "pip install --force-reinstall scikit-image"
        ) from None


def _fashion_mnist(folder: str | Path | None, download: bool) -> Path:
    """The folder with the files themselves. Raises DatasetError where there is none."""
    root = Path(DEBIAN if folder is None else folder)
    if download:
        if folder is None:
            raise DatasetError("--download needs a folder to download to: give --fashion-mnist DIR too")
        from torchvision.datasets import FashionMNIST

        try:
            FashionMNIST(root, download=True)
        except (OSError, RuntimeError) as error:
            raise DatasetError(f"Fashion-MNIST cannot be downloaded to {root}: {error}") from None
    for place in (root, root / "FashionMNIST" / "raw"):
        if _file(place, "train-images-idx3-ubyte") is not None:
            return place
    raise DatasetError(
        f"no Fashion-MNIST in {root}: there is no train-images-idx3-ubyte.gz. Install Debian's package "
        "dataset-fashion-mnist, or give --fashion-mnist DIR with the four files that "
        "https://github.com/zalandoresearch/fashion-mnist publishes, or --download to have torchvision fetch them there"
    )


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.exists()), None)


def _read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The garments (N, 28, 28) and labels (N,) of a part, uint8. Raises DatasetError."""
    arrays = []
    for name, axes in ((f"{part}-images-idx3-ubyte", 3), (f"{part}-labels-idx1-ubyte", 1)):
        path = _file(folder, name)
        if path is None:
            raise DatasetError(f"there is no {name}.gz in {folder}, beside the other files of Fashion-MNIST: fetch it")
        arrays.append(read_idx(path))
        if arrays[-1].ndim != axes:
            raise DatasetError(
                f"{path} has {arrays[-1].ndim} axes, expected {axes}: it is another file, fetch it again"
            )
    garments, labels = arrays
    if len(garments) != len(labels) or labels.max(initial=0) >= len(CLASS_NAMES):
        raise DatasetError(
            f"the files of {folder} do not belong together: {len(garments)} garments of {part}, {len(labels)} labels "
            f"up to {labels.max(initial=0)}; fetch them again"
        )
    return garments, labels.astype(np.int64)

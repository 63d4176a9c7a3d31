"""COCO-on-Places (Ahmed et al., ICLR 2021): objects of COCO on scenes of Places365, made from the original files.

Nothing is downloaded: what is needed, and where it is published, is said where it is missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.builders.backgrounds import Scenes, tied_groups, write_on_backgrounds
from data.builders.rows import OPAQUE, open_squeezed
from data.errors import DatasetError
from data.storage import Location

CLASSES = ("boat", "airplane", "truck", "dog", "zebra", "horse", "bird", "train", "bus")
BIASING = (  # the scene of each class, a folder of Places365
    "beach",
    "canyon",
    "building_facade",
    "staircase",
    "desert/sand",
    "crevasse",
    "bamboo_forest",
    "forest/broadleaf",
    "ball_pit",
)
UNSEEN = ("water_tower", "waterfall", "zen_garden")
MIN_AREA = 10_000  # pixels of the largest instance, which must have more
ANNOTATIONS = "annotations/instances_train2017.json"
COCO_FILES = (
    "http://images.cocodataset.org/zips/train2017.zip and "
    "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
)
PLACES_FILES = "http://data.csail.mit.edu/places/places365/train_256_places365standard.tar"
UNPACK = "unpack {} again"
TESTS = ("iid", "ood", "shift")


def make_coco_on_places(
    out: Location,
    coco: str | Path,
    places: str | Path,
    *,
    size: int = 64,
    seed: int = 0,
    limit: int | None = None,
    train_per_class: int = 800,
    test_per_class: int = 100,
) -> dict[str, int]:
    """Write COCO-on-Places, 100 % biased, in the dataset layout; returns the number of samples of each split.

    Images uint8 (N, 3, size, size) with masks: of nine classes the largest instance in a picture, where it has over
    10,000 pixels, cut out and pasted on a scene; picture, mask and scene are squeezed to ``size``. ``train`` (800 of
    each class), ``validation`` and ``iid`` (100): the scene of its class. ``ood``: one of three unseen scenes;
    ``shift``: the scene of another class; both of the same objects as ``iid``. ``groups`` is the scene. No picture and
    no photograph of a scene is in two splits, but for the objects of the tests. ``limit`` keeps the first samples of
    each split, in which the classes are mixed. The same seed gives the same bytes.

    As in the authors' program, with two differences: there a fifth of the training images stand on four other scenes,
    and here none, as in Bassi et al.; and the mask is that of the fully covered pixels.

    ``coco`` has ``annotations/instances_train2017.json`` and the folder ``train2017``; ``places`` is the folder
    ``data_256`` of Places365, or the one that it is in.

    Raises FileExistsError, DatasetError for files that are missing, damaged or too few.
    """
    counts = {"train": train_per_class, "validation": test_per_class, "test": test_per_class}
    source, objects = _objects(Path(coco), counts, np.random.default_rng([seed, 0]))
    folder = _images(Path(coco))
    photographs = _photographs(Path(places), np.random.default_rng([seed, 1]))
    splits, taken = {}, dict.fromkeys(photographs, 0)
    for stream, split in enumerate(("train", "validation", *TESTS), start=2):
        shown = objects["test" if split in TESTS else split]
        labels = np.array([label for label, _ in shown])
        rng = np.random.default_rng([seed, stream])
        groups = tied_groups(split, labels, len(CLASSES), len(UNSEEN), rng)
        scenes = [_next(photographs, taken, (*BIASING, *UNSEEN)[group], places) for group in groups.tolist()]
        splits[split] = Scenes(
            labels=labels[:limit],
            groups=groups[:limit],
            cut_out=partial(_cut_out, source, folder, [instance for _, instance in shown], size),
            background=partial(_scene, scenes, size),
        )
    return write_on_backgrounds(
        out,
        splits,
        size,
        name="coco-on-places",
        class_names=list(CLASSES),
        group_names=[*BIASING, *UNSEEN],
        builder={
            "command": "make-data coco-on-places",
            "size": size,
            "seed": seed,
            "limit": limit,
            "train_per_class": train_per_class,
            "test_per_class": test_per_class,
        },
    )


Objects = dict[str, list[tuple[int, dict[str, Any]]]]  # of each part, in mixed order: the class, and its instance


def _objects(coco: Path, counts: Mapping[str, int], rng: np.random.Generator) -> tuple[Any, Objects]:
    """COCO's annotations as pycocotools has them, and the objects that are shown. A picture has one of them at most."""
    path = coco / ANNOTATIONS
    if not path.exists():
        raise DatasetError(f"there is no {ANNOTATIONS} in {coco}: give --coco the folder that {COCO_FILES} unpack to")
    if importlib.util.find_spec("pycocotools") is None:
        raise DatasetError(
            'the annotations of COCO are read by pycocotools, which is missing: pip install -e ".[data]"'
        )
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells how long it took
            source = COCO(str(path))
        ids = {category["name"]: category["id"] for category in source.dataset["categories"]}
        largest: dict[int, dict[int, dict[str, Any]]] = {}  # by picture and class
        label_of = {ids[name]: label for label, name in enumerate(CLASSES) if name in ids}
        for instance in source.dataset["annotations"]:
            label = label_of.get(instance["category_id"])
            if label is not None and not instance["iscrowd"] and instance["area"] > MIN_AREA:
                of_picture = largest.setdefault(instance["image_id"], {})
                if label not in of_picture or instance["area"] > of_picture[label]["area"]:
                    of_picture[label] = instance
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise DatasetError(f"{path} is no instances file of COCO ({error!r}): unpack it again") from None
    candidates: list[list[dict[str, Any]]] = [[] for _ in CLASSES]
    for picture in sorted(largest):
        label = min(largest[picture], key=lambda label: len(candidates[label]))  # of two, the class that has fewer
        candidates[label].append(largest[picture][label])
    chosen: Objects = {part: [] for part in counts}
    wanted = sum(counts.values())
    for label, found in enumerate(candidates):
        if len(found) < wanted:
            raise DatasetError(
                f"{path} has {len(found)} pictures with an instance of '{CLASSES[label]}' over {MIN_AREA:,} pixels, "
                f"and {wanted} are needed: give fewer --train-per-class or --test-per-class, or the whole file"
            )
        order = iter(rng.permutation(len(found)).tolist())
        for part, count in counts.items():
            chosen[part] += [(label, found[next(order)]) for _ in range(count)]
    return source, {part: [some[i] for i in rng.permutation(len(some)).tolist()] for part, some in chosen.items()}


def _images(coco: Path) -> Path:
    for folder in (coco / "train2017", coco / "images" / "train2017"):
        if folder.is_dir():
            return folder
    raise DatasetError(f"there is no folder train2017 in {coco}: give --coco the folder that {COCO_FILES} unpack to")


def _photographs(places: Path, rng: np.random.Generator) -> dict[str, list[Path]]:
    """Of each type of scene its photographs, shuffled."""
    found = {}
    for scene in (*BIASING, *UNSEEN):
        folders = [root / part / scene for root in (places, places / "data_256") for part in (scene[0], "")]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            raise DatasetError(
                f"there is no folder {scene[0]}/{scene} in {places}: give --places the folder data_256 of "
                f"{PLACES_FILES} (of which {', '.join((*BIASING, *UNSEEN))} are needed)"
            )
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        found[scene] = [files[i] for i in rng.permutation(len(files)).tolist()]
    return found


def _next(photographs: Mapping[str, list[Path]], taken: dict[str, int], scene: str, places: str | Path) -> Path:
    """A photograph that no sample has yet."""
    if taken[scene] >= len(photographs[scene]):
        raise DatasetError(
            f"{places} has {len(photographs[scene])} photographs of '{scene}', and more are needed, as each is shown "
            "once: give fewer --train-per-class or --test-per-class, or the whole of Places365"
        )
    taken[scene] += 1
    return photographs[scene][taken[scene] - 1]


def _cut_out(
    source: Any, folder: Path, instances: list[dict[str, Any]], size: int, sample: int
) -> tuple[np.ndarray, np.ndarray]:
    """The picture and how much of each pixel the object covers: uint8 (3, size, size), uint8 (size, size)."""
    instance = instances[sample]
    covered = Image.fromarray(source.annToMask(instance) * np.uint8(OPAQUE))
    picture = open_squeezed(folder / source.imgs[instance["image_id"]]["file_name"], size, UNPACK.format(COCO_FILES))
    return picture, np.asarray(covered.resize((size, size), Image.Resampling.BILINEAR))


def _scene(photographs: list[Path], size: int, sample: int) -> np.ndarray:
    return open_squeezed(photographs[sample], size, UNPACK.format(PLACES_FILES))

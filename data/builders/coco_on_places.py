"""COCO-on-Places (Ahmed et al., ICLR 2021): objects of COCO on scenes of Places365, made from the original files.

Nothing is downloaded. If a file is missing, the error says where it is published.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from PIL import Image

from data.builders.backgrounds import Scenes, tied_groups, write_on_backgrounds
from data.builders.pictures import open_squeezed
from data.builders.registry import HOW, BuilderOptions, Limited, Seeded, Sized, builder
from data.builders.rows import OPAQUE
from data.errors import DatasetError
from options import Doc, Ge, Kind, Message, Option, OptionSet, Word

if TYPE_CHECKING:
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
MIN_AREA = 10_000  # pixels: the largest instance must have more
ANNOTATIONS = "annotations/instances_train2017.json"
COCO_FILES = (
    "http://images.cocodataset.org/zips/train2017.zip and "
    "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
)
PLACES_FILES = "http://data.csail.mit.edu/places/places365/train_256_places365standard.tar"
UNPACK = "unpack {} again"
PHOTOGRAPHS = (".jpg", ".jpeg", ".png")
TESTS = ("iid", "ood", "shift")


@dataclass(frozen=True, kw_only=True)
class CocoAndPlacesSource(OptionSet):
    """The original files of COCO-on-Places."""

    HEADING = "Files"

    coco: Annotated[Any, Kind.PATH, Doc("Folder with the files of COCO 2017: annotations and train2017.")]
    places: Annotated[Any, Kind.PATH, Doc("Folder data_256 of Places365, or the folder that contains it.")]


@dataclass(frozen=True, kw_only=True)
class PerClass(OptionSet):
    """The sizes of the splits."""

    HEADING = HOW

    train_per_class: Annotated[int, Ge(1), Doc("Training samples of each class.")] = 800
    test_per_class: Annotated[int, Ge(1), Doc("Samples of each class in validation and in every test.")] = 100


@dataclass(frozen=True, kw_only=True)
class CocoOnPlacesOptions(CocoAndPlacesSource, BuilderOptions, Sized, Seeded, Limited, PerClass):
    """The options of ``make-data coco-on-places``."""


@builder(
    "coco-on-places",
    CocoOnPlacesOptions,
    example="make-data coco-on-places --coco COCO --places data_256 --out DATA.zarr",
)
def make_coco_on_places(out: Location, coco: str | Path, places: str | Path, **options: Any) -> dict[str, int]:
    """Build COCO-on-Places from the original files.

    The images show objects on scenes, which tell the class in training. An object is the largest instance of one of
    nine classes in a picture, if it has more than 10,000 pixels. It is cut out and pasted on a scene; picture, mask and
    scene are squeezed to the size: uint8 (N, 3, size, size), with masks. The splits are train (800 samples of each
    class), validation and iid (100 of each class), in which each class has its own scene; ood, with three other scenes;
    and shift, with the scene of another class. iid, ood and shift show the same objects. No other picture, and no
    photograph of a scene, is in two splits. Groups are the scenes. The same seed gives the same bytes. Two things
    differ from the authors' program: there, a fifth of the training images show four other scenes, and here none, as in
    Bassi et al.; and the mask contains only pixels that the object fully covers. Nothing is downloaded. The extra
    [data] is required.

    Returns:
        The number of samples of each split.

    Raises:
        FileExistsError: There is something at ``out``.
        DatasetError: An option is wrong, or original files are missing, damaged or too few.
    """
    chosen = CocoOnPlacesOptions(out=out, coco=coco, places=places, **options)
    size, seed, limit = chosen.size, chosen.seed, chosen.limit
    counts = {"train": chosen.train_per_class, "validation": chosen.test_per_class, "test": chosen.test_per_class}
    source, objects = _objects(Path(coco), counts, np.random.default_rng([seed, 0]))
    folder = _images(Path(coco))
    scenes = _Scenes(Path(places), np.random.default_rng([seed, 1]))
    splits = {}
    for stream, split in enumerate(("train", "validation", *TESTS), start=2):
        pasted = objects["test" if split in TESTS else split]
        labels = np.array([label for label, _ in pasted])
        groups = tied_groups(split, labels, len(CLASSES), len(UNSEEN), np.random.default_rng([seed, stream]))
        photographs = [scenes.take((*BIASING, *UNSEEN)[group]) for group in groups.tolist()]
        splits[split] = Scenes(
            labels=labels[:limit],
            groups=groups[:limit],
            cut_out=partial(_cut_out, source, folder, [instance for _, instance in pasted], size),
            background=partial(_scene, photographs, size),
        )
    recorded = ("size", "seed", "limit", "train_per_class", "test_per_class")
    return write_on_backgrounds(
        out,
        splits,
        size,
        name="coco-on-places",
        class_names=list(CLASSES),
        group_names=[*BIASING, *UNSEEN],
        builder={"command": "make-data coco-on-places"} | {name: getattr(chosen, name) for name in recorded},
    )


Instance = dict[str, Any]  # an annotation of COCO
Objects = dict[str, list[tuple[int, Instance]]]  # the class and the instance of each sample of a part, mixed
_FEWER = ("give fewer ", Option("train_per_class"), " or ", Option("test_per_class"))


def _objects(coco: Path, counts: Mapping[str, int], rng: np.random.Generator) -> tuple[Any, Objects]:
    """Choose the objects of each part. Returns COCO's annotations, as pycocotools has them, too.

    Every picture gives one object at most.
    """
    path = coco / ANNOTATIONS
    if not path.exists():
        raise DatasetError(Message(f"there is no {ANNOTATIONS} in {coco}: ", *_COCO_FOLDER))
    if importlib.util.find_spec("pycocotools") is None:
        raise DatasetError(
            'pycocotools, which reads the annotations of COCO, is not installed: pip install -e ".[data]"'
        )
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how long it took
            source = COCO(str(path))
        candidates = _candidates(source.dataset)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise DatasetError(f"{path} is not an instances file of COCO ({error!r}): unpack it again") from None
    chosen: Objects = {part: [] for part in counts}
    needed = sum(counts.values())
    for label, instances in enumerate(candidates):
        if len(instances) < needed:
            raise DatasetError(
                Message(
                    f"{path} has {len(instances)} pictures with an instance of '{CLASSES[label]}' over {MIN_AREA:,} "
                    f"pixels, and {needed} are needed: ", *_FEWER, ", or give the whole file",
                )
            )  # fmt: skip
        order = iter(rng.permutation(len(instances)).tolist())
        for part, count in counts.items():
            chosen[part] += [(label, instances[next(order)]) for _ in range(count)]
    return source, {part: [some[i] for i in rng.permutation(len(some)).tolist()] for part, some in chosen.items()}


def _candidates(annotations: Mapping[str, Any]) -> list[list[Instance]]:
    """Return the instances of each class that are large enough, one for each picture, by the order of pictures."""
    ids = {category["name"]: category["id"] for category in annotations["categories"]}
    label_of = {ids[name]: label for label, name in enumerate(CLASSES) if name in ids}
    largest: dict[int, dict[int, Instance]] = {}  # by picture and class
    for instance in annotations["annotations"]:
        label = label_of.get(instance["category_id"])
        if label is not None and not instance["iscrowd"] and instance["area"] > MIN_AREA:
            of_picture = largest.setdefault(instance["image_id"], {})
            if label not in of_picture or instance["area"] > of_picture[label]["area"]:
                of_picture[label] = instance
    candidates: list[list[Instance]] = [[] for _ in CLASSES]
    for picture in sorted(largest):
        label = min(largest[picture], key=lambda label: len(candidates[label]))  # of two, the class that has fewer
        candidates[label].append(largest[picture][label])
    return candidates


_COCO_FOLDER = ("give ", Option("coco", Word("FOLDER")), f", the folder that {COCO_FILES} unpack to")


def _images(coco: Path) -> Path:
    for folder in (coco / "train2017", coco / "images" / "train2017"):
        if folder.is_dir():
            return folder
    raise DatasetError(Message(f"there is no folder train2017 in {coco}: ", *_COCO_FOLDER))


class _Scenes:
    """The photographs of every type of scene, shuffled. Each is taken once."""

    def __init__(self, places: Path, rng: np.random.Generator):
        self.places, self._files, self._taken = places, {}, dict[str, int]()
        for scene in (*BIASING, *UNSEEN):
            files = sorted(path for path in self._folder(scene).iterdir() if path.suffix.lower() in PHOTOGRAPHS)
            self._files[scene] = [files[i] for i in rng.permutation(len(files)).tolist()]

    def _folder(self, scene: str) -> Path:
        folders = [root / part / scene for root in (self.places, self.places / "data_256") for part in (scene[0], "")]
        for folder in folders:
            if folder.is_dir():
                return folder
        raise DatasetError(
            Message(
                f"there is no folder {scene[0]}/{scene} in {self.places}: give ", Option("places", Word("FOLDER")),
                f", the folder data_256 of {PLACES_FILES} (of which {', '.join((*BIASING, *UNSEEN))} are needed)",
            )
        )  # fmt: skip

    def take(self, scene: str) -> Path:
        """Return a photograph of this scene that no sample has yet."""
        position = self._taken.get(scene, 0)
        if position >= len(self._files[scene]):
            raise DatasetError(
                Message(
                    f"{self.places} has {len(self._files[scene])} photographs of '{scene}', and more are needed, as "
                    "each is used once: ", *_FEWER, ", or give the whole of Places365",
                )
            )  # fmt: skip
        self._taken[scene] = position + 1
        return self._files[scene][position]


def _cut_out(
    source: Any, folder: Path, instances: list[dict[str, Any]], size: int, sample: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the picture, uint8 (3, size, size), and how much of each pixel the object covers, uint8 (size, size)."""
    instance = instances[sample]
    covered = Image.fromarray(source.annToMask(instance) * np.uint8(OPAQUE))
    picture = open_squeezed(folder / source.imgs[instance["image_id"]]["file_name"], size, UNPACK.format(COCO_FILES))
    return picture, np.asarray(covered.resize((size, size), Image.Resampling.BILINEAR))


def _scene(photographs: list[Path], size: int, sample: int) -> np.ndarray:
    return open_squeezed(photographs[sample], size, UNPACK.format(PLACES_FILES))

"""Do methods that need unbiased images or group labels do better than explanation distillation, which needs neither?

    pip install -e ".[data,rivals]"
    git clone https://github.com/facebookresearch/DomainBed
    PYTHONPATH=DomainBed python benchmarks/rivals.py --work FOLDER

The rivals are implemented by the authors of SpuCo, and IRM and VREx, which are left out without it, by those of
DomainBed. They get the same images as our student, the same architecture, the same number of epochs, and some get the
groups. A share of the training images is unbiased, which some rivals need to work at all. All networks are tested on
the tests of the benchmark, after their training. A training that `results.jsonl` has is not run again.
"""

from __future__ import annotations

import os
import platform
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from math import ceil
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TQDM_DISABLE"] = "1"

import click
import numpy as np
import torch
from report import once, processor, read_results, table
from sklearn.linear_model import LogisticRegression
from spuco.datasets import BaseSpuCoCompatibleDataset, GroupLabeledDatasetWrapper
from spuco.evaluate import Evaluator
from spuco.group_inference import EIIL, JTTInference, SpareInference
from spuco.last_layer_retrain import DFR
from spuco.robust_train import ERM, PGI, BaseRobustTrain, CustomSampleERM, GroupBalanceBatchERM, GroupDRO, SpareTrain
from spuco.utils import Trainer, set_seed
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Subset

from data import Dataset, Split, make_coloured_mnist, make_fashion_on_textures, make_spuco_mnist, open_dataset
from data.builders.spuco_mnist import DIFFICULTIES
from pipeline import Classifier, cache_explanations, load_classifier
from pipeline.device import as_input
from pipeline.networks.models import build_network
from trainer import train_student, train_teacher
from trainer.reproduction.profiles import ON_TEXTURES, PROFILES, Profile
from trainer.results.evaluation import group_scores, predict

CPU, TESTS = torch.device("cpu"), ("iid", "ood", "shift")
SCORES = (*TESTS, "worst group", "worst pair")
SHARES = (0.0, 0.01, 0.05)
OURS = "LRP distillation"
BATCH, RATE, DECAY, MOMENTUM = 128, 4e-3, 1e-2, 0.9  # SpuCo has 1e-3 for batches of 32 of its SpuCoMNIST
EIIL_STEPS, EIIL_RATE = 20_000, 0.01
INFERRING = 1  # epochs before groups are inferred
UPSAMPLED = 100  # times that JTT shows an image that it got wrong
DOMAINBED = "https://github.com/facebookresearch/DomainBed"
OF_DOMAINBED = ("IRM", "VREx")
Groups = Mapping[tuple[int, int], list[int]]  # rows by class and group
Networks = Mapping[str, nn.Module]  # "last", and "chosen" by unbiased validation


# --- datasets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A benchmark.

    Attributes:
        make: makes its dataset, with a share of unbiased training images.
        debias: the front of our teacher.
        teacher, store, student: options of our teacher, its store and our student. The rivals have the student's
            architecture and number of steps.
    """

    make: Callable[..., Any]
    debias: str
    teacher: Mapping[str, Any]
    store: Mapping[str, Any]
    student: Mapping[str, Any]

    @classmethod
    def of(cls, make: Callable[..., Any], profile: Profile) -> World:
        """Return the benchmark of a reproduction, by the row of LRP distillation."""
        store = {"draws": profile.draws, "epsilon_range": profile.epsilon_range}
        student = {"optimizer": "adam", "augment": (), **profile.student, "snapshots": 0}
        return cls(partial(make, **profile.data), profile.table.debias, profile.teacher, store, student)


def _spuco_mnist(out: Path, *, unbiased_share: float, difficulty: str, limit: int | None) -> None:
    """Make SpuCoMNIST; without a bias, a fifth of the images have the colour of their class."""
    make_spuco_mnist(out, difficulty=difficulty, correlation=max(1 - unbiased_share, 1 / 5), limit=limit)


def _our_defaults(difficulty: str) -> World:
    made = partial(_spuco_mnist, difficulty=difficulty)
    return World(made, "mask", {"arch": "small-cnn", "bias_free": True}, {}, {"arch": "small-cnn", "steps": 3000})


WORLDS = {
    "COLOURED MNIST": World.of(make_coloured_mnist, PROFILES["cpu"]),
    "Fashion-on-Textures": World.of(make_fashion_on_textures, ON_TEXTURES["cpu"]),
    **{f"SpuCoMNIST, {difficulty}": _our_defaults(difficulty) for difficulty in DIFFICULTIES},
}


class Images(BaseSpuCoCompatibleDataset):
    """A split as SpuCo takes it: images float32 (C, H, W) in [0, 1], labels, and the groups as what is spurious."""

    def __init__(self, split: Split, classes: int):
        super().__init__()
        self.data = as_input(torch.from_numpy(np.asarray(split.images[:])), CPU)
        self._labels = np.asarray(split.labels[:]).astype(int).tolist()
        self._spurious = _groups(split).tolist()
        self._num_classes = classes
        self._group_partition: dict[tuple[int, int], list[int]] = {}
        for row, group in enumerate(zip(self._labels, self._spurious, strict=True)):
            self._group_partition.setdefault(group, []).append(row)
        self._group_weights = {group: len(rows) / len(self.data) for group, rows in self._group_partition.items()}

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.data[row], self._labels[row]


class Network(nn.Module):
    """A network that may compute in bfloat16, with weights and logits in float32, as our students do.

    SpuCo takes the layers before the last one by the name ``backbone``.
    """

    def __init__(self, layers: nn.Sequential, precision: str):
        super().__init__()
        self.layers = layers
        self.half = precision == "bfloat16"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._through(self.layers, images)

    def backbone(self, images: torch.Tensor) -> torch.Tensor:
        return self._through(self.layers[:-1], images)

    def _through(self, layers: nn.Sequential, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(CPU.type, torch.bfloat16, enabled=self.half):
            return layers(images).float()


# --- rivals -----------------------------------------------------------------------------------------------------------


class Material:
    """What all rivals of one benchmark, one share and one seed are trained with.

    Attributes:
        train: the training images.
        unbiased: validation images without the bias.
        epochs: as many as come to the steps of our student.
    """

    def __init__(self, world: World, dataset: Dataset, unbiased: Dataset, seed: int, precision: str):
        self.arch, self.shape = world.student["arch"], dataset.split("train").image_shape
        self.seed, self.precision, classes = seed, precision, len(dataset.class_names)
        self.train = Images(dataset.split("train"), classes)
        self.unbiased = Images(unbiased.split("validation"), classes)
        self.epochs = max(1, round(world.student["steps"] * BATCH / len(self.train)))

    def build(self) -> Network:
        """Return a network, whose weights depend on the seed alone."""
        torch.manual_seed(self.seed)
        layers, _ = build_network(self.arch, self.train.num_classes, self.shape, free_of_biases=False)
        return Network(layers.to(memory_format=torch.channels_last), self.precision)  # type: ignore[call-overload]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY)

    def options(self, model: nn.Module) -> dict[str, Any]:
        return {
            "model": model,
            "optimizer": self.optimizer(model),
            "batch_size": BATCH,
            "num_epochs": self.epochs,
            "device": CPU,
        }

    @cached_property
    def first_logits(self) -> torch.Tensor:
        """The logits of a network that was trained for a short time, by which groups are inferred."""
        model = self.build()
        trainer = Trainer(self.train, model, BATCH, self.optimizer(model), device=CPU)
        trainer.train(INFERRING)
        return trainer.get_trainset_outputs().cpu()

    @cached_property
    def erm(self) -> Networks:
        """Networks that were trained by ERM."""
        return self.trained(ERM(trainset=self.train, **self.options(self.build())))

    @cached_property
    def inferred(self) -> Groups:
        """Two environments, inferred by EIIL."""
        return EIIL(self.first_logits, self.train.labels, EIIL_STEPS, EIIL_RATE, device=CPU).infer_groups()

    def trained(self, method: BaseRobustTrain) -> Networks:
        """Train; the network of the epoch that is best for the worst group of unbiased images is ``chosen``."""
        images = self.unbiased
        model = method.trainer.model
        method.val_evaluator = Evaluator(images, images.group_partition, images.group_weights, 512, model)
        method.train()
        return {"last": model, "chosen": method.best_model}


class Invariant(BaseRobustTrain):
    """An algorithm of DomainBed, with its own optimizer, trained in epochs as SpuCo's methods are.

    Of its two environments, one has the images with the group that is usual for their class, and one has the others.

    Raises:
        ValueError: all images have the usual group.
    """

    def __init__(self, name: str, of: Material):
        from domainbed import algorithms, hparams_registry

        super().__init__()
        options = hparams_registry.default_hparams(name, "ColoredMNIST")
        shape = tuple(of.train.data.shape[1:])
        self.algorithm = algorithms.get_algorithm_class(name)(shape, of.train.num_classes, 2, options)
        # in place of DomainBed's network
        self.algorithm.network = of.build()
        rates = {"lr": options["lr"], "weight_decay": options["weight_decay"]}
        self.algorithm.optimizer = torch.optim.Adam(self.algorithm.network.parameters(), **rates)
        self.trainer = SimpleNamespace(model=self.algorithm.network, name=name)
        self.num_epochs = of.epochs
        steps = ceil(len(of.train) / BATCH)
        self.environments = [self._batches(of.train, rows, steps) for rows in _environments(of.train.group_partition)]

    @staticmethod
    def _batches(images: Images, rows: list[int], steps: int) -> DataLoader[Any]:
        subset, size = Subset(images, rows), BATCH // 2
        sampler = RandomSampler(subset, replacement=True, num_samples=steps * size)
        return DataLoader(subset, size, sampler=sampler)

    def train_epoch(self, epoch: int) -> tuple[float, float]:
        """Train for as many steps as the other methods; accuracy and loss, which SpuCo logs, are not known."""
        self.trainer.model.train()
        for batches in zip(*self.environments, strict=True):
            self.algorithm.update(batches)
        return float("nan"), float("nan")


def _environments(groups: Groups) -> tuple[list[int], list[int]]:
    labels = {label for label, _ in groups}
    usual = {max((of for of in groups if of[0] == label), key=lambda of: len(groups[of])) for label in labels}
    biased = [row for of, rows in groups.items() if of in usual for row in rows]
    others = [row for of, rows in groups.items() if of not in usual for row in rows]
    if not others:
        raise ValueError("all training images have the bias, so there is no second environment")
    return biased, others


class OneVersusRest:
    """Logistic regression by class, as DFR takes scikit-learn's, which refuses more than two classes since 1.8."""

    def __init__(self, class_weight: Any = None, **options: Any):
        self.options = options

    def fit(self, features: np.ndarray, labels: np.ndarray) -> OneVersusRest:
        of_class = [LogisticRegression(**self.options).fit(features, labels == label) for label in np.unique(labels)]
        self.coef_ = np.concatenate([one.coef_ for one in of_class])
        self.intercept_ = np.concatenate([one.intercept_ for one in of_class])
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        return (features @ self.coef_.T + self.intercept_).argmax(1)


def _group_dro(of: Material, groups: Groups | None = None) -> Networks:
    trainset = GroupLabeledDatasetWrapper(of.train, of.train.group_partition if groups is None else groups)
    return of.trained(GroupDRO(trainset=trainset, **of.options(of.build())))


def _balanced(of: Material) -> Networks:
    partition = of.train.group_partition
    return of.trained(GroupBalanceBatchERM(trainset=of.train, group_partition=partition, **of.options(of.build())))


def _dfr(of: Material) -> Networks:
    """Train by ERM, and then the last layer by half of the unbiased images; the other half chooses its penalty."""
    model = deepcopy(of.erm["last"])
    rows = np.random.default_rng(of.seed).permutation(len(of.unbiased)).tolist()
    halves = [GroupLabeledDatasetWrapper(of.unbiased, of.unbiased.group_partition, rows[half::2]) for half in range(2)]
    dfr = DFR(halves[0], model, validation_set=halves[1], data_for_scaler=of.train, device=CPU)
    with mock.patch("spuco.last_layer_retrain.dfr.LogisticRegression", OneVersusRest):
        dfr.train()
    _, weight, bias, scaler = dfr.linear_model
    head = model.layers[-1]
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight / scaler.scale_))
        head.bias.copy_(torch.from_numpy(bias - weight @ (scaler.mean_ / scaler.scale_)))
    return {"chosen": model}


def _eiil(of: Material) -> Networks:
    return _group_dro(of, of.inferred)


def _pgi(of: Material) -> Networks:
    trainset = GroupLabeledDatasetWrapper(of.train, of.inferred)
    return of.trained(PGI(trainset=trainset, **of.options(of.build())))


def _invariant(name: str, of: Material) -> Networks:
    return of.trained(Invariant(name, of))


def _jtt(of: Material) -> Networks:
    groups = JTTInference(of.first_logits.argmax(1).tolist(), of.train.labels).infer_groups()
    rows = groups[0, 0] + groups[0, 1] * UPSAMPLED
    # an epoch of many more images would be an unequal comparison
    rows = random.sample(rows, len(of.train))
    return of.trained(CustomSampleERM(trainset=of.train, indices=rows, **of.options(of.build())))


def _spare(of: Material) -> Networks:
    inference = SpareInference(of.first_logits.softmax(1), of.train.labels, max_clusters=5, device=CPU)
    groups = inference.infer_groups()
    options = {"group_partition": groups, "sampling_powers": inference.sampling_powers, **of.options(of.build())}
    return of.trained(SpareTrain(trainset=of.train, **options))


@dataclass(frozen=True)
class Rival:
    """A method, and what it needs beside images and labels."""

    train: Callable[[Material], Networks]
    needs: str


RIVALS = {
    "ERM": Rival(attrgetter("erm"), "nothing"),
    "group-balanced ERM": Rival(_balanced, "groups"),
    "GroupDRO": Rival(_group_dro, "groups"),
    "DFR": Rival(_dfr, "groups"),
    **{name: Rival(partial(_invariant, name), "groups") for name in OF_DOMAINBED},
    "EIIL and GroupDRO": Rival(_eiil, "nothing"),
    "EIIL and PGI": Rival(_pgi, "nothing"),
    "JTT": Rival(_jtt, "nothing"),
    "SPARE": Rival(_spare, "nothing"),
}


def rival(name: str, of: Material, dataset: Dataset) -> dict[str, Any]:
    """Train a rival, and test its last network and the one that is best for the worst group of unbiased validation."""
    set_seed(of.seed)
    random.seed(of.seed)
    torch.manual_seed(of.seed)
    return {which: scores(Classifier(network).eval(), dataset) for which, network in RIVALS[name].train(of).items()}


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(folder: Path, world: World, dataset: Dataset, seed: int, precision: str, threads: int) -> dict[str, Any]:
    """Train our teacher, its store and our student."""
    teacher, cache, student = folder / "teacher", folder / "cache.zarr", folder / f"student-{seed}-{precision}"
    if not (teacher / "result.json").exists():
        train_teacher(dataset.path, teacher, debias=world.debias, threads=threads, **world.teacher)
    cache_explanations(dataset.path, teacher, cache, threads=threads, **world.store)
    how = {**world.student, "seed": seed, "precision": precision, "threads": threads}
    train_student(dataset.path, cache, student, **how)
    return {"last": scores(load_classifier(student)[0].eval(), dataset)}


# --- tables -----------------------------------------------------------------------------------------------------------


def _groups(split: Split) -> np.ndarray:
    assert split.groups is not None
    return np.asarray(split.groups[:]).astype(int)


def scores(model: Classifier, dataset: Dataset) -> dict[str, float]:
    """Return the accuracy on each test in %, and the worst of a group of a test.

    *Worst pair* is the worst of the pairs of a class and a group on OOD: the worst group of SpuCo's evaluation.
    """
    found = {}
    for test in TESTS:
        split = dataset.split(test)
        labels = np.asarray(split.labels[:]).astype(int)
        found[test] = group_scores(predict(model, split, CPU) == labels, labels, split, dataset)
    return {
        **{test: of_test["accuracy"] for test, of_test in found.items()},
        "worst group": min(of_test["worst_group"]["accuracy"] for of_test in found.values()),
        "worst pair": found["ood"]["worst_class_in_group"]["accuracy"],
    }


def _cells(rows: Sequence[Mapping[str, Any]], which: str) -> list[str]:
    cells = []
    for score in SCORES:
        values = [row[which][score] for row in rows]
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.1f}{spread}")
    return cells


def lines(results: Sequence[Mapping[str, Any]], world: World) -> list[list[str]]:
    """Write a line for each method, and one more for a rival whose weights unbiased validation chooses."""
    of_ours = "a teacher, masks" if world.debias == "mask" else "a teacher"
    written = []
    for name in (OURS, *RIVALS):
        needs = of_ours if name == OURS else RIVALS[name].needs
        of_method = [row for row in results if row["method"] == name]
        more = {"last": needs, "chosen": f"{needs}, unbiased validation".removeprefix("nothing, ")}
        for which, of_row in more.items():
            if rows := [row for row in of_method if which in row]:
                written.append([name, of_row, f"{len(rows)}", *_cells(rows, which)])
        if of_method and all("error" in row for row in of_method):
            written.append([name, needs, "0", *["–"] * len(SCORES)])
    return written


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for all files.")
@click.option("--world", "worlds", multiple=True, type=click.Choice([*WORLDS]), help="Benchmark. Default: all.")
@click.option("--share", "shares", multiple=True, type=float, help="Unbiased share of the training images. Repeatable.")
@click.option("--method", "methods", multiple=True, type=click.Choice([OURS, *RIVALS]), help="Method. Default: all.")
@click.option("--precision", default="float32", show_default=True, help="Arithmetic of all networks but the teachers.")
@click.option("--seeds", default=1, show_default=True, help="Trainings of each method.")
@click.option("--fashion-mnist", type=click.Path(path_type=Path), help="Its folder. Default: the Debian package's.")
@click.option("--limit", type=int, help="Maximum number of images in each split. Default: all.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(
    work: Path,
    worlds: Sequence[str],
    shares: Sequence[float],
    methods: Sequence[str],
    precision: str,
    seeds: int,
    fashion_mnist: Path | None,
    limit: int | None,
    threads: int,
) -> None:
    """Train each method, and print a table for each benchmark and share."""
    torch.set_num_threads(threads)
    known = [OURS, *RIVALS]
    if find_spec("domainbed") is None:
        if missing := sorted({*methods} & {*OF_DOMAINBED}):
            names = " and ".join(missing)
            raise click.UsageError(f"{names}: no package domainbed. Put a clone of {DOMAINBED} on PYTHONPATH.")
        known = [name for name in known if name not in OF_DOMAINBED]
    work.mkdir(parents=True, exist_ok=True)
    file = work / "results.jsonl"
    for world in worlds or WORLDS:

        def dataset(share: float, world: str = world) -> Dataset:
            path = work / world.replace(" ", "-").replace(",", "") / f"{share:g}" / "data.zarr"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                files = {"fashion_mnist": fashion_mnist} if world == "Fashion-on-Textures" else {}
                WORLDS[world].make(path, unbiased_share=share, limit=limit, **files)
            return open_dataset(path)

        @lru_cache(maxsize=1)  # the images of several shares take gigabytes
        def material(share: float, seed: int, world: str = world) -> Material:
            return Material(WORLDS[world], dataset(share), dataset(1.0), seed, precision)

        def result(name: str, share: float, seed: int, world: str = world) -> dict[str, Any]:
            given = dataset(share)
            if name == OURS:
                return ours(Path(given.path).parent, WORLDS[world], given, seed, precision, threads)
            try:
                return rival(name, material(share, seed), given)
            except (AssertionError, IndexError, ValueError) as error:  # SpuCo's, where it finds no groups
                return {"error": str(error)}

        for seed in range(seeds):
            for share in shares or SHARES:
                for name in methods or known:
                    key = {"world": world, "share": share, "method": name, "precision": precision, "seed": seed}
                    once(file, key, partial(result, name, share, seed))
    results = read_results(file)
    print(
        f"PyTorch {torch.__version__}, SpuCo {version('spuco')}, Python {platform.python_version()}, {processor(CPU)}"
    )
    header = ["method", "needs", "seeds", "IID", "OOD", "shift", "worst group", "worst pair"]
    for world in WORLDS:
        for share, how in sorted({(row["share"], row["precision"]) for row in results if row["world"] == world}):
            if written := lines(read_results(file, world=world, share=share, precision=how), WORLDS[world]):
                print(
                    f"\n{world}, {100 * share:g} % of the training images unbiased, {how}\n\n{table(header, written)}"
                )


if __name__ == "__main__":
    # SpuCo's loaders start four processes each, which is slower than none for images in memory
    def loader(*arguments: Any, **options: Any) -> DataLoader[Any]:
        return DataLoader(*arguments, **{**options, "num_workers": 0, "pin_memory": False})

    warnings.simplefilter("ignore", FutureWarning)  # of scikit-learn, as DFR calls it
    with ExitStack() as stack:
        for module in ("utils.trainer", "utils.misc", "evaluate.evaluator", "last_layer_retrain.dfr"):
            stack.enter_context(mock.patch(f"spuco.{module}.DataLoader", loader))
        main()

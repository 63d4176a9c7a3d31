"""What the methods promise: each is its formula, learns from the stores that it says, and names what a store lacks."""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from test_training import metrics
from torch import nn

from cli import main
from data import DatasetWriter, open_dataset
from pipeline import EXPLAINERS, Classifier, Forward, cache_explanations, explain, load_classifier
from pipeline.device import as_input, as_mask
from teacher_cache import CacheError, open_cache
from trainer import DistillationLoss, TrainingError, heatmap_loss, train_student, train_teacher
from trainer.loop.methods import METHODS, _completed, method_of, missing_from, moves, needs, parse_terms
from trainer.loop.repainting import repaint
from trainer.loop.step import losses_of, on_device, weighted
from trainer.settings import Settings
from trainer.stream.stream import explained_source, read_block

WITHOUT_STORE = ["erm", "group-dro", "rrr", "isnet"]
WITH_STORE = [name for name in METHODS if name not in (*WITHOUT_STORE, "repainted-output")]
WITH_MAPS = [name for name, method in METHODS.items() if method.explainers]
STORED = ("teacher_logits", "features")  # what a store can have besides maps
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def stores(dataset, teacher, tmp_path_factory) -> dict[str, Path]:
    """A store of the maps of each explainer that a method is proposed for; that of flex has features too."""
    folder = tmp_path_factory.mktemp("stores")
    paths = {}
    for explainer in [METHODS[name].explainers[0] for name in WITH_MAPS]:
        paths[explainer] = folder / explainer
        cache_explanations(dataset, teacher, folder / explainer, explainer=explainer, features=explainer == "flex")
    return paths


# how they are asked for


def test_one_method_or_a_weighted_sum_is_asked_for_and_lrp_unless_it_is_said():
    assert parse_terms(None, None) == {"lrp": 1.0}
    assert parse_terms("output", None) == {"output": 1.0}
    assert set(parse_terms("isnet", None)) == {"erm", "isnet"}
    assert parse_terms(None, "features") == {"features": 1.0}
    assert parse_terms(None, " lrp = 1, features=0.1 ,output=1e-3,erm") == {
        "lrp": 1.0,
        "features": 0.1,
        "output": 1e-3,
        "erm": 1.0,
    }


@given(
    st.dictionaries(
        st.sampled_from(["input-gradient", "features", "output", "erm"]),
        st.floats(min_value=1e-30, max_value=1e30),
        min_size=1,
    )
)
def test_what_is_written_of_a_sum_is_read_as_that_sum(terms):
    assert parse_terms(None, ",".join(f"{name}={weight!r}" for name, weight in terms.items())) == terms


@pytest.mark.parametrize(
    ("method", "loss", "words"),
    [
        ("lrp", "output=1", "give method='lrp' or loss='output=1', not both: method='lrp' is loss='lrp=1'"),
        (None, "lrp=1,cam=1", "unknown method 'cam': choose one of .*lrp"),
        ("cam", None, "unknown method 'cam'"),
        (None, "", "unknown method ''"),
        (None, "lrp=1,", "unknown method ''"),
        (None, "lrp=1,output=2,lrp=3", "has a method twice"),
        (None, "lrp=1,output=0", "loss='output=0': '0' is not a weight. Give a positive number"),
        (None, "lrp=-1", "'-1' is not a weight"),
        (None, "lrp=x", "'x' is not a weight"),
        (None, "lrp=", "'' is not a weight"),
        (None, "lrp=nan", "'nan' is not a weight"),
        (None, "lrp=inf", "'inf' is not a weight"),
        (None, "lrp=1=2", "'1=2' is not a weight"),
        ("rrr", "output=1", "method='rrr' is loss='erm=1,rrr=0.01'"),
        (None, "lrp=1,grad-cam=1", "lrp and grad-cam each explain the student"),
    ],
)
def test_a_sum_that_cannot_be_right_is_refused_with_what_is_wrong(method, loss, words):
    with pytest.raises(TrainingError, match=words):
        parse_terms(method, loss)


def test_every_explainer_has_the_one_method_that_matches_its_maps_as_they_are():
    for explainer in EXPLAINERS:
        of_maps_alone = [name for name in METHODS if METHODS[name].needs == ("heatmaps",)]
        assert [name for name in of_maps_alone if explainer in METHODS[name].explainers] == [method_of(explainer)]
    assert set(EXPLAINERS) == {name for method in METHODS.values() for name in method.explainers}


def test_a_sum_needs_what_any_of_its_methods_needs_and_is_moved_as_all_of_them_can_be():
    assert needs({"lrp": 1, "output": 1, "features": 1}) == ("heatmaps", "teacher_logits", "features")
    assert moves({"lrp": 1, "erm": 1}) == ("flip", "shift", "crop", "background")
    assert moves({"input-gradient": 1, "erm": 1}) == ("flip", "shift", "background")
    assert moves({"lrp": 1, "output": 1}) == ("background",)


@pytest.mark.parametrize(
    ("explainer", "stored"),
    [(None, ()), ("attention", ("teacher_logits",)), ("flex", ("teacher_logits",)), ("gamma", STORED)],
)
@pytest.mark.parametrize("loss", [*WITH_STORE, "lrp,features", "attention,features,output", "features,output"])
def test_a_store_made_as_is_said_lacks_nothing_and_one_that_has_all_is_not_complained_of(loss, explainer, stored):
    terms = parse_terms(None, loss)
    options = missing_from(terms, explainer, stored)
    made = options.get("explainer", "flex" if options else explainer)
    has = STORED if options.get("features") else stored
    maps = [name for name in terms if METHODS[name].explainers]
    complete = all(explainer in METHODS[name].explainers for name in maps) and (
        "features" not in terms or "features" in stored
    )
    if explainer is None and not options:  # any store does
        assert terms == {"output": 1.0}
        return
    assert bool(options) == (not complete)
    assert made in EXPLAINERS
    assert missing_from(terms, made, has) == {}


# what they are


class Tiny(nn.Module):
    """Two layers and biases, on images of 10×12; what is within can be computed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d((2, 3))
        self.flatten = nn.Flatten()
        self.head = nn.Linear(24, 5)

    def forward(self, images):
        return self.head(self.flatten(self.pool(self.relu(self.conv(images)))))


def by_hand(name, model, images, target):
    """The loss of each sample by the formula of the paper, one sample after another, by ordinary autograd."""
    network, losses = model.network, []
    for i in range(len(images)):
        x = images[i : i + 1].clone().requires_grad_()
        feature_maps = network.pool(network.relu(network.conv(x)))
        features = feature_maps.flatten()
        logits = network.head.weight @ features + network.head.bias
        t = int(target["target_class"][i])
        if name in ("erm", "group-dro"):
            exponentials = [math.exp(value) for value in logits.tolist()]
            losses.append(-math.log(exponentials[int(target["labels"][i])] / sum(exponentials)))
            losses[-1] *= target["group_weights"][i].item() if name == "group-dro" else 1
        elif name == "rrr":
            (gradient,) = torch.autograd.grad(logits.log_softmax(0).sum(), x)
            pixels = [(h, w) for h in range(10) for w in range(12) if not target["masks"][i, 0, h, w]]
            losses.append(sum(float(gradient[0, c, h, w]) ** 2 for h, w in pixels for c in range(3)))
        elif name == "isnet":
            chosen = target["chosen"][i : i + 1]
            maps = explain(model, images[i : i + 1], chosen, 0.01)[1][0].abs()
            losses.append(isnet_loss(maps.tolist(), target["masks"][i, 0].tolist()))
        elif name in ("output", "repainted-output"):
            ours, theirs = (
                [math.exp(value / 3) for value in row.tolist()] for row in (logits, target["teacher_logits"][i])
            )
            q, p = ([value / sum(row) for value in row] for row in (ours, theirs))
            losses.append(9 * sum(b * math.log(b / a) for a, b in zip(q, p, strict=True)))
            losses[-1] *= target["repainted"][i].item() if name == "repainted-output" else 1
        elif name == "features":
            pairs = zip(features.tolist(), target["features"][i].tolist(), strict=True)
            losses.append(sum((a - b) ** 2 for a, b in pairs) / len(features))
        else:
            if name in ("lrp", "complete-lrp"):
                _, own = explain(
                    model, images[i : i + 1], target["target_class"][i : i + 1], target["epsilon"][i].item()
                )
            elif name in ("gradient-x-input", "input-gradient"):
                (own,) = torch.autograd.grad(logits[t], x)
                own = own * x if name == "gradient-x-input" else own
            elif name == "hidden-lrp":  # no ReLU stands behind these feature maps
                (gradient,) = torch.autograd.grad(logits[t], feature_maps)
                own = sum(gradient[:, k] * feature_maps[:, k] for k in range(4))[:, None]
            elif name == "grad-cam":
                (gradient,) = torch.autograd.grad(logits[t], feature_maps)
                own = sum(gradient[:, k].mean() * feature_maps[:, k] for k in range(4))[:, None]
            else:
                own = sum(feature_maps[:, k] ** 2 for k in range(4))[:, None]
            pair = [own[0].detach(), target["heatmaps"][i]]
            if name == "complete-lrp":
                for which, logit in enumerate((logits[t].item(), target["teacher_logits"][i, t].item())):
                    values = pair[which].flatten().tolist()
                    share = (logit - sum(values)) / sum(abs(value) for value in values)
                    pair[which] = torch.tensor(
                        [value + abs(value) * share for value in values], dtype=torch.float64
                    ).view(pair[which].shape)
            losses.append(oracles.heatmap_loss(*pair, "l1"))
    return losses


def isnet_loss(maps, mask):
    """Of one sample's |relevance| [c][h][w]: Bassi et al., Nature Communications 2024, and Faster ISNet's last term."""
    inside = [row[w] for channel in maps for row, m in zip(channel, mask, strict=True) for w in range(12) if m[w]]
    mean, background = sum(inside) / len(inside), 0.0
    for channel in maps:
        values = [0.0 if m[w] else row[w] / mean for row, m in zip(channel, mask, strict=True) for w in range(12)]
        weights = [0.9**rank for rank in range(len(values))]
        pairs = zip(weights, sorted(values, reverse=True), strict=True)
        pooled = sum(weight * value for weight, value in pairs) / sum(weights)
        background -= math.log(1 - pooled / (pooled + 1)) / len(maps)
    total = sum(inside)
    little = (min(total, 1.0) - 1) ** 2
    much = 1 + abs(total - 26) if total > 26 else (max(total, 25.0) - 25) ** 2
    return background + little + much


@pytest.mark.parametrize("size", [0.01, 1.0, 3.0, 30.0, 300.0])
def test_isnet_asks_for_a_natural_amount_of_relevance_inside(size):
    """Each branch of the foreground loss, by maps of any size."""
    torch.manual_seed(0)
    masks = torch.zeros(2, 1, 10, 12, dtype=torch.float64)
    masks[:, :, 2:7, 3:9] = 1
    maps = torch.randn(2, 3, 10, 12, dtype=torch.float64)
    maps *= size / (maps * masks).abs().sum((1, 2, 3), keepdim=True)

    class Explained:
        logits = torch.zeros(2, 5, dtype=torch.float64)

        def maps(self, target_class, epsilon, create_graph):
            return maps

    found = METHODS["isnet"].loss(Explained(), {"masks": masks}, heatmap_loss)
    expected = [isnet_loss(maps[i].abs().tolist(), masks[i, 0].tolist()) for i in range(2)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@every_method
def test_the_loss_of_each_method_is_its_formula_written_as_loops(name):
    torch.manual_seed(0)
    model = Classifier(Tiny().double())
    images = torch.rand(6, 3, 10, 12, dtype=torch.float64)
    explainer = METHODS[name].explainers[0] if METHODS[name].explainers else METHODS[name].explains
    masks = torch.zeros(6, 1, 10, 12, dtype=torch.float64)
    masks[:, :, 3:8, 2:7] = 1
    shape = (1, 2, 3) if name in ("grad-cam", "attention", "hidden-lrp") else (3, 10, 12)
    target = {
        "target_class": torch.tensor([0, 1, 2, 3, 4, 0]),
        "epsilon": torch.tensor([0.01, 0.1, 1, 0.02, 0.5, 0.3], dtype=torch.float64),
        "labels": torch.tensor([4, 3, 2, 1, 0, 2]),
        "teacher_logits": 4 * torch.randn(6, 5, dtype=torch.float64),
        "features": torch.rand(6, 24, dtype=torch.float64),
        "heatmaps": torch.randn(6, *shape, dtype=torch.float64),
        "masks": masks,
        "group_weights": torch.rand(6, dtype=torch.float64),
        "repainted": torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64),
    }
    given = ("target_class", "epsilon", *(("repainted",) if name == "repainted-output" else ()))
    needed = {key: target[key] for key in (*given, *METHODS[name].needs)}  # and nothing else
    torch.manual_seed(1)
    found = METHODS[name].loss(Forward(model, images, explainer), needed, heatmap_loss)
    torch.manual_seed(1)
    target["chosen"] = torch.randint(5, (6,))
    assert found.shape == (6,)
    assert found.tolist() == pytest.approx(by_hand(name, model, images, target), rel=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e-20, 1e-18, 1e-10])
def test_a_completed_map_of_zeros_or_almost_zeros_has_a_finite_loss_and_gradient(scale):
    torch.manual_seed(0)
    maps = (scale * torch.randn(2, 3, 16, 16)).requires_grad_()
    logits = torch.tensor([7.0, -5.0]).requires_grad_()
    heatmap_loss(_completed(maps, logits), torch.randn(2, 3, 16, 16)).mean().backward()
    assert torch.isfinite(maps.grad).all()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(_completed(maps, logits)).all()


def test_a_completed_map_is_bit_for_bit_its_formula_where_it_is_not_zero():
    torch.manual_seed(0)
    maps, logits = torch.randn(4, 3, 8, 8) * torch.tensor([1e3, 1.0, 1e-10, 1e-25]).view(-1, 1, 1, 1), torch.randn(4)
    share = (logits - maps.sum((1, 2, 3))) / maps.abs().sum((1, 2, 3))
    assert torch.equal(_completed(maps, logits), maps + maps.abs() * share.view(-1, 1, 1, 1))


class _BehindClosedReLUs(nn.Module):
    """Of a black image all features are 0, and so is its map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x) - 0.2).mean((2, 3)))


@pytest.mark.parametrize("name", ["lrp", "complete-lrp"])
def test_a_student_whose_map_of_one_image_is_zero_has_a_finite_gradient(name):
    torch.manual_seed(0)
    network, images = _BehindClosedReLUs(), torch.rand(2, 3, 16, 16)
    images[1] = 0
    target = {"target_class": torch.tensor([0, 1]), "epsilon": torch.tensor([0.1, 0.1])}
    target |= {"heatmaps": torch.randn(2, 3, 16, 16), "teacher_logits": torch.randn(2, 2)}
    METHODS[name].loss(Forward(network, images, "flex"), target, heatmap_loss).mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_a_completed_map_sums_to_the_logit_whatever_it_was_pooled_by_and_one_of_zeros_stays():
    torch.manual_seed(0)
    maps, logits = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    maps[3] = 0
    for pooled in (1, 4):
        found = _completed(maps, logits, pooled)
        torch.testing.assert_close(pooled * found[:3].sum((1, 2, 3)), logits[:3])
        assert not found[3].any()
    assert torch.equal(_completed(maps[:3], maps[:3].sum((1, 2, 3))), maps[:3])


def gradients(teacher, dataset, store, loss) -> list[torch.Tensor]:
    """Of the summed loss of some samples, with respect to the weights of the teacher as it is saved."""
    model, _ = load_classifier(teacher)
    model.double()
    terms = parse_terms(None, loss)
    settings = Settings(loss=terms, steps=1, precision="float64")
    opened = open_cache(store)
    source = explained_source(open_dataset(dataset).split("train"), opened, needs(terms))
    block = {name: values[:4] for name, values in read_block(source, 0, 0).items()}
    shown = on_device(block, opened.info, settings, torch.device("cpu"))
    shown["images"] = shown["images"].flip(-1)  # else the teacher's own maps cost it nothing
    weighted(losses_of(model, shown, opened.info, settings), terms).sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def test_the_gradient_of_a_sum_is_the_weighted_sum_of_the_gradients(dataset, teacher, stores):
    one, double, other, both = (
        gradients(teacher, dataset, stores["flex"], loss) for loss in ("lrp=1", "lrp=2", "output=1", "lrp=2,output=0.5")
    )
    assert max(g.abs().max() for g in one) > 1e-6
    assert max(g.abs().max() for g in other) > 1e-6
    for a, b, c, d in zip(one, double, other, both, strict=True):
        torch.testing.assert_close(b, 2 * a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(d, 2 * a + 0.5 * c, rtol=1e-9, atol=1e-12)


def test_the_metrics_have_each_term_and_their_weighted_sum(dataset, stores, tmp_path):
    loss = "lrp=2,features=0.1,output=0.5,erm=1"
    train_student(dataset, stores["flex"], tmp_path / "s", loss=loss, steps=2, batch_size=32, log_steps=1)
    lines = metrics(tmp_path / "s")
    assert len(lines) == 2
    for line in lines:
        assert {key for key in line if key.startswith("loss_")} == {
            "loss_lrp",
            "loss_features",
            "loss_output",
            "loss_erm",
        }
        total = sum(weight * line[f"loss_{name}"] for name, weight in parse_terms(None, loss).items())
        assert line["loss"] == pytest.approx(total, rel=1e-5)


# what they learn from


def falls(path: Path) -> bool:
    losses = [line["loss"] for line in metrics(path)]
    return sum(losses[-3:]) < 0.97 * sum(losses[:3])


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


LEARN = [
    "--steps",
    15,
    "--batch-size",
    32,
    "--log-steps",
    1,
    "--schedule",
    "constant",
    "--optimizer",
    "adam",
    "--lr",
    2e-3,
]


@pytest.mark.parametrize("given", ["no store", "another store"])
@pytest.mark.parametrize("name", WITH_STORE)
def test_what_a_store_lacks_is_said_with_the_command_of_one_from_which_the_student_learns(
    dataset, teacher, stores, tmp_path, name, given
):
    student = ["train-student", "--data", dataset, "--out", tmp_path / "s", "--method", name, *LEARN]
    another = (
        [] if given == "no store" else ["--cache", stores["gradient-x-input" if name == "attention" else "attention"]]
    )
    if name == "output" and another:  # outputs are in every store
        result = invoke(*student, *another)
        assert result.exit_code == 0, result.output
        assert falls(tmp_path / "s")
        return
    result = invoke(*student, *another)
    assert result.exit_code == 1
    assert not (tmp_path / "s").exists()
    (command,) = re.findall(r"python cli\.py (cache-explanations .* NEW\.zarr)$", result.output.strip())
    real = {"TEACHER": str(teacher), "NEW.zarr": str(tmp_path / "c.zarr")}
    result = invoke(*[real.get(word, word) for word in shlex.split(command)], "--draws", 1)
    assert result.exit_code == 0, result.output
    result = invoke(*student, "--cache", tmp_path / "c.zarr")
    assert result.exit_code == 0, result.output
    assert falls(tmp_path / "s")


def test_what_a_validation_store_lacks_is_said_with_the_command_of_one_of_that_split(
    dataset, stores, validation_cache, tmp_path
):
    with pytest.raises(CacheError, match=r"split='validation', explainer='flex', features=True, out=NEW\.zarr"):
        train_student(dataset, stores["flex"], tmp_path / "s", method="features", validation_cache=validation_cache)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("method", ["rrr", "isnet"])
def test_methods_that_look_at_the_background_say_that_they_need_masks(dataset, tmp_path, method):
    with pytest.raises(TrainingError, match=r"needs 'masks' in the train split of .*, which has none"):
        train_student(dataset, None, tmp_path / "s", method=method)
    assert not (tmp_path / "s").exists()


def test_a_masked_target_is_the_teachers_map_on_the_object_alone(masked_dataset, teacher, tmp_path):
    cache_explanations(masked_dataset, teacher, tmp_path / "c", draws=1, resolution=2)
    opened, split = open_cache(tmp_path / "c"), open_dataset(masked_dataset).split("train")
    block = read_block(explained_source(split, opened, ("heatmaps", "masks")), 0, 0)
    block["masks"][:, :, :, :14] = 0  # so that the object's left half is background
    plain, masked = (
        on_device(block, opened.info, Settings(loss={"lrp": 1.0}, steps=1, mask_target=given), torch.device("cpu"))
        for given in (False, True)
    )
    share = torch.nn.functional.avg_pool2d((block["masks"] > 0).float(), 2)
    torch.testing.assert_close(masked["heatmaps"], plain["heatmaps"] * share)
    assert not masked["heatmaps"][..., :7].any()
    assert masked["heatmaps"].any()
    train_student(masked_dataset, tmp_path / "c", tmp_path / "s", mask_target=True, steps=2, batch_size=32)
    assert json.loads((tmp_path / "s" / "config.json").read_text())["training"]["mask_target"]


def test_a_target_that_cannot_be_masked_is_refused(dataset, stores, tmp_path):
    for method, words in (("lrp", "mask_target=True needs 'masks' in the train split"), ("output", "matches none")):
        with pytest.raises(TrainingError, match=words):
            train_student(dataset, stores["flex"], tmp_path / "s", method=method, mask_target=True)
        assert not (tmp_path / "s").exists()


def test_another_background_is_shown_to_every_method_and_what_it_matches_stays(masked_dataset, tmp_path):
    train_teacher(masked_dataset, tmp_path / "t", debias="mask", steps=2, batch_size=32)
    cache_explanations(masked_dataset, tmp_path / "t", tmp_path / "c", draws=1, features=True)
    opened, split = open_cache(tmp_path / "c"), open_dataset(masked_dataset).split("train")
    needed = ("heatmaps", "masks", "teacher_logits", "features", "labels")
    block = read_block(explained_source(split, opened, needed), 0, 0)
    settings = Settings(loss={"lrp": 1.0}, steps=1, augment=("background",))
    where = {"seed": 0, "step": 3, "first": 0, "of": len(block["images"])}
    given, shown = (on_device(block, opened.info, settings, torch.device("cpu"), moved) for moved in (None, where))
    images = shown.pop("images")
    assert torch.equal(images, repaint(given["images"], given["masks"], **where))
    another = (images != given.pop("images")).flatten(1).any(1)
    assert torch.equal(shown.pop("repainted"), another.to(images.dtype))
    assert another.any()
    assert not another.all()
    assert shown.keys() == given.keys() >= set(needed)
    assert all(torch.equal(shown[name], given[name]) for name in shown)
    teacher, _ = load_classifier(tmp_path / "t")
    logits = teacher(images, shown["masks"])  # it sees no background, so that none changes what it says
    torch.testing.assert_close(logits, shown["teacher_logits"], rtol=1e-3, atol=1e-3)
    for loss in ("lrp=1,output=1,features=1", "erm", "erm=1,rrr=1"):
        cache = None if "erm" in loss else tmp_path / "c"
        train_student(
            masked_dataset,
            cache,
            tmp_path / loss,
            loss=loss,
            augment=("background", "flip")[: 1 + ("erm" in loss)],
            steps=2,
            batch_size=32,
        )


def test_another_background_needs_masks_and_a_teacher_that_sees_none(
    dataset, masked_dataset, stores, teacher, tmp_path
):
    with pytest.raises(TrainingError, match="augment='background' needs 'masks' in the train split"):
        train_student(dataset, None, tmp_path / "s", method="erm", augment=("background",))
    with pytest.raises(TrainingError, match="augment='background' needs 'masks' in the train split"):
        train_teacher(dataset, tmp_path / "s", augment=("background",))
    cache_explanations(masked_dataset, teacher, tmp_path / "c", draws=1)
    with pytest.raises(TrainingError, match=r"this one does \(debias='grayscale'\)"):
        train_student(masked_dataset, tmp_path / "c", tmp_path / "s", augment=("background",))
    assert not (tmp_path / "s").exists()
    train_student(
        masked_dataset,
        tmp_path / "c",
        tmp_path / "s",
        augment=("background",),
        mask_target=True,
        steps=2,
        batch_size=32,
    )


def test_other_backgrounds_are_shown_unless_they_could_change_what_the_teacher_says(
    dataset, masked_dataset, stores, teacher, tmp_path, caplog
):
    train_teacher(masked_dataset, tmp_path / "t", debias="mask", steps=2, batch_size=32)
    cache_explanations(masked_dataset, tmp_path / "t", tmp_path / "of-mask", draws=1, features=True)
    cache_explanations(masked_dataset, teacher, tmp_path / "of-grayscale", draws=1)

    def trained(data, cache, **options):
        out = tmp_path / f"s{len([*tmp_path.iterdir()])}"
        train_student(data, cache, out, steps=1, batch_size=32, **options)
        return json.loads((out / "config.json").read_text())["training"]

    def augmented(*args, **options):
        return trained(*args, **options)["augment"]

    with caplog.at_level(logging.INFO, logger="trainer"):
        assert augmented(masked_dataset, tmp_path / "of-mask") == ["background"]
    assert "a quarter to half of the images get another background" in caplog.text
    assert "augment='none' keeps the images as they are" in caplog.text
    assert "before random backgrounds, the student says what its teacher says on" in caplog.text
    assert augmented(masked_dataset, tmp_path / "of-mask", method="output") == ["background"]
    assert augmented(masked_dataset, tmp_path / "of-mask", augment=("none",)) == []
    assert augmented(masked_dataset, tmp_path / "of-mask", augment=()) == []
    assert augmented(masked_dataset, tmp_path / "of-mask", augment=("flip",)) == ["flip"]
    assert augmented(masked_dataset, tmp_path / "of-grayscale") == []
    assert augmented(masked_dataset, None, method="rrr") == []

    with pytest.raises(TrainingError, match="images with other backgrounds: give augment='background'"):
        trained(masked_dataset, tmp_path / "of-mask", loss="lrp=1,repainted-output=1", augment=("none",))
    loss = "lrp=1,repainted-output=1"
    with pytest.raises(TrainingError, match=r"method='repainted-output' needs a teacher that does not see the backgr"):
        trained(masked_dataset, tmp_path / "of-grayscale", loss=loss, augment=("background",), mask_target=True)
    with pytest.raises(TrainingError, match="images with other backgrounds: give augment='background'"):
        trained(masked_dataset, tmp_path / "of-grayscale", loss=loss)
    with pytest.raises(TrainingError, match="other backgrounds: give augment='background'"):
        DistillationLoss(tmp_path / "of-mask", loss="lrp=1,repainted-output=1")
    DistillationLoss(tmp_path / "of-mask", loss="lrp=1,repainted-output=1", augment=("background",))

    def learnt(**options):
        return trained(masked_dataset, tmp_path / "of-mask", **options)["loss"]

    assert learnt() == {"lrp": 1, "repainted-output": 0.4}
    assert learnt(augment=("background",)) == {"lrp": 1, "repainted-output": 0.4}
    assert learnt(augment=("none",)) == learnt(method="lrp") == {"lrp": 1}
    assert learnt(augment=("background",), loss="lrp=1") == {"lrp": 1}
    assert learnt(loss="lrp=1,output=0.1") == {"lrp": 1, "output": 0.1}
    assert trained(masked_dataset, tmp_path / "of-grayscale")["loss"] == {"lrp": 1}
    assert augmented(dataset, stores["flex"]) == []
    with pytest.raises(TrainingError, match="augment='none,flip' has 'none' beside others"):
        augmented(masked_dataset, tmp_path / "of-mask", augment=("none", "flip"))


def test_a_student_has_its_teachers_architecture_if_that_is_our_own(dataset, stores, tmp_path):
    train_teacher(dataset, tmp_path / "t", arch="small-resnet", steps=1, batch_size=32)
    cache_explanations(dataset, tmp_path / "t", tmp_path / "of-resnet", draws=1)
    train_teacher(dataset, tmp_path / "u", arch="resnet18", steps=1, batch_size=8)
    cache_explanations(dataset, tmp_path / "u", tmp_path / "of-resnet18", draws=1)

    def network(cache, **options):
        out = tmp_path / f"s{len([*tmp_path.iterdir()])}"
        train_student(dataset, cache, out, steps=1, batch_size=32, **options)
        config = json.loads((out / "config.json").read_text())
        return config["arch"], config["training"]["optimizer"], config["training"]["lr"]

    assert network(tmp_path / "of-resnet") == ("small-resnet", "muon", 1e-2)
    assert network(tmp_path / "of-resnet", arch="small-cnn") == ("small-cnn", "muon", 1e-2)
    assert network(tmp_path / "of-resnet18") == ("small-cnn", "muon", 1e-2)
    assert network(stores["flex"], optimizer="adam") == ("small-cnn", "adam", 4e-3)
    assert network(None, method="erm") == ("small-cnn", "adam", 4e-3)


def relevance_outside(dataset, run) -> float:
    """The share of |relevance| that is outside the masks of a test split, for the true class."""
    model, _ = load_classifier(run)
    split = open_dataset(dataset).split("iid")
    images, masks = as_input(split.images[:200], torch.device("cpu")), as_mask(split.masks[:200], torch.device("cpu"))
    _, maps = explain(model, images, torch.as_tensor(split.labels[:200]), 0.01)
    return float((maps.abs() * (1 - masks)).sum() / maps.abs().sum())


@pytest.mark.parametrize("method", ["rrr", "isnet"])
def test_rivals_take_their_relevance_off_the_background(dataset, tmp_path, method):
    """Digits on noise in the left half and all in one corner patch that tells the class: the patch is background."""
    rng = np.random.default_rng(0)
    given = open_dataset(dataset)
    path = tmp_path / "data.zarr"
    with DatasetWriter(path) as writer:
        for name in ("train", "iid"):
            split = given.split(name)
            digits, labels = split.images[:512], split.labels[:512]
            masks = np.where(digits.any(1, keepdims=True), np.uint8(255), np.uint8(0))
            images = np.where(masks > 0, np.uint8(255), rng.integers(0, 50, digits.shape, dtype=np.uint8))
            for image, label in zip(images, labels, strict=True):
                image[:, :4, 2 * label : 2 * label + 3] = 255
            masks[:, :, :4] = 0
            writer.write_split(name, images=images, labels=labels, masks=masks)
        writer.finish(name="patches", class_names=list(given.class_names))
    learn = {"steps": 60, "batch_size": 32, "lr": 2e-3, "bias_free": True}
    train_student(path, None, tmp_path / "erm", method="erm", **learn)
    train_student(path, None, tmp_path / "rival", method=method, **learn)
    assert relevance_outside(path, tmp_path / "rival") < 0.7 * relevance_outside(path, tmp_path / "erm")


@pytest.mark.parametrize("explainer", [METHODS[name].explainers[0] for name in WITH_MAPS])
def test_without_a_method_it_is_that_of_the_stores_maps(dataset, stores, tmp_path, explainer):
    train_student(dataset, stores[explainer], tmp_path / "s", steps=1, batch_size=8)
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["training"]["loss"] == {method_of(explainer): 1.0}


@pytest.fixture(scope="module")
def masked_dataset(dataset, tmp_path_factory) -> Path:
    """The digits as objects: what is not black."""
    path = tmp_path_factory.mktemp("masked") / "data.zarr"
    given = open_dataset(dataset)
    with DatasetWriter(path) as writer:
        for name, split in given.splits.items():
            images = split.images[:]
            masks = np.where(images.any(1, keepdims=True), np.uint8(255), np.uint8(0))
            writer.write_split(name, images=images, labels=split.labels[:], groups=split.groups[:], masks=masks)
        writer.finish(name="masked", class_names=list(given.class_names))
    return path


@pytest.mark.parametrize("method", WITHOUT_STORE)
def test_what_learns_from_the_dataset_alone_needs_no_store_and_refuses_one(
    masked_dataset, stores, validation_cache, tmp_path, method
):
    for option in ("cache", "validation_cache"):
        paths = {"cache": None, option: stores["flex"]}
        with pytest.raises(TrainingError, match=f"learns without a store: leave {option}=.* out"):
            train_student(masked_dataset, out=tmp_path / "s", method=method, **paths)
    assert not (tmp_path / "s").exists()
    result = invoke("train-student", "--data", masked_dataset, "--out", tmp_path / "s", "--method", method, *LEARN)
    assert result.exit_code == 0, result.output
    assert falls(tmp_path / "s")
    _, config = load_classifier(tmp_path / "s")
    assert config.head is None
    assert config.training["cache"] is None


@pytest.mark.parametrize(
    ("name", "move"),
    [
        (name, move)
        for name in (*WITH_STORE, *WITHOUT_STORE)
        for move in METHODS["erm"].moves
        if move not in METHODS[name].moves
    ],
)
def test_an_augmentation_that_a_method_does_not_allow_is_refused_by_name(dataset, stores, tmp_path, name, move):
    store = stores[METHODS[name].explainers[0] if METHODS[name].explainers else "flex"]
    with pytest.raises(TrainingError, match=f"augment='{move}' is not valid for this method: it can have"):
        train_student(dataset, store, tmp_path / "s", method=name, augment=(move,), steps=1)
    assert not (tmp_path / "s").exists()


def test_maps_of_less_resolution_are_flipped_but_neither_shifted_nor_cropped(dataset, teacher, tmp_path):
    cache_explanations(dataset, teacher, tmp_path / "c.zarr", draws=1, resolution=2)
    for move in ("shift", "crop"):
        with pytest.raises(
            TrainingError, match=f"augment='{move}' needs heatmaps of the images' size, 28×28, these are 14×14"
        ):
            train_student(dataset, tmp_path / "c.zarr", tmp_path / "s", augment=("flip", move), steps=1)
    assert not (tmp_path / "s").exists()
    train_student(dataset, tmp_path / "c.zarr", tmp_path / "s", augment=("flip",), steps=1, batch_size=16)


def test_a_free_head_is_learnt_with_all_the_rest(dataset, stores, tmp_path):
    for head, frozen in (("frozen", ["network.head.weight"]), ("free", [])):
        train_student(dataset, stores["flex"], tmp_path / head, head=head, steps=2, batch_size=16)
        model, config = load_classifier(tmp_path / head)
        assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == frozen
        assert (config.head is None) == (head == "free")


@pytest.mark.parametrize("explainer", ["grad-cam", "attention"])
def test_coarse_maps_of_networks_with_other_last_feature_maps_are_compared(dataset, stores, tmp_path, explainer):
    assert open_cache(stores[explainer]).info.map_shape == (1, 3, 3)
    train_student(
        dataset, stores[explainer], tmp_path / "s", arch="resnet18", steps=4, batch_size=16, log_steps=1, lr=1e-3
    )
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in metrics(tmp_path / "s"))


def test_a_student_without_the_width_of_the_teachers_features_is_told_how_to_match_them(dataset, stores, tmp_path):
    options = {"method": "features", "arch": "resnet18", "steps": 1, "batch_size": 8}
    train_student(dataset, stores["flex"], tmp_path / "adapted", **options)
    with pytest.raises(TrainingError, match=r"512 .* 1152 .* head='frozen'"):
        train_student(dataset, stores["flex"], tmp_path / "s", head="free", **options)
    assert not (tmp_path / "s").exists()

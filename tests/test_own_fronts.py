"""Debiasing fronts of people's own, and fronts one after another: in every command, and only where they are named."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from PIL import Image
from torch import nn

from cli import main
from data import DatasetWriter
from pipeline import (
    Classifier,
    Forward,
    ModelError,
    OwnTeacher,
    cache_explanations,
    explain,
    export_model,
    load_classifier,
    load_teacher,
)
from pipeline.networks.debias import DEBIAS, hides_background
from pipeline.networks.fronts import build_front
from teacher_cache import CacheError, open_cache
from trainer import TrainingError, evaluate, predict, show_explanations, train_student, train_teacher, write_report

SHAPE = (3, 16, 16)
SMALL = {"steps": 2, "batch_size": 16, "arch_options": {"width": 4}}
SOURCE = """
import random

import numpy as np
import torch
from torch import nn

from pipeline import stop_relevance

calls = []


def green(images):
    return images[:, 1:2].expand(-1, images.shape[1], -1, -1)


def grey(images):
    mean = images.mean(dim=1, keepdim=True)
    brightest = stop_relevance(mean).amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(images.dtype).tiny)
    return (mean / brightest).expand(-1, images.shape[1], -1, -1)


def cut(images, masks):
    return images * masks


def dim(images, masks=None):
    return images * (0.5 if masks is None else 0.25 + 0.5 * masks)


def random_noise(images):
    return (images + 0.1 * torch.rand_like(images)).clamp(0, 1)


def numpys_noise(images):
    return images * float(np.random.rand())


def pythons_noise(images):
    return images * random.random()


def counts(images):
    calls.append(1)
    return images / len(calls)


def one_channel(images):
    return images.mean(1, keepdim=True)


def smaller(images):
    return images[:, :, 2:-2, 2:-2]


def a_tuple(images):
    return images, images


def nothing(images):
    images = images / 2


def halves(images):
    return (images / 2).half()


def as_integers(images):
    return (255 * images).to(torch.uint8)


def divides(images):
    return images / images.amax(dim=(1, 2, 3), keepdim=True)


def standardised(images):
    return (images - 0.5) / 0.25


def negative(images):
    return images - 0.1


def in_place(images):
    images[:, 0] = 0
    return images


def in_place_masks(images, masks):
    return images * masks.mul_(0.5)


def of_the_batch(images):
    return images * images.mean().clamp_min(0.1)


def mixes(images):
    return 0.5 * images + 0.5 * images.flip(0)


def thresholds(images):
    return (images > 0.5).float()


def rounds(images):
    return images.round()


def by_numpy(images):
    return torch.from_numpy(np.asarray(images.detach().cpu()) / 2)


def fails(images):
    raise RuntimeError("no such file: blur.npy")


def mask(images, mask):
    return images * mask


def two(images, sigma):
    return images


def spectrum(images):
    return torch.fft.ifft2(torch.fft.fft2(images)).real.clamp(0, 1) * images


class Blur(nn.Module):
    def forward(self, images):
        return images


blur = Blur()
"""
WRONG = {
    "random_noise": "returns other images for the same input in a second call: draw nothing at random",
    "numpys_noise": "returns other images for the same input in a second call: draw nothing at random",
    "pythons_noise": "returns other images for the same input in a second call: draw nothing at random",
    "counts": "keep nothing between calls",
    "one_channel": "returns (5, 1, 16, 16) for images of shape (5, 3, 16, 16): return one tensor of the shape",
    "smaller": "returns (5, 3, 12, 12) for images of shape (5, 3, 16, 16): return one tensor of the shape",
    "a_tuple": "returns a tuple for images of shape",
    "nothing": "returns a NoneType for images of shape",
    "halves": "returns torch.float16 for torch.float32: return floating-point images",
    "as_integers": "returns torch.uint8 for torch.float32: return floating-point images",
    "divides": "returns nan for a black image: return finite values",
    "standardised": "returns values from -2 to 2 for images in [0, 1]: return images in [0, 1]",
    "negative": "returns values from -0.1 to 0.9 for images in [0, 1]: return images in [0, 1]",
    "in_place": "changes its input in place: compute new tensors",
    "in_place_masks": "changes its input in place: compute new tensors",
    "of_the_batch": "differently beside other images than alone: treat each image alone",
    "mixes": "differently beside other images than alone: treat each image alone",
    "thresholds": "without a gradient to the pixels, so that no relevance could pass through it: compute with PyTorch",
    "rounds": "without a gradient to the pixels, so that no relevance could pass through it: compute with PyTorch",
    "by_numpy": "without a gradient to the pixels, so that no relevance could pass through it: compute with PyTorch",
    "fails": "RuntimeError: no such file: blur.npy (myfronts.py, line",
    "mask": "has the parameters (images, mask), and is called with images, or with images and masks",
    "two": "has the parameters (images, sigma), and is called with images, or with images and masks",
    "Blur": "is a class: give a function",
    "blur": "is a network and no function: give a function that calls it",
    "grean": "does not exist: myfronts has no function 'grean'. Did you mean",
}


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A folder to run in, with a module ``myfronts`` of the user's own that notes when it is imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "myfronts.py").write_text("open('imported', 'a').write('x')\n" + SOURCE)
    yield tmp_path
    sys.modules.pop("myfronts", None)


def forget(folder: Path) -> None:
    """Let the module be as in a new process, in which nobody imported it."""
    sys.modules.pop("myfronts", None)
    (folder / "imported").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Squares in the colour of their class, upright or lying; the split ``shift`` has no masks."""
    path = tmp_path_factory.mktemp("data") / "data.zarr"
    rng = np.random.default_rng(0)
    with DatasetWriter(path) as writer:
        for name in ("train", "validation", "iid", "shift"):
            labels = np.arange(32) % 2
            images = rng.integers(0, 60, (32, *SHAPE)).astype(np.uint8)
            masks = np.zeros((32, 1, 16, 16), np.uint8)
            for image, mask, label in zip(images, masks, labels, strict=True):
                part = (slice(4, 12), slice(6, 10)) if label else (slice(6, 10), slice(4, 12))
                image[label][part], mask[0][part] = 250, 1
            arrays = {"images": images, "labels": labels, **({} if name == "shift" else {"masks": masks})}
            writer.write_split(name, **arrays)
        writer.finish(name="squares", class_names=["lying", "upright"], bias_attribute=None, builder={})
    return path


def run(*words: object):
    return CliRunner().invoke(main, [str(word) for word in words])


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))


def images_and_masks() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(4, *SHAPE), (torch.rand(4, 1, 16, 16) > 0.4).float()


# --- the trial of a function ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", WRONG)
def test_a_function_that_is_no_front_is_refused_with_one_error_that_names_it(own, function):
    with pytest.raises(ModelError) as refused:
        build_front(f"myfronts:{function}", SHAPE)
    assert str(refused.value).startswith(f"the debiasing front 'myfronts:{function}' ")
    assert WRONG[function] in str(refused.value)


def test_a_wrong_front_is_refused_before_anything_is_written(own, data):
    for wrong in ("myfronts:divides", "myfronts.green", "nowhere:green", "mask,", "none,mask", "greyscale", "mask,x"):
        result = run("train-teacher", "--data", data, "--out", "t", "--debias", wrong, "--steps", 1)
        assert result.exit_code in (1, 2)
        assert "debias" in result.output
        assert not Path("t").exists()
        with pytest.raises((ModelError, TrainingError), match="debias"):
            train_teacher(data, "t", debias=wrong, steps=1)
        with pytest.raises(ModelError, match="debias"):
            cache_explanations(data, module(), "c", debias=wrong)
    assert not Path("c").exists()


def test_the_trial_changes_no_random_state(own):
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(3), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    for function in ("green", "numpys_noise", "random_noise"):
        try:
            build_front(f"myfronts:{function}", SHAPE)
        except ModelError:
            continue
    assert torch.equal(torch.rand(3), expected[0])
    assert np.random.rand() == expected[1]


def test_a_front_is_tried_on_the_device_to_which_its_model_moves(own):
    front = build_front("myfronts:green", SHAPE)
    sys.modules["myfronts"].calls.clear()
    tried: list[torch.device] = []
    model = Classifier(module(), front, image_shape=SHAPE)
    front._tried.clear()
    object.__setattr__(
        front.parts[0], "function", lambda images: tried.append(images.device) or images[:, 1:2] + 0 * images
    )
    model.to("cpu")
    assert set(tried) == {torch.device("cpu")}
    before = len(tried)
    model.to("cpu")
    assert len(tried) == before


def test_an_output_of_another_shape_is_refused_at_any_later_call(own):
    front = build_front("myfronts:green", SHAPE)
    object.__setattr__(front.parts[0], "function", lambda images: images[:, :1])
    with pytest.raises(ModelError, match=r"'myfronts:green' returns \(4, 1, 16, 16\) for images of shape"):
        front(images_and_masks()[0], None)


# --- what fronts compute --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["mask,grayscale", "grayscale,mask", "mask , mask-mean,grayscale"])
def test_fronts_one_after_another_are_applied_in_order(names):
    images, masks = images_and_masks()
    expected = images
    for name in names.split(","):
        expected = DEBIAS[name.strip()](expected, masks)
    network = module()
    model = Classifier(network, names, image_shape=SHAPE).eval()
    assert model.debias == names.replace(" ", "")
    torch.testing.assert_close(model(images, masks), network(expected), rtol=0, atol=0)
    assert not torch.equal(build_front("mask,grayscale")(images, masks), build_front("grayscale,mask")(images, masks))


def test_fronts_need_masks_and_hide_the_background_if_one_of_them_does(own):
    expected = {
        "grayscale": (False, False), "mask": (True, True), "mask,grayscale": (True, True),
        "grayscale,mask-background-mean": (True, False), "myfronts:green": (False, False),
        "myfronts:cut": (True, False), "myfronts:dim": (False, False), "myfronts:green,mask": (True, True),
        "grayscale,myfronts:cut": (True, False),
    }  # fmt: skip
    for names, (needs, hides) in expected.items():
        assert (build_front(names, SHAPE).needs_masks, hides_background(names)) == (needs, hides), names
    with pytest.raises(ModelError, match="debias='myfronts:cut' needs the dataset's 'masks'"):
        build_front("myfronts:cut", SHAPE)(images_and_masks()[0], None)


def test_a_parameter_masks_with_a_default_takes_masks_where_there_are_some(own):
    images, masks = images_and_masks()
    front = build_front("myfronts:dim", SHAPE)
    torch.testing.assert_close(front(images, None), images / 2)
    torch.testing.assert_close(front(images, masks), images * (0.25 + 0.5 * masks))


@pytest.mark.parametrize("own_text", ["myfronts:grey", "mask,myfronts:grey"])
def test_relevance_passes_through_an_own_front_as_through_the_same_front_of_the_table(own, own_text):
    images, masks = images_and_masks()
    of_table = Classifier(module(), own_text.replace("myfronts:grey", "grayscale"), image_shape=SHAPE)
    of_own = Classifier(module(), build_front(own_text, SHAPE), image_shape=SHAPE)
    expected, maps = (
        Forward(model.eval(), images, "flex", masks).maps(torch.tensor([0, 1, 0, 1]), 0.1)
        for model in (of_table, of_own)
    )
    assert maps.any()
    assert torch.equal(expected, maps)


def test_heatmaps_lie_on_the_pixels_before_an_own_front(own):
    images, targets = images_and_masks()[0].double(), torch.tensor([0, 1, 0, 1])
    network, front = module().double(), build_front("myfronts:green", SHAPE)
    _, inner = explain(network, front(images, None), targets, epsilon=0.1)
    _, maps = explain(Classifier(network, front, image_shape=SHAPE), images, targets, epsilon=0.1)
    assert not maps[:, [0, 2]].any()
    torch.testing.assert_close(maps[:, 1], inner.sum(1))


# --- trainings, stores and results ----------------------------------------------------------------------------------


def test_a_training_behind_a_copy_of_a_front_of_the_table_has_its_weights(own, data):
    train_teacher(data, "table", debias="grayscale", **SMALL)
    train_teacher(data, "own", debias="myfronts:grey", **SMALL)
    table, of_own = (torch.load(Path(name, "weights.pt"), weights_only=True) for name in ("table", "own"))
    assert all(torch.equal(table[key], of_own[key]) for key in table)
    config = json.loads(Path("table/config.json").read_text())
    assert config["debias"] == "grayscale"
    assert "front_sha256" not in config


@pytest.fixture
def teacher(own, data) -> Path:
    """A teacher behind a front of its own, in a process that has not imported it."""
    result = run(
        "train-teacher", "--data", data, "--out", "t", "--debias", "mask, myfronts:green", "--steps", 2,
        "--batch-size", 16, "--arch-option", "width=4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(Path("t/config.json").read_text())["debias"] == "mask,myfronts:green"
    forget(own)
    return own / "t"


COMMANDS = {
    "evaluate": ["evaluate", "--model", "t"],
    "evaluate --teacher": ["evaluate", "--teacher", "t"],
    "cache-explanations": ["cache-explanations", "--teacher", "t", "--draws", 1, "--out", "c"],
    "show-explanations": ["show-explanations", "--model", "t", "--split", "iid", "--samples", 2, "--out", "p.png"],
    "show-explanations --teacher": ["show-explanations", "--teacher", "t", "--split", "iid", "--out", "p.png"],
    "report": ["report", "t", "--samples", 1, "--out", "r.html"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_saved_front_runs_only_where_the_command_line_names_its_functions(teacher, data, command):
    words = [*COMMANDS[command], "--data", data]
    others = ("myfronts:grey", "other:green")
    for more in ([], *(["--debias", other] for other in others)):
        refused = run(*words, *more)
        text = " ".join(refused.output.split())
        assert refused.exit_code == 1, text
        assert "'myfronts:green', whose code runs only where you say so" in text
        assert "give --debias mask,myfronts:green" in text
        assert not Path("imported").exists()
    for name in ("c", "p.png", "r.html"):
        assert not Path(name).exists()
    accepted = run(*words, "--debias", "mask,myfronts:green")
    assert accepted.exit_code == 0, accepted.output
    assert Path("imported").exists()


def test_python_names_the_functions_of_a_saved_front_too(teacher, data):
    with pytest.raises(ModelError, match="give debias='mask,myfronts:green'"):
        evaluate(data, teacher)
    assert not Path("imported").exists()
    result = evaluate(data, teacher, debias="myfronts:green")
    assert (result["debias"], result["splits"]["shift"]["accuracy"]) == ("mask,myfronts:green", None)
    function = sys.modules["myfronts"].green
    train_teacher(data, "u", debias=function, **SMALL)
    assert "debias: myfronts:green" in Path("u/config.yaml").read_text()
    assert load_classifier("u", debias=function)[0].front.parts[0].function is function
    with pytest.raises(ModelError, match="whose code runs only where you say so"):
        load_classifier("u", debias=sys.modules["myfronts"].grey)
    show_explanations(data, "p.png", models=["u", teacher], split="iid", debias="mask,myfronts:green", samples=1)
    write_report([teacher, "u"], data=data, out="r.html", debias="mask,myfronts:green", samples=1)


def test_a_front_without_functions_is_not_to_be_named(own, data):
    train_teacher(data, "t", debias="mask,grayscale", **SMALL)
    assert run("evaluate", "--data", data, "--model", "t").exit_code == 0
    refused = run("evaluate", "--data", data, "--model", "t", "--debias", "myfronts:green")
    assert "--debias myfronts:green was given, but its front is 'mask,grayscale': leave the option out" in " ".join(
        refused.output.split()
    )
    assert not Path("imported").exists()
    cache_explanations(data, "t", "c", draws=1)
    assert open_cache("c").info.teacher.debias == "mask,grayscale"
    train_student(data=data, out="s", cache="c", augment=("background",), **SMALL)


def test_a_teacher_behind_an_own_front_predicts_images_and_is_not_exported(own, data):
    train_teacher(data, "t", debias="myfronts:green", **SMALL)
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save("a.png")
    forget(own)
    refused = run("predict", "--model", "t", "a.png")
    assert "give --debias myfronts:green" in " ".join(refused.output.split())
    with pytest.raises(ModelError, match="stands behind the front 'myfronts:green'"):
        export_model("t", "t.pt", "state-dict")
    assert not Path("imported").exists()
    assert run("predict", "--model", "t", "a.png", "--debias", "myfronts:green").exit_code == 0
    assert [prediction.class_name for prediction in predict("t", "a.png", debias="myfronts:green", explain=True)]


def test_masks_that_an_own_front_needs_are_asked_for(own, data, dataset):
    with pytest.raises(TrainingError, match="debias='myfronts:cut' needs 'masks' in the train split"):
        train_teacher(dataset, "t", debias="myfronts:cut", steps=1)
    with pytest.raises(ModelError, match="the split 'shift' has no masks, which the front of"):
        cache_explanations(data, module(), "c", debias="myfronts:cut", split="shift")
    train_teacher(data, "t", debias="myfronts:cut", validation=True, **SMALL)
    with pytest.raises(ModelError, match="needs masks, which image files do not have"):
        list(predict("t", data.parent, debias="myfronts:cut"))


# --- networks of one's own ------------------------------------------------------------------------------------------


def test_a_module_behind_a_front_by_text_function_and_own_teacher_makes_the_same_store(own, data):
    build_front("myfronts:cut", SHAPE)
    function = sys.modules["myfronts"].cut
    cache_explanations(data, module(), "a", draws=1, debias="myfronts:cut")
    cache_explanations(data, module(), "b", draws=1, debias=function)
    cache_explanations(data, OwnTeacher(module(), debias=function), "c", draws=1)
    cache_explanations(data, module(), "table", draws=1, debias="mask")
    a, b, c, table = map(open_cache, ("a", "b", "c", "table"))
    assert a.info == b.info == c.info
    assert a.info.teacher.debias == "myfronts:cut"
    assert a.info.teacher.weights_sha256 != table.info.teacher.weights_sha256
    maps = [zarr.open_group(name, mode="r")["heatmaps"][:] for name in ("a", "b", "c", "table")]
    assert all(np.array_equal(maps[0], other) for other in maps[1:])
    with pytest.raises(ModelError, match=r"was given for .*, but its front is 'grayscale': leave the option out"):
        cache_explanations(data, OwnTeacher(module(), debias="grayscale"), "d", debias="mask")


def test_a_front_of_another_text_makes_another_teacher(own, data):
    cache_explanations(data, module(), "c", draws=1, debias="myfronts:green")
    before = load_teacher(OwnTeacher(module(), debias="myfronts:green"), ("a", "b"), SHAPE).sha256
    train_teacher(data, "t", debias="myfronts:green", **SMALL)
    cache_explanations(data, "t", "of-t", draws=1, debias="myfronts:green")
    source = Path("myfronts.py").read_text().replace("images[:, 1:2].expand", "images[:, 2:3].expand")
    forget(own)
    Path("myfronts.py").write_text(source)
    importlib.invalidate_caches()
    assert load_teacher(OwnTeacher(module(), debias="myfronts:green"), ("a", "b"), SHAPE).sha256 != before
    for teacher, store in ((module(), "c"), ("t", "of-t")):
        with pytest.raises((CacheError, FileExistsError), match="weights_sha256"):
            cache_explanations(data, teacher, store, draws=1, debias="myfronts:green")


def test_a_change_of_a_front_is_told_and_ends_an_unfinished_training(own, data, caplog):
    train_teacher(data, "t", debias="myfronts:green", checkpoint_steps=1, **SMALL)
    load_classifier("t", debias="myfronts:green")
    assert "has changed" not in caplog.text
    config = json.loads(Path("t/config.json").read_text())
    Path("t/config.json").write_text(json.dumps({**config, "front_sha256": "0" * 64}))
    with caplog.at_level(logging.WARNING):
        load_classifier("t", debias="myfronts:green")
    assert "the code of myfronts:green has changed since the training of t" in caplog.text
    Path("t/result.json").unlink()
    with pytest.raises(TrainingError, match="front_sha256"):
        train_teacher(data, "t", debias="myfronts:green", **SMALL)


def test_only_functions_at_the_top_of_a_module_are_fronts_in_python(own, data):
    def local(images: torch.Tensor) -> torch.Tensor:
        return images / 2

    for wrong in (local, lambda images: images, nn.Identity(), 3, None, ("mask", "grayscale")):
        with pytest.raises((ModelError, TrainingError), match="debias"):
            train_teacher(data, "t", debias=wrong, steps=1)
        if wrong is not None:
            with pytest.raises(ModelError, match="debias must be names or a function at the top of a module"):
                cache_explanations(data, module(), "c", debias=wrong)
    assert not Path("t").exists()


def test_a_front_without_a_relevance_rule_is_told_before_the_training(own, data, caplog):
    with caplog.at_level(logging.WARNING):
        train_teacher(data, "t", debias="myfronts:spectrum", **SMALL)
    assert "no heatmaps will be made of a teacher behind the debiasing front 'myfronts:spectrum'" in caplog.text
    assert "torch.fft" in caplog.text


def test_the_masks_of_a_segmenter_are_those_of_every_front_beside_it(own, data):
    Path("bright.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Bright(nn.Module):\n"
        "    def forward(self, images):\n        return images.amax(1, keepdim=True) - 0.5\n\n\n"
        "def build():\n    return Bright()\n"
    )
    train_teacher(data, "t", debias="segmenter,mask-mean,grayscale", segmenter="bright:build", **SMALL)
    model, _ = load_classifier("t", segmenter="bright:build")
    images = images_and_masks()[0]
    masks = (images.amax(1, keepdim=True) > 0.5).float()
    expected = DEBIAS["grayscale"](DEBIAS["mask-mean"](images * masks, masks), masks)
    assert not model.needs_masks
    torch.testing.assert_close(model(images), model.network(expected))
    with pytest.raises(TrainingError, match="debias='segmenter,grayscale' needs segmenter"):
        train_teacher(data, "u", debias="segmenter,grayscale", **SMALL)
    sys.modules.pop("bright", None)

"""What the fronts that need masks promise of the background: how it is filled, and that nothing of it is given away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data import DatasetWriter
from pipeline import EXPLAINERS, Forward, RelevanceError, cache_explanations, explain
from pipeline.networks.classifier import Classifier
from pipeline.networks.debias import DEBIAS, hides_background, needs_masks
from teacher_cache import open_cache
from trainer import TrainingError, train_student, train_teacher

FRONTS = [name for name in DEBIAS if needs_masks(name)]
OF_OBJECT, OF_BACKGROUND = ("mask-mean", "mask-blur"), ("mask-background-mean", "mask-background-blur")
FILLED = (*OF_OBJECT, *OF_BACKGROUND)


@st.composite
def pictures(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Images (2, 3, H, W) in (0, 1] and masks (2, 1, H, W) in {0, 1}, of any shape and share, float64."""
    height, width = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    images = 0.01 + 0.99 * torch.rand(2, 3, height, width, generator=random, dtype=torch.float64)
    share = draw(st.sampled_from((0.0, 0.05, 0.5, 0.95, 1.0)))
    masks = (torch.rand(2, 1, height, width, generator=random, dtype=torch.float64) < share).double()
    return images, masks


def network(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1, bias=bias), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3, bias=bias)).double()


def of_masks(inside: Tensor, outside: Tensor, masks: Tensor) -> Tensor:
    return torch.where(masks == 1, inside, outside)


@pytest.mark.parametrize("front", FRONTS)
def test_a_front_is_said_to_hide_the_background_exactly_if_no_background_changes_what_the_network_sees(front):
    images, others = torch.rand(2, 4, 3, 9, 12)
    masks = torch.zeros(4, 1, 9, 12)
    masks[:, :, 2:7, 3:8] = 1
    same = torch.equal(DEBIAS[front](images, masks), DEBIAS[front](of_masks(images, others, masks), masks))
    assert same == hides_background(front)


@settings(deadline=None)
@pytest.mark.parametrize("front", FILLED)
@given(pictures())
def test_a_fill_leaves_the_object_as_it_is_and_stays_within_the_colours_that_it_is_made_of(front, picture):
    images, masks = picture
    seen = DEBIAS[front](images, masks)
    source = masks if front in OF_OBJECT else 1 - masks
    assert torch.equal(seen * masks, images * masks)
    for image, original, mask, part in zip(seen, images, masks, source, strict=True):
        filled = image[:, mask[0] == 0]
        if not part.any():
            assert not filled.any()  # an image without an object is black, as behind `mask`
        elif filled.numel():
            colours = original[:, part[0] == 1]
            assert (filled >= colours.amin(1, keepdim=True) - 1e-12).all()
            assert (filled <= colours.amax(1, keepdim=True) + 1e-12).all()


@pytest.mark.parametrize("front", FILLED)
def test_a_mean_or_a_blur_of_one_colour_is_this_colour(front):
    masks = torch.zeros(1, 1, 11, 7)
    masks[:, :, 4:6, 1:4] = 1
    red, blue = torch.tensor([[[0.9]], [[0.2]], [[0.1]]]), torch.tensor([[[0.1]], [[0.3]], [[0.8]]])
    images = of_masks(red, blue, masks)
    expected = red.expand_as(images) if front in OF_OBJECT else images
    torch.testing.assert_close(DEBIAS[front](images, masks), expected)


@pytest.mark.parametrize(("front", "part"), [("mask-mean", 1), ("mask-background-mean", 0)])
def test_the_mean_is_that_of_each_image_and_channel(front, part):
    images = torch.rand(3, 3, 6, 5, dtype=torch.float64)
    masks = (torch.rand(3, 1, 6, 5) < 0.5).double()
    seen = DEBIAS[front](images, masks).numpy()
    for n in range(3):
        for channel in range(3):
            inside = masks[n, 0].numpy() == 1
            mean = images[n, channel].numpy()[masks[n, 0].numpy() == part].mean()
            np.testing.assert_allclose(seen[n, channel][~inside], mean)


def test_a_blur_of_the_object_continues_it_beyond_its_edge():
    images = torch.zeros(1, 3, 16, 16)
    images[..., 4:8] = 0.2
    images[..., 8:12] = 0.8
    masks = torch.zeros(1, 1, 16, 16)
    masks[..., 4:12] = 1
    seen = DEBIAS["mask-blur"](images, masks)
    assert (seen[..., 3] - seen[..., 4]).abs().max() < 0.1 < (seen[..., 3] - seen[..., 12]).abs().min()
    assert (seen[..., 12] - seen[..., 11]).abs().max() < 0.1


@pytest.mark.parametrize("name", [name for name, explainer in EXPLAINERS.items() if not explainer.coarse])
@pytest.mark.parametrize("front", FRONTS)
def test_no_explainer_gives_the_background_relevance(front, name):
    masks = torch.zeros(3, 1, 8, 8, dtype=torch.float64)
    masks[:, :, 2:6, 2:6] = 1
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    maps = Forward(Classifier(network(bias=True), front), images, name, masks).maps(torch.tensor([2, 0, 1]), 0.1)
    assert not (maps * (1 - masks)).any()
    assert (maps * masks).any()


@settings(deadline=None)
@pytest.mark.parametrize("front", ["mask", *OF_OBJECT])
@given(pictures())
def test_the_heatmap_of_the_object_accounts_for_the_whole_logit_with_every_fill_that_is_made_of_it(front, picture):
    images, masks = picture
    model, targets = Classifier(network(), front), torch.tensor([0, 2])
    logits, maps = explain(lambda x: model(x, masks), images, targets, 1e-9)[:2]
    assert maps.isfinite().all()
    chosen = logits.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(maps.sum((1, 2, 3)), chosen, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("front", FRONTS)
def test_gradients_are_finite_where_an_image_is_all_object_or_none(front):
    images = torch.rand(2, 3, 7, 9, requires_grad=True)
    masks = torch.stack([torch.zeros(1, 7, 9), torch.ones(1, 7, 9)])
    DEBIAS[front](images, masks).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


# Training


def scenes(path: Path, brightness: int = 255) -> Path:
    """Objects of at most this brightness in the middle of bright noise."""
    random = np.random.default_rng(0)
    masks = np.zeros((24, 1, 16, 16), np.uint8)
    masks[:, :, 4:12, 4:12] = 255
    images = random.integers(100, 256, (24, 3, 16, 16), dtype=np.uint8)
    images[:, :, 4:12, 4:12] = np.minimum(images[:, :, 4:12, 4:12], brightness)
    with DatasetWriter(path) as writer:
        for split in ("train", "ood"):
            writer.write_split(split, images=images, labels=np.arange(24) % 2, masks=masks)
        writer.finish(name="scenes", class_names=["one", "two"])
    return path


@pytest.mark.parametrize("front", FILLED)
def test_a_teacher_behind_every_fill_is_trained_and_explained_and_its_student_repainted_if_no_background_is_seen(
    tmp_path, front
):
    data = scenes(tmp_path / "data.zarr")
    train_teacher(data, tmp_path / "t", debias=front, steps=2, batch_size=8)
    cache_explanations(data, tmp_path / "t", tmp_path / "c.zarr", draws=1)
    assert open_cache(tmp_path / "c.zarr").info.teacher.debias == front
    repainted = {"augment": ("background",), "steps": 2, "batch_size": 8}
    if front in OF_OBJECT:
        train_student(data, tmp_path / "c.zarr", tmp_path / "s", **repainted)
        return
    with pytest.raises(TrainingError, match=rf"this one does \(debias='{front}'\)"):
        train_student(data, tmp_path / "c.zarr", tmp_path / "s", **repainted)


@pytest.mark.parametrize("front", FILLED)
def test_a_training_without_the_masks_that_its_fill_needs_is_refused_by_its_name(dataset, tmp_path, front):
    with pytest.raises(TrainingError, match=f"debias='{front}' needs 'masks' in the train split"):
        train_teacher(dataset, tmp_path / "t", debias=front)


@pytest.mark.parametrize("front", ["mask", *OF_OBJECT])
def test_maps_of_zeros_are_said_to_be_no_fault_of_a_teacher_that_sees_nothing_but_black(tmp_path, front):
    data = scenes(tmp_path / "data.zarr")
    black = scenes(tmp_path / "black.zarr", brightness=0)
    train_teacher(data, tmp_path / "t", debias=front, steps=2, batch_size=8)
    with pytest.raises(RelevanceError, match="the images are black, or their masks are empty"):
        cache_explanations(black, tmp_path / "t", tmp_path / "c.zarr", draws=1)

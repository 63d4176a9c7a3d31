"""What augmentation promises: image, heatmap and mask move together, the same way on any number of processes."""

from __future__ import annotations

from itertools import combinations, pairwise

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer import TrainingError
from trainer.loop import repainting
from trainer.loop.augmentation import AUGMENTATIONS, augment, augment_masks, check_augmentations
from trainer.loop.repainting import LEAVES, SOFT, TWO_COLOURS, repaint

SUBSETS = [names for size in range(4) for names in combinations(AUGMENTATIONS, size)]

MOVES = [name for name in AUGMENTATIONS if name != "background"]  # which moves nothing


def patterns(*shape, dtype=torch.float32, seed=0):
    """Random values in (0, 1): no two pixels alike."""
    return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).clamp_min(1e-6)


def moved(images, maps, *names, seed=0, step=0, first=0, of=None):
    return augment(images, maps, names, seed=seed, step=step, first=first, of=of or len(images))


def test_flip_exchanges_left_and_right_of_half_of_the_samples(device):
    image = patterns(3, 5, 6)
    forms = [image, oracles.flipped(image)]
    images, _ = moved(image.expand(4000, -1, -1, -1).to(device), None, "flip")
    equal = torch.stack([(images.cpu() == form).flatten(1).all(1) for form in forms], dim=1)
    assert (equal.sum(1) == 1).all()  # bit for bit one of the two
    assert abs(equal[:, 1].double().mean() - 0.5) < 0.04  # five standard deviations


def test_shift_moves_by_each_number_of_pixels_up_to_an_eighth_of_a_side_and_zeros_come_in(device):
    image = patterns(2, 16, 25)
    forms = [oracles.shifted(image, down, right) for down in range(-2, 3) for right in range(-3, 4)]
    images, _ = moved(image.expand(1500, -1, -1, -1).to(device), None, "shift")
    equal = torch.stack([(images.cpu() == form).flatten(1).all(1) for form in forms], dim=1)
    assert (equal.sum(1) == 1).all()
    assert (equal.sum(0) > 15).all()  # of 1500 / 35 = 43


def ramps(height, width):
    """(2, H, W) float64: the row and the column of each pixel, which tell where a resized one comes from."""
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in (height, width))
    return torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)])


def box(image):
    """Top, left, and part of the height and of the width of the box that the ramps of a resized image come from."""
    (row, column), y, x = image[:2], image.shape[1] // 2, image.shape[2] // 2
    high, wide = (row[y + 1, x] - row[y, x]).item(), (column[y, x + 1] - column[y, x]).item()
    return row[y, x].item() + 0.5 - high * (y + 0.5), column[y, x].item() + 0.5 - wide * (x + 0.5), high, wide


@pytest.mark.parametrize(("height", "width"), [(16, 16), (13, 22)])
def test_crop_resizes_a_box_within_the_image_of_60_to_100_percent_of_its_area_and_its_aspect_ratio(
    height, width, device
):
    image = torch.cat([ramps(height, width), patterns(1, height, width, dtype=torch.float64)])
    images, maps = moved(*[image.expand(24, -1, -1, -1).to(device)] * 2, "crop")
    mask = image[2:] > 0.5
    masks = augment_masks(mask.expand(24, -1, -1, -1).to(device), ["crop"], seed=0, step=0, first=0, of=24)
    shares, rounding = [], 1e-9
    for found, heatmap, found_mask in zip(images.cpu(), maps.cpu(), masks.cpu(), strict=True):
        top, left, high, wide = box(found)
        assert abs(high - wide) < rounding
        assert -rounding < top < (1 - high) * height + rounding
        assert -rounding < left < (1 - wide) * width + rounding
        torch.testing.assert_close(found, oracles.cropped(image, top, left, high))
        torch.testing.assert_close(heatmap, found * high * wide)
        assert torch.equal(found_mask, oracles.cropped(mask, top, left, high, nearest=True))
        shares.append(high * wide)
    assert 0.6 <= min(shares) < 0.7
    assert 0.9 < max(shares) <= 1


def test_the_boxes_of_crop_have_any_size_and_lie_anywhere():
    images, _ = moved(ramps(10, 14).expand(600, -1, -1, -1), None, "crop")
    drawn = torch.tensor([box(image)[:3] for image in images], dtype=torch.float64)
    side = drawn[:, 2]
    numbers = torch.stack([(side**2 - 0.6) / 0.4, *(drawn[:, :2] / (1 - side[:, None]) / torch.tensor([10, 14])).T])
    assert (numbers.mean(1) - 1 / 2).abs().max() < 0.06  # five standard deviations
    assert (numbers.var(1) - 1 / 12).abs().max() < 0.015
    assert (torch.corrcoef(numbers) - torch.eye(3)).abs().max() < 0.2


def test_crop_keeps_the_sum_of_the_relevance_in_its_box():
    # what lies within the middle 54 % of each side is in every box
    blob = torch.exp(-(((ramps(48, 56) - torch.tensor([24.0, 28.0]).view(2, 1, 1)) / 3.5) ** 2).sum(0))
    blob = (blob * torch.tensor([1.0, -0.5]).view(2, 1, 1)).expand(40, -1, -1, -1)
    _, maps = moved(blob, blob, "crop")
    torch.testing.assert_close(maps.sum((2, 3)), blob.sum((2, 3)), rtol=0.01, atol=0)
    assert (maps.amax((2, 3)) - blob.amax((2, 3))).abs().max() > 0.1  # and it did move something


@pytest.mark.parametrize("names", [["flip"], ["shift"], ["flip", "shift"]])
def test_image_heatmap_and_mask_stay_aligned_bit_for_bit(names, device):
    images = patterns(64, 3, 17, 24).to(device)
    found, maps = moved(images, -images, *names)
    assert not torch.equal(found, images)
    assert torch.equal(maps, -found)
    for dtype in (torch.bool, torch.uint8, torch.float32):
        masks = augment_masks((images[:, :1] > 0.5).to(dtype), names, seed=0, step=0, first=0, of=64)
        assert torch.equal(masks, (found[:, :1] > 0.5).to(dtype))


def test_a_coarse_heatmap_is_flipped_with_its_image():
    images = patterns(64, 3, 16, 24)
    found, maps = moved(images, torch.nn.functional.avg_pool2d(images, 4), "flip")
    torch.testing.assert_close(maps, torch.nn.functional.avg_pool2d(found, 4))


@given(
    cuts=st.lists(st.integers(0, 12), max_size=3),
    channels=st.integers(1, 3),
    height=st.integers(1, 33),
    width=st.integers(1, 33),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    names=st.sampled_from(SUBSETS),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**40),
)
@settings(deadline=None)
def test_processes_with_a_part_of_the_batch_each_do_exactly_what_one_does(
    cuts, channels, height, width, layout, names, seed, step
):
    images, maps = (values.contiguous(memory_format=layout) for values in patterns(2, 12, channels, height, width))
    masks = maps[:, :1] > 0.5
    edges = [0, *sorted(cuts), 12]
    parts = [slice(first, stop) for first, stop in pairwise(edges)]
    where = [{"seed": seed, "step": step, "first": part.start, "of": 12} for part in parts]
    alone = {"seed": seed, "step": step, "first": 0, "of": 12}
    pairs = [augment(images[part], maps[part], names, **at) for part, at in zip(parts, where, strict=True)]
    for found, expected in zip(zip(*pairs, strict=True), augment(images, maps, names, **alone), strict=True):
        assert torch.equal(torch.cat(found), expected)
    found = [augment_masks(masks[part], names, **at) for part, at in zip(parts, where, strict=True)]
    assert torch.equal(torch.cat(found), augment_masks(masks, names, **alone))


@pytest.mark.parametrize("name", MOVES)
def test_seed_and_step_decide_and_nothing_else_does(name):
    images = patterns(16, 1, 16, 16)
    state = torch.random.get_rng_state()
    first, _ = moved(images, None, name, seed=1, step=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(moved(images, None, name, seed=1, step=5)[0], first)
    assert not torch.equal(moved(images, None, name, seed=1, step=6)[0], first)
    assert not torch.equal(moved(images, None, name, seed=2, step=5)[0], first)
    assert not torch.equal(first[0] - images[0], first[1] - images[1])


@pytest.mark.parametrize("names", SUBSETS)
def test_together_they_do_what_each_does_alone_one_after_the_other_and_leave_what_was_given(names):
    images, maps = patterns(2, 16, 3, 16, 24)
    given_images, given_maps = images.clone(), maps.clone()
    found = moved(images, maps, *reversed(names))
    assert torch.equal(images, given_images)
    assert torch.equal(maps, given_maps)
    for name in names:
        images, maps = moved(images, maps, name)
    assert torch.equal(found[0], images)
    assert torch.equal(found[1], maps)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", MOVES)
def test_layout_and_type_stay_as_they_were(name, layout):
    images = patterns(4, 3, 16, 24).contiguous(memory_format=layout)
    found, maps = moved(images, images.double(), name)
    assert found.stride() == maps.stride() == images.stride()
    assert (found.dtype, maps.dtype) == (torch.float32, torch.float64)


def test_what_is_unknown_or_does_not_fit_is_refused_with_the_reason():
    check_augmentations(["flip"], (3, 7, 7), (3, 28, 28), ("flip",))
    check_augmentations(AUGMENTATIONS, (1, 28, 28), (3, 28, 28), tuple(AUGMENTATIONS))
    check_augmentations(AUGMENTATIONS, None, (3, 28, 28), tuple(AUGMENTATIONS))
    for names, map_shape, valid, message in (
        (["spin"], None, ("flip",), "unknown augment 'spin': choose one of flip, shift, crop, background"),
        (["crop"], None, ("flip", "shift"), "augment='crop' is not valid for this method: it can have flip, shift"),
        (
            ["flip"],
            None,
            (),
            "augment='flip' is not valid for this method: it can have none; make_flipped.. adds flipped images",
        ),
        (
            ["flip", "shift"],
            (1, 7, 9),
            ("flip", "shift"),
            "augment='shift' needs heatmaps of the images' size, 28×30, these are 7×9: leave it out, or",
        ),
    ):
        with pytest.raises(TrainingError, match=message):
            check_augmentations(names, map_shape, (3, 28, 30), valid)
    with pytest.raises(TrainingError, match="augment='crop' needs heatmaps of the images' size"):
        moved(torch.ones(2, 3, 28, 28), torch.ones(2, 3, 14, 14), "crop")
    with pytest.raises(ValueError, match="rows 4 to 8 are not all within a batch of 6"):
        moved(torch.ones(4, 3, 28, 28), None, "flip", first=4, of=6)


def repainted(images, masks, seed=0, step=0, first=0, of=None):
    return repaint(images, masks, seed=seed, step=step, first=first, of=of or len(images), share=0.5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_another_background_leaves_the_object_bit_for_bit_and_no_background_as_it_was(channels, layout, device):
    images = patterns(32, channels, 17, 24).contiguous(memory_format=layout).to(device)
    masks = (patterns(32, 1, 17, 24, seed=1) > 0.5).float().to(device)
    given_images, given_masks = images.clone(), masks.clone()
    found = repainted(images, masks)
    on_object = masks.bool().expand_as(images)
    assert torch.equal(found[on_object], images[on_object])
    another = (found != images).flatten(1).any(1)
    changed = [(found != images)[i][~on_object[i]].double().mean() for i in another.nonzero().flatten()]
    assert min(changed) > 0.9  # all of the background or none of it
    assert torch.stack(changed).mean() > 0.99
    assert (found >= 0).all()
    assert (found <= 1).all()
    assert (found.stride(), found.dtype) == (images.stride(), images.dtype)
    assert torch.equal(images, given_images)
    assert torch.equal(masks, given_masks)


def test_what_a_background_becomes_tells_nothing_of_its_colour_and_little_of_its_texture():
    stripes = torch.arange(24).remainder(2).float().expand(2000, 3, 16, 24) * torch.tensor([1.0, 0.2, 0]).view(3, 1, 1)
    found = repainted(stripes, torch.zeros(2000, 1, 16, 24))
    another = (found != stripes).flatten(1).any(1)
    assert 900 < another.sum() < 1100  # half, to four and a half standard deviations
    found = found[another].double()
    colours = found.mean((2, 3))
    assert (colours.mean(0) - colours.mean()).abs().max() < 0.06  # five standard deviations; 0.5, 0.1 and 0 before
    assert (colours.std(0) > 0.15).all()
    contrast = (found[..., ::2].mean(3) - found[..., 1::2].mean(3)).mean(2).abs().amax(1)
    assert contrast.quantile(0.1) < 0.1 < 0.5 < contrast.quantile(0.9)  # from next to none to most of it


def textures() -> Tensor:
    black = torch.zeros(200, 3, 24, 32)
    return repaint(black, black[:, :1], seed=0, step=0, first=0, of=200, share=1)


def hard_textures(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(repainting, "SOFT", 1e-9)
        return textures()


def test_a_texture_is_of_leaves_of_one_colour_each_from_a_pixel_to_a_quarter_of_the_image(monkeypatch):
    found = hard_textures(monkeypatch)
    colours = [image.flatten(1).T.unique(dim=0, return_counts=True)[1] for image in found]
    assert max(map(len, colours)) <= LEAVES + 1
    more = [len(counts) for counts in colours if len(counts) > 2]
    assert abs(len(more) / 200 - (1 - TWO_COLOURS)) < 0.14  # four standard deviations
    assert sorted(more)[20] > 8
    assert min(int(pixels.min()) for pixels in colours) == 1
    assert sum(int(pixels.max()) > 24 * 32 / 4 for pixels in colours) > 20


def test_half_of_the_textures_have_soft_edges(monkeypatch):
    found, hard = textures(), hard_textures(monkeypatch)
    soft = (found != hard).flatten(1).any(1)
    assert abs(soft.double().mean() - SOFT) < 0.14  # four standard deviations
    steepest = [images[soft].diff(dim=3).abs().flatten(1).amax(1) for images in (found, hard)]
    assert (steepest[0] < steepest[1]).double().mean() > 0.95
    share = steepest[0] / steepest[1]
    assert share.quantile(0.1) < 0.6 < 0.8 < share.quantile(0.9)  # by any amount
    assert (found.mean((2, 3)) - hard.mean((2, 3))).abs().max() < 0.02


def test_two_colours_alone_have_any_contrast_up_to_that_of_opposite_ones(monkeypatch):
    pairs = [image.flatten(1).T.unique(dim=0) for image in hard_textures(monkeypatch)]
    contrast = torch.stack([(pair[0] - pair[1]).abs().mean() for pair in pairs if len(pair) == 2])
    assert contrast.quantile(0.1) < 0.1 < 0.75 < contrast.quantile(0.9)


def test_every_process_repaints_its_part_of_the_batch_as_one_does_by_seed_and_step_alone():
    images, masks = patterns(12, 3, 9, 14), (patterns(12, 1, 9, 14, seed=1) > 0.5).float()
    state = torch.random.get_rng_state()
    whole = repainted(images, masks, seed=3, step=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    parts = [(0, 5), (5, 6), (6, 12)]
    found = [repainted(images[a:b], masks[a:b], seed=3, step=5, first=a, of=12) for a, b in parts]
    assert torch.equal(torch.cat(found), whole)
    assert not torch.equal(repainted(images, masks, seed=3, step=6), whole)
    assert not torch.equal(repainted(images, masks, seed=4, step=5), whole)
    same = repainted(images[:1].expand(12, -1, -1, -1), masks[:1].expand(12, -1, -1, -1))
    assert len(same.unique(dim=0)) > 4

"""What the heatmap losses promise, each of them."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache import average_pool
from trainer import heatmap_loss
from trainer.loop.losses import MAP_LOSSES

every_kind = pytest.mark.parametrize("kind", MAP_LOSSES)


@every_kind
@pytest.mark.parametrize("pyramid", [True, False])
@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 33, 17), (2, 64, 20), (3, 8, 8), (3, 5, 6)])
def test_it_equals_the_formula_written_as_loops(shape, kind, pyramid):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape).double() * 3, torch.randn(2, *shape).double()
    found = heatmap_loss(student, teacher, kind=kind, pyramid=pyramid)
    for i in range(2):
        assert abs(found[i].item() - oracles.heatmap_loss(student[i], teacher[i], kind, pyramid=pyramid)) < 1e-10


@given(
    channels=st.integers(1, 3),
    height=st.integers(4, 40),
    width=st.integers(4, 40),
    resolution=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(list(MAP_LOSSES)),
    pyramid=st.booleans(),
    zeros=st.floats(0, 1),
    scale=st.floats(-9, 9),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
def test_it_equals_the_formula_at_every_size_scale_and_resolution_and_where_much_is_zero(
    channels, height, width, resolution, kind, pyramid, zeros, scale, seed
):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, channels, height, width, dtype=torch.float64, generator=generator)
    maps *= torch.rand(maps.shape, generator=generator) >= zeros
    maps[:, 0, 0, 0] = 1  # neither map is all zeros, which has a promise of its own
    student, teacher = maps[0] * 10.0**scale, maps[1]
    if resolution > 1:
        teacher = torch.from_numpy(average_pool(teacher.numpy(), resolution)).double()
    found = heatmap_loss(student[None], teacher[None], resolution, kind=kind, pyramid=pyramid).item()
    expected = oracles.heatmap_loss(student, teacher, kind, resolution, pyramid)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-10)


@every_kind
@pytest.mark.parametrize("resolution", [2, 4])
@pytest.mark.parametrize("shape", [(28, 30), (33, 35), (64, 66), (10, 12), (11, 11), (7, 30), (30, 7), (5, 5), (4, 4)])
def test_smaller_maps_of_a_teacher_begin_the_pyramid_at_their_level(shape, resolution, kind):
    """At every size: of 11 pixels that were pooled by 4 there are 2, which is not a fifth of them."""
    student, teacher = torch.randn(2, 3, *shape), torch.randn(2, 3, *shape)
    pooled = [torch.nn.functional.avg_pool2d(maps, resolution) for maps in (student, teacher)]
    stored = torch.from_numpy(average_pool(teacher.numpy(), resolution))
    torch.testing.assert_close(
        heatmap_loss(student, stored, resolution, kind=kind), heatmap_loss(*pooled, kind=kind), rtol=1e-4, atol=1e-6
    )


@every_kind
def test_its_gradient_is_that_of_finite_differences(kind):
    torch.manual_seed(0)
    student = torch.randn(2, 2, 16, 17, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 16, 17, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda maps: heatmap_loss(maps, teacher, kind=kind), student)


def test_the_default_is_the_geometric_mean_l1_over_the_pyramid():
    student, teacher = torch.randn(2, 3, 33, 28), torch.randn(2, 3, 33, 28)
    for i, found in enumerate(heatmap_loss(student, teacher)):
        assert found.item() == pytest.approx(oracles.heatmap_loss(student[i], teacher[i], "l1"), rel=1e-5)


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"student's maps are \(1, 3, 16, 16\), the teacher's \(1, 1, 16, 16\)"):
        heatmap_loss(torch.ones(1, 3, 16, 16), torch.ones(1, 1, 16, 16))


def test_an_unknown_loss_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="unknown map_loss 'l2': choose one of l1, cosine, mse, huber, kl"):
        heatmap_loss(torch.ones(1, 3, 16, 16), torch.ones(1, 3, 16, 16), kind="l2")


@every_kind
@given(scale=st.sampled_from([1e-9, 1.0, 1e9]), side=st.integers(3, 40), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_equal_maps_cost_nothing_and_others_something(scale, side, seed, kind):
    maps = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
    equal, other = heatmap_loss(scale * maps, scale * maps[[0, 0]], kind=kind)
    assert abs(equal.item()) < 2e-6
    assert other.item() > 1e-3


@pytest.mark.parametrize("kind", ["l1", "mse", "huber"])
def test_neither_vanishing_nor_exploding_wins(kind):
    teacher = torch.randn(1, 3, 16, 16)
    near, far = (heatmap_loss(factor * teacher, teacher, kind=kind) for factor in (1.1, 1e-4))
    assert near < 0.2 < 10 < far
    assert heatmap_loss(1e4 * teacher, teacher, kind=kind) > 10


@pytest.mark.parametrize("kind", ["cosine", "kl"])
def test_cosine_and_kl_see_no_scale_and_kl_no_sign(kind):
    student, teacher = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    loss = heatmap_loss(student, teacher, kind=kind)
    for factor in (1e-9, 1e9):
        torch.testing.assert_close(heatmap_loss(factor * student, teacher, kind=kind), loss)
    negated = heatmap_loss(-teacher, teacher, kind=kind)
    torch.testing.assert_close(negated, torch.full((4,), 2.0 if kind == "cosine" else 0.0))


@every_kind
def test_both_maps_may_be_multiplied_by_anything(kind):
    student, teacher = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    for factor in (1e-9, 1e9):
        found = heatmap_loss(factor * student, factor * teacher, kind=kind)
        torch.testing.assert_close(found, heatmap_loss(student, teacher, kind=kind))


@every_kind
@pytest.mark.parametrize("scale", [0, 1e-9, 1, 1e9])
@pytest.mark.parametrize("teachers_scale", [0, 1e-9, 1, 1e9])
def test_losses_and_gradients_are_finite_for_a_students_map_of_zeros_and_of_any_scale(scale, teachers_scale, kind):
    student = (scale * torch.randn(2, 3, 16, 16)).requires_grad_()
    loss = heatmap_loss(student, teachers_scale * torch.randn(2, 3, 16, 16), kind=kind)
    assert torch.isfinite(loss).all()
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.isfinite(gradient).all()


@every_kind
def test_a_teachers_map_of_zeros_teaches_nothing_and_outweighs_nothing(kind):
    student = torch.randn(2, 3, 16, 16, requires_grad=True)
    teacher = torch.randn(2, 3, 16, 16)
    teacher[0] = 0
    loss = heatmap_loss(student, teacher, kind=kind)
    assert loss[0].item() == 0
    assert loss[1].item() > 0
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).any()

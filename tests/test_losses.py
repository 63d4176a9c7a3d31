"""What the heatmap loss promises."""

from __future__ import annotations

import oracles
import pytest
import torch

from teacher_cache import average_pool
from trainer import heatmap_loss


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 33, 17), (2, 64, 20), (3, 8, 8), (3, 5, 6)])
def test_it_equals_the_formula_written_as_loops(shape):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape).double() * 3, torch.randn(2, *shape).double()
    found = heatmap_loss(student, teacher)
    for i in range(2):
        assert abs(found[i].item() - oracles.heatmap_loss(student[i], teacher[i])) < 1e-10


@pytest.mark.parametrize("resolution", [2, 4])
@pytest.mark.parametrize("shape", [(28, 30), (33, 35), (64, 66), (10, 12), (11, 11), (7, 30), (30, 7), (5, 5), (4, 4)])
def test_smaller_maps_of_a_teacher_begin_the_pyramid_at_their_level(shape, resolution):
    """At every size: of 11 pixels that were pooled by 4 there are 2, which is not a fifth of them."""
    student, teacher = torch.randn(2, 3, *shape), torch.randn(2, 3, *shape)
    pooled = [torch.nn.functional.avg_pool2d(maps, resolution) for maps in (student, teacher)]
    stored = torch.from_numpy(average_pool(teacher.numpy(), resolution))
    torch.testing.assert_close(heatmap_loss(student, stored, resolution), heatmap_loss(*pooled))


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"student's maps are \(1, 3, 16, 16\), the teacher's \(1, 1, 16, 16\)"):
        heatmap_loss(torch.ones(1, 3, 16, 16), torch.ones(1, 1, 16, 16))


def test_equal_maps_cost_nothing_and_neither_vanishing_nor_exploding_wins():
    teacher = torch.randn(1, 3, 16, 16)
    assert heatmap_loss(teacher, teacher).item() == 0
    near, far = heatmap_loss(1.1 * teacher, teacher), heatmap_loss(1e-4 * teacher, teacher)
    assert near < 0.2 < 10 < far
    assert heatmap_loss(1e4 * teacher, teacher) > 10


def test_both_maps_may_be_multiplied_by_anything():
    student, teacher = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    for factor in (1e-9, 1e9):
        torch.testing.assert_close(heatmap_loss(factor * student, factor * teacher), heatmap_loss(student, teacher))


def test_maps_of_zeros_give_finite_losses_and_gradients():
    zeros, maps = torch.zeros(1, 3, 16, 16, requires_grad=True), torch.randn(1, 3, 16, 16)
    for student, teacher in ((zeros, torch.zeros(1, 3, 16, 16)), (zeros, maps)):
        loss = heatmap_loss(student, teacher)
        assert torch.isfinite(loss).all()
        (gradient,) = torch.autograd.grad(loss.sum(), zeros)
        assert torch.isfinite(gradient).all()


def test_a_teachers_map_of_zeros_teaches_nothing_and_outweighs_nothing():
    student = torch.randn(2, 3, 16, 16, requires_grad=True)
    teacher = torch.randn(2, 3, 16, 16)
    teacher[0] = 0
    loss = heatmap_loss(student, teacher)
    assert loss[0].item() == 0
    assert loss[1].item() > 0
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).any()

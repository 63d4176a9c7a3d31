"""What Muon promises: orthogonal steps for matrices and kernels, as PyTorch's own takes, and AdamW for the rest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer.loop.muon import BETAS, RMS, Muon, orthogonalised

SIDES = st.integers(2, 40)


@given(rows=SIDES, columns=SIDES, scale=st.floats(1e-3, 1e6), seed=st.integers(0, 99))
def test_a_matrix_becomes_about_orthogonal_whatever_its_shape_and_scale(rows, columns, scale, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = orthogonalised(scale * matrix)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    wanted = s / torch.linalg.vector_norm(s) > 0.01  # what is hardly there stays hardly there
    values = (u.T @ found @ v.T).diagonal()
    assert ((values > 0.6) & (values < 1.25))[wanted].all()
    off_diagonal = u.T @ found @ v.T - values.diag()
    assert off_diagonal.abs().max() < 1e-3
    assert not orthogonalised(torch.zeros(rows, columns)).any()


def gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has one from 2.9 on")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matrices_move_as_by_pytorchs_own_but_for_its_bfloat16(weight_decay):
    ours, theirs = (nn.Linear(24, 16, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    moves = Muon([{"params": [ours.weight], "weight_decay": weight_decay}], lr=0.1)
    expected = torch.optim.Muon([theirs.weight], lr=0.1, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        start = ours.weight.detach().clone()
        for layer, optimizer in ((ours, moves), (theirs, expected)):
            gradients([layer.weight], step)
            optimizer.step()
        moved = ours.weight.detach() - start * (1 - 0.1 * weight_decay)
        assert moved.square().mean().sqrt() == pytest.approx(0.1 * RMS, rel=0.25)
    difference = (ours.weight - theirs.weight).norm() / ours.weight.norm()
    assert difference < 0.01


def test_a_kernel_moves_as_the_matrix_of_its_outputs_in_any_memory_format():
    kernel = nn.Conv2d(4, 8, 3, bias=False).to(memory_format=torch.channels_last)
    matrix = nn.Parameter(kernel.weight.detach().flatten(1).clone())
    moves = [Muon([{"params": [parameter]}], lr=0.1) for parameter in (kernel.weight, matrix)]
    for step in range(3):
        gradients([kernel.weight], step)
        matrix.grad = kernel.weight.grad.flatten(1)
        for optimizer in moves:
            optimizer.step()
    torch.testing.assert_close(kernel.weight.detach().flatten(1), matrix.detach())


def test_what_is_no_matrix_moves_as_by_adamw():
    shapes = [(7,), (1, 5, 6), (6, 1, 1, 1), ()]  # a scale, positions of a transformer, a kernel of one value each
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    moves = Muon([{"params": [nn.Parameter(torch.eye(3)), *ours]}], lr=0.1)
    expected = torch.optim.AdamW(theirs, lr=0.1, betas=BETAS, weight_decay=0)
    for step in range(4):
        for parameters, optimizer in ((ours, moves), (theirs, expected)):
            gradients(parameters, step)
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_parameter_without_a_gradient_stays_and_a_closure_is_called():
    weight = nn.Parameter(torch.eye(3))
    moves = Muon([{"params": [weight, nn.Parameter(torch.ones(2))]}], lr=0.1)
    assert moves.step(lambda: 5.0) == 5.0
    assert torch.equal(weight, torch.eye(3))

"""Norms over the batch: affine maps in the relevance pass, with statistics connected in the outer gradient.

A norm is ``k·z + shift`` with k = γ / σ, and the relevance pass needs k alone. No relevance passes through the
statistics, but a student does not learn if σ is detached from the outer gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_unary

from pipeline.networks.processes import Processes
from pipeline.private_torch import batch_norm_update_stats, native_batch_norm, native_batch_norm_backward
from pipeline.rules.kernels import channels, sum_per_channel
from pipeline.rules.table import PassState, require_constant, rule_for
from pipeline.rules.weighted import norm_behind

if TYPE_CHECKING:
    from pipeline.tracer import Tracer

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # with respect to z, γ and β


class Norm(Protocol):
    def output(self, z: Tensor, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the output, k (C,), and the tensors that `backward` needs."""

    def backward(
        self, g: Tensor | None, dk: Tensor | None, z: Tensor, gamma: Tensor | None, *saved: Tensor
    ) -> Gradients:
        """Return the true gradients from those with respect to the output and k, of which either may be None."""


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """``(z − μ) / σ · γ + β`` with σ = sqrt(E[(z − μ)²] + eps), with the batch's or running statistics."""

    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float

    def output(self, z: Tensor, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor | None, ...]:
        running = (self.running_mean, self.running_var)
        out, mean, inverse = native_batch_norm(z, gamma, beta, *running, self.training, self.momentum, self.eps)
        var = None
        if not self.training:  # the running statistics are buffers that a later step overwrites
            assert self.running_mean is not None
            assert self.running_var is not None
            mean, var = self.running_mean.clone(), self.running_var.clone()
            inverse = torch.rsqrt(var + self.eps)
        return out, _k(gamma, inverse, z), mean, var, inverse

    def backward(
        self, g: Tensor | None, dk: Tensor | None, z: Tensor, gamma: Tensor | None, *saved: Tensor
    ) -> Gradients:
        mean, var, inverse = saved
        dz = dgamma = dbeta = None
        if g is not None:
            if g.stride() != z.stride():  # for two memory layouts the kernel takes ten times as long
                g = torch.empty_like(z, dtype=g.dtype).copy_(g)
            running = (None, None) if self.training else (mean, var)
            mask = [True, gamma is not None, True]
            dz, dgamma, dbeta = native_batch_norm_backward(
                g, z, gamma, *running, mean, inverse, self.training, self.eps, mask
            )
        if dk is None:
            return dz, dgamma, dbeta
        if gamma is not None:
            from_k = dk * inverse
            dgamma = from_k if dgamma is None else dgamma + from_k
        if self.training:  # d(1/σ)/dz = −(z − μ) / (n σ³)
            slope = _slope(dk if gamma is None else dk * gamma, inverse, _count(z)).to(z.dtype)
            dz = z * channels(slope, z) if dz is None else dz.addcmul_(z, channels(slope, z))
            dz -= channels(slope * mean.to(z.dtype), z)
        return dz, dgamma, dbeta


@dataclass(frozen=True, eq=False)
class SecondMomentNorm:
    """``z / σ · γ`` with σ = sqrt(E[z²] + eps) of the batch, or of the batches of all ``processes``, or running."""

    running_second_moment: Tensor
    training: bool
    momentum: float
    eps: float
    processes: Processes | None = None

    def output(self, z: Tensor, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor | None, ...]:
        second_moment = self.running_second_moment
        if self.training:
            second_moment = self._second_moment(z)
            _update(self.momentum, (self.running_second_moment, second_moment))
        inverse = torch.rsqrt(second_moment + self.eps)
        k = _k(gamma, inverse, z)
        return z * channels(k, z), k, inverse

    def backward(
        self, g: Tensor | None, dk: Tensor | None, z: Tensor, gamma: Tensor | None, *saved: Tensor
    ) -> Gradients:
        (inverse,) = saved
        assert gamma is not None
        if self.training and torch.is_grad_enabled():  # a second derivative passes through the statistics too
            inverse = torch.rsqrt(self._second_moment(z) + self.eps)
        at_k, dz = dk, None
        if g is not None:
            _, from_output = _sums(g, z, torch.zeros_like(inverse))
            at_k = from_output if dk is None else dk + from_output
            dz = g * channels(_k(gamma, inverse, z), g)
        assert at_k is not None
        if self.training:  # d(1/σ)/dz = −z / (n σ³)
            at_all, count = _over_all(self.processes, z, at_k)
            slope = channels(_slope(at_all * gamma, inverse, count).to(z.dtype), z)
            dz = z * slope if dz is None else dz.addcmul_(z, slope)
        return dz, at_k * inverse, None

    def _second_moment(self, z: Tensor) -> Tensor:
        squares, count = _over_all(self.processes, z, sum_per_channel(z.square()))
        return squares / count


@dataclass(frozen=True, eq=False)
class FadingBatchNorm:
    """``(z − rμ) / σ · γ + rβ``, σ = sqrt(E[(z − rμ)²] + eps): a `BatchNorm` at r = 1, a `SecondMomentNorm` at 0.

    With ``processes`` the statistics are those of the batches of all of them, in training. The gradients are those of
    the sum of all processes' losses with respect to the tensors of this process: their mean over the processes is the
    gradient of the mean loss.
    """

    running_mean: Tensor | None
    remaining: Tensor | float  # r, without dimensions
    running_second_moment: Tensor | None  # of z − rμ
    training: bool
    momentum: float
    eps: float
    processes: Processes | None = None
    unbiased: bool = False  # whether the running second moment is an unbiased estimate, as PyTorch's variance is

    def output(self, z: Tensor, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor | None, ...]:
        if self.training:
            mean, second_moment, count = self._moments(z)
            self._update(mean, second_moment, count)
        else:
            assert self.running_mean is not None
            assert self.running_second_moment is not None
            mean, second_moment = self.running_mean.clone(), self.running_second_moment
        inverse = torch.rsqrt(second_moment + self.eps)
        scale = inverse if gamma is None else gamma * inverse
        shift = -self.remaining * mean * scale
        if beta is not None:
            shift = shift + self.remaining * beta
        out = torch.addcmul(channels(shift, z), z.to(scale.dtype), channels(scale, z)).to(z.dtype)
        return out, _k(gamma, inverse, z), mean, inverse

    def backward(
        self, g: Tensor | None, dk: Tensor | None, z: Tensor, gamma: Tensor | None, *saved: Tensor
    ) -> Gradients:
        mean, inverse = saved
        if self.training and torch.is_grad_enabled():  # a second derivative passes through the statistics too
            mean, second_moment, _ = self._moments(z)
            inverse = torch.rsqrt(second_moment + self.eps)
        subtracted = self.remaining * mean
        at_shift, at_k = torch.zeros_like(mean), torch.zeros_like(mean) if dk is None else dk.to(mean.dtype)
        scale = inverse if gamma is None else gamma * inverse
        if g is not None:
            at_shift, from_output = _sums(g, z, subtracted)
            at_k = at_k + from_output
        dgamma, dbeta = None if gamma is None else at_k * inverse, None if g is None else self.remaining * at_shift
        if not self.training:
            return None if g is None else (g * channels(scale, g)).to(z.dtype), dgamma, dbeta
        at_shift, at_k, count = _over_all(self.processes, z, at_shift, at_k)
        slope = _slope(at_k if gamma is None else at_k * gamma, inverse, count)
        level = -subtracted * slope - self.remaining * (scale * at_shift / count + (mean - subtracted) * slope)
        dz = torch.addcmul(channels(level, z), z.to(level.dtype), channels(slope, z))
        if g is not None:
            dz.addcmul_(g.to(level.dtype), channels(scale, g))
        return dz.to(z.dtype), dgamma, dbeta

    def _moments(self, z: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Return E[z] and E[(z − rμ)²], (C,), and the number of values in each channel."""
        if self.processes is None and z.numel() and not torch.is_grad_enabled():
            wide = torch.promote_types(z.dtype, torch.float32)
            scratch = z.new_zeros(z.shape[1], dtype=wide)  # whose dtype is that of the results
            (mean, var), count = batch_norm_update_stats(z, scratch, scratch.clone(), 0.0), _count(z)
        else:
            mean, var, count = moments(z, self.processes)
        return mean, var + ((1 - self.remaining) * mean).square(), count

    def _update(self, mean: Tensor, second_moment: Tensor, count: Any) -> None:
        if self.unbiased:
            others = max(count - 1, 1) if isinstance(count, int) else (count - 1).clamp_min(1)
            second_moment = second_moment * (count / others)
        _update(self.momentum, (self.running_mean, mean), (self.running_second_moment, second_moment))


def _sums(g: Tensor, z: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of g and of g · (z − centre) in each channel, (C,)."""
    if torch.is_grad_enabled() or not z.numel():  # of no values, the kernel would crash the process
        g = g.to(centre.dtype)
        return sum_per_channel(g), sum_per_channel(g * (z - channels(centre, z)))
    # a norm whose running statistics are the centre and 1 has these gradients, and its kernel reads g and z once
    running = (centre, torch.ones_like(centre))
    _, weighted, plain = native_batch_norm_backward(g, z, None, *running, None, None, False, 0.0, [False, True, True])
    return plain, weighted


def _k(gamma: Tensor | None, inverse: Tensor, z: Tensor) -> Tensor:
    return (inverse.clone() if gamma is None else gamma * inverse).to(z.dtype)


def _slope(dinverse: Tensor, inverse: Tensor, count: Any) -> Tensor:
    """Return the gradient with respect to z of a gradient with respect to 1/σ, per unit of distance from the mean."""
    return dinverse * inverse**3 / -count


def _update(momentum: float, *pairs: tuple[Tensor | None, Tensor]) -> None:
    """Move running statistics towards those of the latest batch."""
    for running, latest in pairs:
        if running is not None:
            running.lerp_(latest.to(running.dtype), momentum)


def _count(z: Tensor) -> int:
    """Return the number of values of z in each channel."""
    return z.numel() // z.shape[1]


def _over_all(processes: Processes | None, z: Tensor, *sums: Tensor) -> tuple[Any, ...]:
    """Add up sums (C,) over all processes, and the numbers of values of z in each channel."""
    if processes is None:
        return *sums, _count(z)
    wide = torch.promote_types(sums[0].dtype, torch.float32)  # half precision cannot hold the count
    total = processes.total(torch.cat([*sums, sums[0].new_full((1,), _count(z), dtype=wide)]))
    return *total[:-1].chunk(len(sums)), total[-1]


def moments(z: Tensor, processes: Processes | None = None) -> tuple[Tensor, Tensor, Any]:
    """Return mean and biased variance (C,) of z (N, C, ...), and the number of values in each channel.

    Over several processes they follow from each process's mean and squared distances from it (Chan, Golub and LeVeque,
    1979): a sum of squares would lose a small variance far from 0.
    """
    values, count = z.to(torch.promote_types(z.dtype, torch.float32)), _count(z)
    mean = sum_per_channel(values) / max(count, 1)
    squares = sum_per_channel((values - channels(mean, z)).square())
    if processes is None:
        return mean, squares / count, count
    rows = processes.rows(torch.cat([mean, squares, mean.new_full((1,), count)]))
    means, each, counts = rows.split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    return mean, (each + counts * (means - mean).square()).sum(0) / total, total


class _Normalised(Function):
    """norm(z) and k, for a norm without a convolution or linear layer directly before it."""

    @staticmethod
    def forward(
        ctx: Any, state: PassState, z: Tensor, norm: Norm, gamma: Tensor | None, beta: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.state, ctx.norm = state, norm
        out, k, *saved = norm.output(z, gamma, beta)
        ctx.save_for_backward(z, gamma, k, *saved)
        return out, k

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        z, gamma, k, *saved = ctx.saved_tensors
        if ctx.state.epsilon is not None:
            return None, None if g is None else g * channels(k, g), None, None, None
        if g is None and dk is None:
            return (None,) * 5
        dz, dgamma, dbeta = ctx.norm.backward(g, dk, z, gamma, *saved)
        return None, dz, None, dgamma, dbeta if ctx.needs_input_grad[4] else None


def _norm(trace: Tracer, norm: Norm, z: Tensor, gamma: Tensor | None, beta: Tensor | None = None) -> Tensor:
    out = norm_behind(trace, norm, z, gamma, beta)
    return _Normalised.apply(trace.state, z, norm, gamma, beta)[0] if out is None else out


def plain_norm(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    processes: Processes | None,
) -> FadingBatchNorm:
    """Return the norm that ``F.batch_norm`` is, over the batches of all ``processes``."""
    return FadingBatchNorm(running_mean, 1.0, running_var, training, momentum, eps, processes, unbiased=True)


def joint_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    processes: Processes,
) -> Tensor:
    """Compute ``F.batch_norm`` with the statistics of the batches of all ``processes``; for training alone.

    Every process must call it, with a batch (N, C, ...) of any N.

    Raises:
        LostProcess: a process does not.
    """
    if has_torch_function_unary(input):
        vectors = (running_mean, running_var, weight, bias)
        return handle_torch_function(
            joint_batch_norm, (input,), input, *vectors, training, momentum, eps, processes=processes
        )
    norm = plain_norm(running_mean, running_var, True, momentum, eps, processes)
    return _Normalised.apply(PassState(), input, norm, weight, bias)[0]


@rule_for(F.batch_norm, joint_batch_norm)
def batch_norm(
    trace: Tracer,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    processes: Processes | None = None,
) -> Tensor:
    require_constant(trace, func, weight, bias)
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, vector in vectors.items():
        if (
            vector is not None and vector.numel() != input.shape[1]
        ):  # the kernel would read and write past the end of the vector
            raise RuntimeError(f"{name} should contain {input.shape[1]} elements, not {vector.numel()}")
    if processes is None:
        if not input.numel():  # the backward kernel divides by the number of values, which would crash the process
            return func(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if training and input.numel() == input.shape[1]:  # PyTorch's error, before the running variance becomes NaN
            raise ValueError(f"expected more than 1 value per channel when training, got input {tuple(input.shape)}")
    momentum = trace.state.momentum(momentum)
    if processes is not None:
        norm: Norm = plain_norm(running_mean, running_var, training, momentum, eps, processes)
    else:
        norm = BatchNorm(running_mean, running_var, training, momentum, eps)
    return _norm(trace, norm, input, weight, bias)


def scale_norm(
    x: Tensor,
    weight: Tensor,
    running_second_moment: Tensor,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    processes: Processes | None = None,
) -> Tensor:
    """Compute the scale-only norm ``x · γ / sqrt(E[x²] + eps)``: a batch norm with neither mean nor shift.

    Args:
        x: (N, C, ...).
        weight: γ, (C,).
        running_second_moment: the running E[x²], (C,). Training uses the E[x²] of the batch and updates the running one
            in place. Evaluation uses the running one, and the norm is linear.
        training: whether this is training.
        momentum: weight of the batch in the running second moment.
        eps: added to E[x²].
        processes: in training, take E[x²] over the batches of all these processes, each of which must call it.
    """
    options = (running_second_moment, training, momentum, eps, processes)
    if has_torch_function_unary(x):
        return handle_torch_function(scale_norm, (x,), x, weight, *options)
    norm = SecondMomentNorm(*options)
    return _Normalised.apply(PassState(), x, norm, weight, None)[0]


def fading_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    remaining: Tensor,
    running_second_moment: Tensor,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    processes: Processes | None = None,
) -> Tensor:
    """Compute a batch norm of whose mean and shift a share r remains: ``γ · z / sqrt(E[z²] + eps) + r·β``, z = x − r·μ.

    For relevance r·μ and r·β are constants. At r = 1 this is ``F.batch_norm``, at 0 `scale_norm`.

    Args:
        x: (N, C, ...).
        weight: γ, (C,).
        bias: β, (C,).
        running_mean: the running E[x], (C,). Training updates it in place.
        remaining: r in [0, 1], without dimensions.
        running_second_moment: the running E[z²], (C,). Training updates it in place.
        training: whether this is training, which uses the μ and E[z²] of the batch.
        momentum: weight of the batch in the running statistics.
        eps: added to E[z²].
        processes: in training, take μ and E[z²] over the batches of all these processes, each of which must call it.
    """
    options = (running_mean, remaining, running_second_moment, training, momentum, eps, processes)
    if has_torch_function_unary(x):
        return handle_torch_function(fading_norm, (x,), x, weight, bias, *options)
    norm = FadingBatchNorm(*options)
    return _Normalised.apply(PassState(), x, norm, weight, bias)[0]


@rule_for(fading_norm)
def fading_norm_rule(trace: Tracer, func: Any, x: Tensor, weight: Tensor, bias: Tensor, *args: Any) -> Tensor:
    require_constant(trace, func, weight, bias)
    norm = FadingBatchNorm(*args)
    norm = replace(norm, momentum=trace.state.momentum(norm.momentum))
    return _norm(trace, norm, x, weight, bias)


@rule_for(scale_norm)
def scale_norm_rule(trace: Tracer, func: Any, x: Tensor, weight: Tensor, running: Tensor, *args: Any) -> Tensor:
    require_constant(trace, func, weight, running)
    norm = SecondMomentNorm(running, *args)
    norm = replace(norm, momentum=trace.state.momentum(norm.momentum))
    return _norm(trace, norm, x, weight)

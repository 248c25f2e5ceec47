r"""Latent paths with a Matérn prior, and their exact posterior given pseudo-observations, in linear time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpseq.checks import check_count, check_floating
from gpseq.generative.draws import draw_normals
from gpseq.generative.evidence import check_evidence
from gpseq.generative.kalman import (
    METHODS,
    Chain,
    Filtered,
    chain_draw,
    chain_marginals,
    kalman_filter,
    posterior_chain,
    prior_chain,
)
from gpseq.generative.state_space import process_noise, state_dimension, stationary_covariance, transition
from gpseq.prediction_checks import check_generator


class MarkovPrior(nn.Module):
    r"""L independent Gaussian processes of time with a Matérn kernel and unit variance, as Gauss-Markov chains.

    .. math:: f^l \sim GP(0, k_{\nu, \ell_l}), \qquad l = 1, \ldots, L .

    There are no inducing variables: the posterior is exact, for any times, and costs O(n). Draws and predictions are of
    the same exact posterior. A Gaussian process with another variance is this one times a number.

    Args:
        kernel: ``"matern12"``, ``"matern32"`` or ``"matern52"``.
        num_latents: L.
        lengthscale: where the lengthscales start, a positive number or L of them, in the unit of time; trained.
        method: ``"parallel"`` takes 2 log n dependent steps, ``"sequential"`` takes n. Their results agree to rounding;
            the first is faster, also on one core.
        device: of the parameter.
        dtype: of the parameter. The algebra is in float64.

    Attributes:
        raw_lengthscale: ``(L,)``; the lengthscale is its softplus.

    Raises:
        TypeError: a number of latents that is no integer.
        ValueError: arguments out of their range.

    Source:
        Hartikainen and Särkkä (2010), Kalman filtering and smoothing solutions to temporal Gaussian process regression
        models; Zhu, Balsells Rodas and Li (2023), Markovian Gaussian process variational autoencoders.

    Example:
        >>> prior = MarkovPrior("matern32", num_latents=2, lengthscale=0.5)
        >>> x = torch.tensor([0.0, 0.7, 0.1, 3.0])  # in any order
        >>> posterior = prior.posterior(x, mean=torch.ones(2, 4), variance=torch.full((2, 4), 0.1))
        >>> posterior.mean.shape, posterior.kl.shape
        (torch.Size([2, 4]), torch.Size([2]))
        >>> mean, variance = posterior.predict(torch.tensor([0.05, 100.0]))
        >>> variance[0]  # little is unknown between observations, everything far away
        tensor([0.0512, 1.0000], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        kernel: str = "matern32",
        num_latents: int = 1,
        lengthscale: float | Sequence[float] | Tensor = 1.0,
        method: str = "parallel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        state_dimension(kernel)
        check_count("num_latents", num_latents)
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
        try:
            start = torch.as_tensor(lengthscale).detach().to(device="cpu", dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            start = torch.full((), torch.nan)
        if start.shape not in ((), (num_latents,)) or not bool(((start > 0) & start.isfinite()).all()):
            raise ValueError(f"lengthscale: expected a positive number, or {num_latents} of them, got {lengthscale!r}.")
        raw = start + torch.log(-torch.expm1(-start))
        self.kernel, self.num_latents, self.method = kernel, num_latents, method
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.raw_lengthscale = nn.Parameter(raw.expand(num_latents).to(device=device, dtype=dtype, copy=True))

    @property
    def lengthscale(self) -> Tensor:
        """Of each latent, ``(L,)``."""
        return functional.softplus(self.raw_lengthscale)

    def posterior(self, x: Tensor, mean: Tensor, variance: Tensor, missing: Tensor | None = None) -> MarkovPosterior:
        r"""The posterior given a pseudo-observation of every latent at every time.

        .. math:: q(f^l) \propto p(f^l) \prod_t N(\tilde y^l_t \mid f^l(x_t), \tilde v^l_t), \qquad
            KL(q \,\|\, p) = \sum_t E_q \log N(\tilde y_t \mid f_t, \tilde v_t) - \log Z .

        Args:
            x: times, ``(*b, n)``, in any order, repeats allowed; leading dimensions may be left out where all series
                have the same.
            mean: pseudo-observations, ``(*b, L, n)``.
            variance: of their noise, positive, ``(*b, L, n)``.
            missing: bool, ``(*b, n)`` or as ``x`` without leading dimensions; ``True`` where there is none, and then
                ``mean`` and ``variance`` may be anything. ``None`` means that all are there.

        Returns:
            The posterior, in the dtype of ``mean``.

        Raises:
            TypeError: numbers that are not floating, or a ``missing`` that is not bool.
            ValueError: shapes that do not fit, no times, times that are not finite, and, where not missing,
                pseudo-observations that are not finite or variances that are not positive and finite.
        """
        times, values, variances, gone = self._observations(x, mean, variance, missing)
        values = torch.where(gone, 0.0, values)
        precisions = torch.where(gone, 0.0, torch.where(gone, 1.0, variances).reciprocal())
        lengthscale = self.lengthscale.double()
        none = times[..., :0]
        found = _merge(self.kernel, lengthscale, times, values, precisions, none, self.method)
        moments, covariance = chain_marginals(found.chain, self.method)
        m, s2 = found.restore(moments[..., 0]), found.restore(covariance[..., 0, 0])
        odds = found.precisions * found.filtered.predicted_covariance[..., 0, 0]
        surprise = found.precisions * (found.values - found.filtered.predicted_mean[..., 0]).square() / (1 + odds)
        # Of E_q log N - log Z the constants cancel: what is left of a missing observation is exactly zero.
        kl = 0.5 * (odds.log1p() + surprise).sum(-1) - 0.5 * (precisions * ((values - m).square() + s2)).sum(-1)
        return MarkovPosterior(
            mean=m.to(mean.dtype),
            variance=s2.to(mean.dtype),
            kl=kl.to(mean.dtype),
            log_evidence=found.filtered.log_evidence.to(mean.dtype),
            kernel=self.kernel,
            lengthscale=lengthscale,
            times=times,
            values=values,
            precisions=precisions,
            method=self.method,
        )

    def rsample(self, x: Tensor, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """Joint draws of the paths before any observation.

        Args:
            x: times, ``(*b, n)``, in any order, repeats allowed.
            sample_shape: s.
            generator: of the draws; ``None`` is torch's default.

        Returns:
            ``(*s, *b, L, n)``, in the dtype of ``x``.

        Raises:
            TypeError: times that are not floating, or a generator that is none.
            ValueError: no times, or times that are not finite.
        """
        check_generator(generator)
        times = _check_times("x", x)
        if not times.shape[-1]:
            raise ValueError(f"x: expected at least one time, got shape {tuple(x.shape)}.")
        ordered, order = times.sort(-1)
        A, Q = _chain_of(self.kernel, self.lengthscale.double(), ordered)
        normals = draw_normals((*sample_shape, *A.shape[:-1]), A, generator)
        paths = chain_draw(prior_chain(A, Q), normals, self.method)[..., 0]
        return _take(paths, order.argsort(-1)).to(x.dtype)

    def extra_repr(self) -> str:
        """What the prior was made with."""
        return f"{self.kernel!r}, num_latents={self.num_latents}, method={self.method!r}"

    def _observations(
        self, x: Tensor, mean: Tensor, variance: Tensor, missing: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Checked, in float64: times ``(*b, n)``, values and variances ``(*b, L, n)``, and missing ``(*b, 1, n)``."""
        for name, value in (("x", x), ("mean", mean), ("variance", variance)):
            check_floating(name, value)
        if mean.dim() < 2 or mean.shape[-2] != self.num_latents or not mean.shape[-1]:
            raise ValueError(f"mean: expected shape (*b, {self.num_latents}, n), n > 0, got {tuple(mean.shape)}.")
        series = (*mean.shape[:-2], mean.shape[-1])
        times = _fit("x", x, series).double().clone()  # the posterior keeps them
        if missing is None:
            gone = torch.zeros((), dtype=torch.bool, device=x.device).expand(series)
        elif missing.dtype != torch.bool:
            raise TypeError(f"missing: expected a bool tensor, got {missing.dtype}.")
        else:
            gone = _fit("missing", missing, series)
        check_evidence(times, mean, variance, gone)
        return times, mean.double(), variance.double(), gone.unsqueeze(-2)


@dataclass(frozen=True, eq=False)
class MarkovPosterior:
    """Latent paths given pseudo-observations: their marginals at the observed times, and whatever is asked at others.

    It is a value: later steps of training do not change it. Gradients flow through everything, to the
    pseudo-observations and to the lengthscales.

    Attributes:
        mean: of the latents at the times of the pseudo-observations, ``(*b, L, n)``.
        variance: the same.
        kl: KL(q(f) || p(f)) of the whole paths, ``(*b, L)``.
        log_evidence: log density of the pseudo-observations under the prior, ``(*b, L)``.
        kernel: of the prior.
        lengthscale: ``(L,)``.
        times: ``(*b, n)``.
        values: pseudo-observations, ``(*b, L, n)``, zero where missing.
        precisions: of their noise, ``(*b, L, n)``, zero where missing.
        method: of the recursions.
    """

    mean: Tensor
    variance: Tensor
    kl: Tensor
    log_evidence: Tensor
    kernel: str
    lengthscale: Tensor
    times: Tensor
    values: Tensor
    precisions: Tensor
    method: str

    def predict(self, x_new: Tensor) -> tuple[Tensor, Tensor]:
        """Marginals at any times, found as those of missing observations.

        Args:
            x_new: ``(*b, m)``, in any order, repeats allowed; leading dimensions may be left out.

        Returns:
            Mean and variance, ``(*b, L, m)``.

        Raises:
            TypeError: times that are not floating.
            ValueError: times that are not finite, or a shape that does not fit.
        """
        found = self._with(x_new)
        mean, covariance = chain_marginals(found.chain, self.method)
        new = slice(self.times.shape[-1], None)
        mean, variance = found.restore(mean[..., 0])[..., new], found.restore(covariance[..., 0, 0])[..., new]
        return mean.to(self.mean.dtype), variance.to(self.mean.dtype)

    def rsample(
        self,
        x_new: Tensor | None = None,
        sample_shape: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Joint draws of the paths, from the last time to the first.

        Args:
            x_new: ``(*b, m)``, in any order, repeats allowed; leading dimensions may be left out. ``None`` means the
                times of the pseudo-observations.
            sample_shape: s.
            generator: of the draws; ``None`` is torch's default.

        Returns:
            ``(*s, *b, L, m)``.

        Raises:
            TypeError: times that are not floating, or a generator that is none.
            ValueError: times that are not finite, or a shape that does not fit.
        """
        check_generator(generator)
        found = self._with(self.times[..., :0] if x_new is None else x_new)
        shift = found.chain.shift
        normals = draw_normals((*sample_shape, *shift.shape), shift, generator)
        paths = found.restore(chain_draw(found.chain, normals, self.method)[..., 0])
        return (paths if x_new is None else paths[..., self.times.shape[-1] :]).to(self.mean.dtype)

    def _with(self, x_new: Tensor) -> _Merged:
        new = _check_times("x_new", x_new)
        new = _fit("x_new", new, (*self.times.shape[:-1], new.shape[-1]))
        return _merge(self.kernel, self.lengthscale, self.times, self.values, self.precisions, new, self.method)


@dataclass(frozen=True)
class _Merged:
    """Observed and new times in one order, filtered, and the way back to the caller's order."""

    values: Tensor
    precisions: Tensor
    filtered: Filtered
    chain: Chain
    back: Tensor

    def restore(self, value: Tensor) -> Tensor:
        return _take(value, self.back)


def _merge(
    kernel: str, lengthscale: Tensor, times: Tensor, values: Tensor, precisions: Tensor, new: Tensor, method: str
) -> _Merged:
    ordered, order = torch.cat([times, new], -1).sort(-1)
    more = (0, new.shape[-1])
    values, precisions = (_take(functional.pad(value, more), order) for value in (values, precisions))
    A, Q = _chain_of(kernel, lengthscale, ordered)
    filtered = kalman_filter(A, Q, values, precisions, method)
    return _Merged(values, precisions, filtered, posterior_chain(A, Q, filtered), order.argsort(-1))


def _chain_of(kernel: str, lengthscale: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Transitions and noises, ``(*b, L, n, S, S)``, of sorted times ``(*b, n)``."""
    gap, scale = times.diff(dim=-1).unsqueeze(-2), lengthscale.unsqueeze(-1)
    A, Q = transition(kernel, gap, scale), process_noise(kernel, gap, scale)
    start = stationary_covariance(kernel, device=times.device).expand(*A.shape[:-3], 1, *A.shape[-2:])
    A, Q = _start_with(torch.zeros_like(start), A), _start_with(start, Q)
    return A, Q


def _start_with(start: Tensor, rest: Tensor) -> Tensor:
    """Joined along time, with the axes of the state first in memory, as the recursions want them."""
    parts = [part.movedim((-2, -1), (0, 1)) for part in (start, rest)]
    return torch.cat(parts, -1).movedim((0, 1), (-2, -1))


def _take(value: Tensor, order: Tensor) -> Tensor:
    """``(..., *b, L, n)`` in an order ``(*b, n)`` of its last axis."""
    return value.gather(-1, order.unsqueeze(-2).expand(value.shape))


def _check_times(name: str, x: Tensor) -> Tensor:
    """Finite times ``(*b, n)`` in float64."""
    check_floating(name, x)
    if x.dim() < 1:
        raise ValueError(f"{name}: expected times of shape (*b, n), got a scalar.")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name}: expected finite times, got some that are not.")
    return x.double()


def _fit(name: str, value: Tensor, shape: Sequence[int]) -> Tensor:
    """``(*b, n)`` from itself or from fewer leading dimensions."""
    if value.dim() < 1 or value.shape[-1] != shape[-1] or value.dim() > len(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}.")
    try:
        return value.expand(tuple(shape))
    except RuntimeError as error:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}.") from error

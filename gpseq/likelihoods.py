r"""Likelihoods of counts, with the log link: the mean of y is exp(f).

GPyTorch has classes of the same names with another link (softplus), and another parameter in the negative binomial.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from gpytorch.constraints import Interval, Positive
from gpytorch.distributions import MultivariateNormal, base_distributions
from gpytorch.likelihoods import Likelihood
from gpytorch.priors import Prior
from torch import Tensor
from torch.nn.functional import logsigmoid

from gpseq.checks import check_count

__all__ = ["NegativeBinomialLikelihood", "PoissonLikelihood"]

# The trapezoidal rule converges exponentially for analytic integrands that vanish at both ends, and gains more from
# each node than Gauss-Hermite where f is uncertain. Beyond 8.5 standard deviations lies 1e-17 of a Gaussian.
_NODES = 128
_WIDTH = 8.5
_DROP = 40.0  # exp(-40) of the peak is below the resolution of float64
_LARGEST = 2.0**53  # whole numbers beyond are not all representable


class _CountLikelihood(Likelihood):
    """Counts y >= 0 whose log density is ``kernel(y, f) + constant(y)``, concave in f.

    Everything is computed in float64, since terms of size y log y cancel, and returned in the dtype of f. Nodes of
    integrals are the first axis, so that parameters ``(*batch_shape, 1)`` broadcast.
    """

    # Concave log p(y | f): updates of sites by Newton steps need no damping against negative precisions.
    log_concave = True

    def __init__(self, validate_args: bool = True, max_plate_nesting: int = 1) -> None:
        super().__init__(max_plate_nesting=max_plate_nesting)
        self.validate_args = validate_args

    @abstractmethod
    def _kernel(self, y: Tensor, f: Tensor) -> Tensor:
        """The part of log p(y | f) that depends on f."""

    @abstractmethod
    def _constant(self, y: Tensor) -> Tensor:
        """The other part."""

    @abstractmethod
    def _derivatives(self, y: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """First derivative of the kernel in f, and minus the second."""

    @abstractmethod
    def _expected_kernel(self, y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """The kernel averaged over f ~ N(mean, variance)."""

    @abstractmethod
    def _overdispersion(self, second_moment: Tensor) -> Tensor | float:
        """What the variance of y has beyond its mean, for given E[exp(2 f)]."""

    def check_targets(self, y: Tensor) -> None:
        """Refuse what is no count. NaN passes.

        Args:
            y: observations, of any shape.

        Raises:
            ValueError: some are negative, infinite or not whole.

        Example:
            >>> PoissonLikelihood().check_targets(torch.tensor([0.0, 2.5]))
            Traceback (most recent call last):
            ...
            ValueError: y: expected counts 0, 1, 2, ..., got 2.5 (1 of 2 entries are none).
        """
        bad = ((y < 0) | (y != y.floor()) | y.isinf()) & ~y.isnan()
        if bad.any():
            first = y[bad].flatten()[0].item()
            raise ValueError(
                f"y: expected counts 0, 1, 2, ..., got {first} ({int(bad.sum())} of {y.numel()} entries are none)."
            )

    def expected_log_prob(
        self, observations: Tensor, function_dist: MultivariateNormal, *args: Any, **kwargs: Any
    ) -> Tensor:
        r"""Expected log density of each observation, :math:`E_{q(f_i)} \log p(y_i \mid f_i)`, constants included.

        Args:
            observations: counts y, ``(*batch, n)``.
            function_dist: q(f), over ``(*batch, n)`` values; its marginals count.
            args: ignored, as in GPyTorch's likelihoods of one dimension.
            kwargs: ignored.

        Returns:
            ``(*batch, n)``, in nats, in the dtype of f; NaN where y is.

        Raises:
            ValueError: an observation is no count, see :meth:`check_targets`.
        """
        y, mean, variance = self._prepare(observations, function_dist)
        return (self._expected_kernel(y, mean, variance) + self._constant(y)).to(function_dist.mean.dtype)

    def log_marginal(
        self, observations: Tensor, function_dist: MultivariateNormal, *args: Any, **kwargs: Any
    ) -> Tensor:
        r"""Log predictive density of each observation, :math:`\log E_{q(f_i)} p(y_i \mid f_i)`.

        With f = m + s z, the integrand in z is log-concave. Its mode is found by bracketed Newton steps, then the two
        points where it has fallen by exp(-40), and the trapezoidal rule between them does the rest: no matter whether
        q or the likelihood is the narrower, and how far apart they are. The error is below 1e-9 for variances up
        to 16 and about 1e-6 at 100.

        Args:
            observations: counts y, ``(*batch, n)``.
            function_dist: q(f), over ``(*batch, n)`` values; its marginals count.
            args: ignored, as in GPyTorch's likelihoods of one dimension.
            kwargs: ignored.

        Returns:
            ``(*batch, n)``, in nats, in the dtype of f; NaN where y is.

        Raises:
            ValueError: an observation is no count, see :meth:`check_targets`.
        """
        y, mean, variance = self._prepare(observations, function_dist)
        scale = _standard_deviation(variance)

        def log_integrand(z: Tensor) -> Tensor:
            return self._kernel(y, mean + scale * z) - 0.5 * z.square()

        # The integral does not depend on where its nodes are, and so its gradient needs none of theirs.
        with torch.no_grad():
            mode = self._mode(y, mean, scale)
            left, right = _reach(log_integrand, mode, -1), _reach(log_integrand, mode, 1)
            grid = torch.linspace(0, 1, _NODES, dtype=mode.dtype, device=mode.device)
            z = mode - left + (left + right) * _column(grid, mode)
            log_step = ((left + right) / (_NODES - 1)).log()
        integral = log_integrand(z).logsumexp(0) + log_step - 0.5 * math.log(2 * math.pi)
        return (integral + self._constant(y)).to(function_dist.mean.dtype)

    def predictive_moments(self, function_dist: MultivariateNormal) -> tuple[Tensor, Tensor]:
        r"""Mean and variance of each observation under :math:`p(y_i) = E_{q(f_i)} p(y_i \mid f_i)`, in closed form.

        .. math::
            E\,y = e^{m + v/2}, \qquad
            \mathrm{Var}\,y = E\,y + (E\,y)^2 (e^v - 1) + \tfrac1r e^{2m + 2v},

        where the last term is the negative binomial's.

        Args:
            function_dist: q(f), over ``(*batch, n)`` values.

        Returns:
            Mean and variance, ``(*batch, n)`` each, in the dtype of f.

        Example:
            >>> q = MultivariateNormal(torch.zeros(1), torch.eye(1))
            >>> PoissonLikelihood().predictive_moments(q)
            (tensor([1.6487]), tensor([6.3195]))
        """
        mean, variance = function_dist.mean.double(), function_dist.variance.double()
        first = torch.exp(mean + 0.5 * variance)
        second = first + first.square() * torch.expm1(variance) + self._overdispersion(torch.exp(2 * (mean + variance)))
        dtype = function_dist.mean.dtype
        return first.expand(second.shape).to(dtype), second.to(dtype)

    @torch.no_grad()
    def quantile(self, function_dist: MultivariateNormal, q: Tensor | float, num_nodes: int = 48) -> Tensor:
        r"""Quantiles of each observation under :math:`p(y_i) = E_{q(f_i)} p(y_i \mid f_i)`.

        The smallest k with :math:`P(y_i \le k) \ge q`, by bisection. Without gradients.

        Args:
            function_dist: q(f), over ``(*batch, n)`` values.
            q: levels between 0 and 1; a tensor broadcasts against ``(*batch, n)``, so that levels of shape
                ``(Q, 1)`` give ``(Q, n)``.
            num_nodes: of each of the four pieces that the integral is cut into.

        Returns:
            ``(*batch, n)``, whole numbers in the dtype of f; infinite beyond 2^53.

        Raises:
            ValueError: a level is not between 0 and 1.
            TypeError: ``num_nodes`` is no integer.

        Example:
            >>> f = MultivariateNormal(torch.tensor([0.0, 3.0]), 0.1 * torch.eye(2))
            >>> PoissonLikelihood().quantile(f, torch.tensor([[0.05], [0.95]]))
            tensor([[ 0., 10.],
                    [ 3., 36.]])
        """
        check_count("num_nodes", num_nodes)
        mean = function_dist.mean.double()
        scale = _standard_deviation(function_dist.variance.double())
        level = torch.as_tensor(q, dtype=mean.dtype, device=mean.device)
        if not ((level > 0) & (level < 1)).all():
            raise ValueError(f"q: expected levels between 0 and 1, got {q!r}.")
        cdf = self._cdf
        low = torch.full_like(mean + level + self._constant(torch.zeros_like(mean)), -1.0)  # in the full shape
        # A first guess leaves out the noise of y, and doubling repairs that.
        high = torch.exp(mean + scale * torch.special.ndtri(level)).clamp(max=_LARGEST).floor().expand(low.shape)
        while (short := (cdf(high, mean, scale, num_nodes) < level) & (high < _LARGEST)).any():
            low = torch.where(short, high, low)
            high = torch.where(short, 2 * high + 1, high).clamp(max=_LARGEST)
        while (high - low > 1).any():
            middle = ((low + high) / 2).floor()
            # Once an interval is closed its middle is its low end, which is short already.
            short = (middle <= low) | (cdf(middle, mean, scale, num_nodes) < level)
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        result = torch.where(high < _LARGEST, high, math.inf)
        return torch.where(mean.isnan() | scale.isnan(), math.nan, result).to(function_dist.mean.dtype)

    def _cdf(self, k: Tensor, mean: Tensor, scale: Tensor, num_nodes: int) -> Tensor:
        r"""P(y <= k) under the marginal, for whole k >= 0.

        As a function of f, P(y <= k | f) falls from 1 to 0: it is P(X > f) for an X with log density
        kernel(k + 1, x) + constant (the log of a gamma variable, or of a ratio of two). So P(y <= k) is
        E Phi((X - m) / s), where nothing but the kernel is needed. The pieces between the mode of X, the ends of its
        range and the ends of the slope of Phi resolve both factors, whichever is the narrower.
        """
        k, mean, scale, _ = torch.broadcast_tensors(k, mean, scale, self._constant(k))
        mode = (k + 1).log()
        top = self._kernel(k + 1, mode)

        def log_density(x: Tensor) -> Tensor:
            return self._kernel(k + 1, x) - top

        low, high = mode - _reach(log_density, mode, -1), mode + _reach(log_density, mode, 1)
        cuts = torch.stack([low, mean - _WIDTH * scale, mode, mean + _WIDTH * scale, high])
        cuts = cuts.clamp(low, high).sort(0).values
        start, half = cuts[:-1], 0.5 * cuts.diff(dim=0)
        total = upper = torch.zeros_like(mode)
        for location, weight in _legendre(num_nodes):
            x = start + half * (1 + location)
            mass = weight * half * log_density(x).exp()
            total = total + mass.sum(0)
            upper = upper + (mass * torch.special.ndtr((x - mean) / scale)).sum(0)
        return upper / total

    def _prepare(self, observations: Tensor, function_dist: MultivariateNormal) -> tuple[Tensor, Tensor, Tensor]:
        """Observations, means and variances in float64."""
        if self.validate_args:
            self.check_targets(observations)
        return observations.double(), function_dist.mean.double(), function_dist.variance.double()

    def _mode(self, y: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """Where log p(y | mean + scale z) - z^2 / 2 is greatest."""

        def slope(z: Tensor) -> tuple[Tensor, Tensor]:
            first, information = self._derivatives(y, mean + scale * z)
            return scale * first - z, 1 + scale.square() * information

        # At the mode z = scale * derivative, and the derivative decreases: z lies between 0 and the slope at 0.
        z = torch.zeros_like(mean + scale + y)
        value, curvature = slope(z)
        z = z.expand(value.shape)
        value = value.nan_to_num(nan=0.0)
        low, high = value.clamp(max=0), value.clamp(min=0)
        for step in range(60):
            # Newton steps down an exponential are all of length one, hence bisection at every second step; on the
            # scale of asinh, because the bracket may be exp(mean) wide.
            middle = torch.sinh(0.5 * (torch.asinh(low) + torch.asinh(high)))
            newton = z + value / curvature
            z = torch.where((newton >= low) & (newton <= high), newton, middle) if step % 2 else middle
            value, curvature = slope(z)
            low, high = torch.where(value > 0, z, low), torch.where(value > 0, high, z)
        return z


class PoissonLikelihood(_CountLikelihood):
    r"""Poisson counts with the log link.

    .. math::
        p(y \mid f) = \mathrm{Poisson}(y \mid e^f), \qquad
        E_{N(f \mid m, v)} \log p(y \mid f) = y m - e^{m + v/2} - \log \Gamma(y + 1) .

    Called with a tensor of function values it is the conditional distribution; called with a distribution of f,
    ``(*batch, n)``, a batch of conditional distributions at samples of f, ``(num_likelihood_samples, *batch, n)``.
    Everything else is exact, or integrated to about the precision of float64.

    Args:
        validate_args: refuse observations that are no counts, which waits for the device.

    Source:
        Diggle, Tawn and Moyeed (1998), Model-based geostatistics (the log-Gaussian Poisson model).

    Example:
        >>> likelihood = PoissonLikelihood()
        >>> likelihood(torch.zeros(3)).mean
        tensor([1., 1., 1.])
        >>> f = MultivariateNormal(torch.zeros(3), torch.eye(3))
        >>> likelihood.expected_log_prob(torch.tensor([0.0, 1.0, 2.0]), f)
        tensor([-1.6487, -1.6487, -2.3419])
    """

    def forward(self, function_samples: Tensor, *args: Any, **kwargs: Any) -> torch.distributions.Distribution:
        """Conditional distribution of the counts.

        Args:
            function_samples: f, of any shape.
            args: ignored.
            kwargs: ignored.

        Returns:
            Poisson distributions with rate exp(f).
        """
        return base_distributions.Poisson(function_samples.exp(), validate_args=self.validate_args)

    def _kernel(self, y: Tensor, f: Tensor) -> Tensor:
        return y * f - f.exp()

    def _constant(self, y: Tensor) -> Tensor:
        return -torch.lgamma(y + 1)

    def _derivatives(self, y: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        rate = f.exp()
        return y - rate, rate

    def _expected_kernel(self, y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return y * mean - torch.exp(mean + 0.5 * variance)

    def _overdispersion(self, second_moment: Tensor) -> Tensor | float:
        return 0.0


class NegativeBinomialLikelihood(_CountLikelihood):
    r"""Negative binomial counts with the log link and a learnable dispersion r.

    The mean is :math:`e^f` and the variance :math:`e^f + e^{2f} / r`; a large r is nearly Poisson.

    .. math::
        \log p(y \mid f) = \log \frac{\Gamma(y + r)}{\Gamma(r)\, \Gamma(y + 1)}
            + y (f - \log r) - (y + r) \log\big(1 + e^{f - \log r}\big) .

    Called with a tensor of function values it is the conditional distribution; called with a distribution of f,
    ``(*batch, n)``, a batch of conditional distributions at samples of f, ``(num_likelihood_samples, *batch, n)``.
    Of the expected log density all is exact but the last term, which is integrated by the trapezoidal rule: to
    rounding for variances of f up to 16, and with an error of about (y + r) 1e-7 at a variance of 100.

    Args:
        dispersion_prior: prior of r, which GPyTorch's objectives add.
        dispersion_constraint: where r may lie; positive by default.
        batch_shape: of r.
        validate_args: refuse observations that are no counts, which waits for the device.

    Attributes:
        dispersion: r, ``(*batch_shape, 1)``, at first 10; its parameter is ``raw_dispersion``.

    Source:
        Hilbe (2011), Negative Binomial Regression (the form NB2).

    Example:
        >>> likelihood = NegativeBinomialLikelihood()
        >>> likelihood.dispersion = 4.0
        >>> likelihood(torch.zeros(2)).variance
        tensor([1.2500, 1.2500], grad_fn=...)
        >>> f = MultivariateNormal(torch.zeros(3), torch.eye(3))
        >>> likelihood.expected_log_prob(torch.tensor([0.0, 1.0, 2.0]), f).shape
        torch.Size([3])
    """

    def __init__(
        self,
        dispersion_prior: Prior | None = None,
        dispersion_constraint: Interval | None = None,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008
        validate_args: bool = True,
    ) -> None:
        # GPyTorch leaves room for so many batch dimensions right of the samples of f, and so r broadcasts with them.
        super().__init__(validate_args=validate_args, max_plate_nesting=len(batch_shape) + 1)
        self.register_parameter("raw_dispersion", torch.nn.Parameter(torch.zeros(*batch_shape, 1)))
        if dispersion_prior is not None:
            self.register_prior("dispersion_prior", dispersion_prior, _get_dispersion, _set_dispersion)
        constraint = Positive() if dispersion_constraint is None else dispersion_constraint
        self.register_constraint("raw_dispersion", constraint)
        # A constraint that excludes 10 begins in its own way, as GPyTorch's do.
        if constraint.check(torch.tensor(10.0)) and constraint.initial_value is None:
            self.dispersion = 10.0

    @property
    def dispersion(self) -> Tensor:
        """Dispersion r, ``(*batch_shape, 1)``: the variance of y is its mean plus mean^2 / r."""
        return self.raw_dispersion_constraint.transform(self.raw_dispersion)

    @dispersion.setter
    def dispersion(self, value: Tensor | float) -> None:
        value = torch.as_tensor(value).to(self.raw_dispersion)
        self.initialize(raw_dispersion=self.raw_dispersion_constraint.inverse_transform(value))

    def forward(self, function_samples: Tensor, *args: Any, **kwargs: Any) -> torch.distributions.Distribution:
        """Conditional distribution of the counts.

        Args:
            function_samples: f, ``(*sample, *batch, n)``.
            args: ignored.
            kwargs: ignored.

        Returns:
            Negative binomial distributions with mean exp(f).
        """
        r = self.dispersion.to(function_samples)
        return base_distributions.NegativeBinomial(
            r, logits=function_samples - r.log(), validate_args=self.validate_args
        )

    def _kernel(self, y: Tensor, f: Tensor) -> Tensor:
        # Relative to log r, so that nothing of size r log r cancels when r is large.
        r = self.dispersion.double()
        a = f - r.log()
        return y * a + (y + r) * logsigmoid(-a)

    def _constant(self, y: Tensor) -> Tensor:
        r = self.dispersion.double()
        return torch.lgamma(y + r) - torch.lgamma(r) - torch.lgamma(y + 1)

    def _derivatives(self, y: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        r = self.dispersion.double()
        a = f - r.log()
        share = torch.sigmoid(a)
        return y - (y + r) * share, (y + r) * share * torch.sigmoid(-a)

    def _expected_kernel(self, y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        r = self.dispersion.double()
        a = mean - r.log()
        z = torch.linspace(-_WIDTH, _WIDTH, _NODES, dtype=a.dtype, device=a.device)
        weights = torch.softmax(-0.5 * z.square(), 0)
        nodes = a + _standard_deviation(variance) * _column(z, a)
        # GPyTorch's and torch's softplus is linear beyond 20, which is 2e-9 off.
        return y * a + (y + r) * (_column(weights, a) * logsigmoid(-nodes)).sum(0)

    def _overdispersion(self, second_moment: Tensor) -> Tensor | float:
        return second_moment / self.dispersion.double()


# Functions with names, so that a likelihood with a prior can be pickled.
def _get_dispersion(likelihood: NegativeBinomialLikelihood) -> Tensor:
    return likelihood.dispersion


def _set_dispersion(likelihood: NegativeBinomialLikelihood, value: Tensor) -> None:
    likelihood.dispersion = value


def _standard_deviation(variance: Tensor) -> Tensor:
    """Square root, kept away from 0, where its gradient is infinite and that of every expectation is not."""
    return (variance + (variance.clamp(min=1e-14) - variance).detach()).sqrt()


def _column(vector: Tensor, like: Tensor) -> Tensor:
    """A vector as the first axis before those of ``like``."""
    return vector.reshape(-1, *[1] * like.dim())


def _reach(log_density: Callable[[Tensor], Tensor], mode: Tensor, direction: int) -> Tensor:
    """How far from its mode a log-concave density falls by exp(-40), within a few per mille."""
    floor = log_density(mode) - _DROP
    low, high = torch.full_like(floor, -20.0), torch.full_like(floor, 20.0)  # logarithms of the distance
    for _ in range(14):
        middle = 0.5 * (low + high)
        inside = log_density(mode + direction * middle.exp()) > floor
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return high.exp()


@lru_cache(maxsize=8)
def _legendre(num_nodes: int) -> tuple[tuple[float, float], ...]:
    """Locations and weights of Gauss-Legendre quadrature on [-1, 1]."""
    locations, weights = np.polynomial.legendre.leggauss(num_nodes)
    return tuple(zip(locations.tolist(), weights.tolist(), strict=True))

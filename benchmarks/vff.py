r"""Variational Fourier features on an interval that is known in advance: a peer of the memories.

The inducing variables are inner products of f with sines and cosines in the Hilbert space H of a Matern kernel on
[a, b], :math:`u_m = \langle f, \phi_m \rangle_H`. So the covariance with f is the feature itself and that of the
inducing variables a diagonal plus a matrix of low rank,

.. math:: \mathrm{Cov}(u_m, f(x)) = \phi_m(x), \qquad K_{uu} = D + F^\top P^{-1} F .

The basis never changes. Streaming is therefore plain accumulation, and the posterior that of the batch; the price is
that the last time has to be known before the first datum. What sines and cosines of whole periods can never represent,
however many there are, is the part of f that differs between the two ends. It is felt within a few lengthscales of
them, so the interval has to reach beyond the data.

Source:
    Hensman, Durrande and Solin (2018), Variational Fourier features for Gaussian processes. The inner products are
    derived here for all orders at once from the kernel's stochastic differential equation
    :math:`(\lambda + d/dx)^{p+1} f = w`: with q the density of the white noise w and P the covariance of
    :math:`s = (f, f', \dots, f^{(p)})` at one place,

    .. math::
        \langle g, h \rangle_H = s_g(a)^\top P^{-1} s_h(a)
        + \tfrac1q \int_a^b \bigl((\lambda + \tfrac{d}{dx})^{p+1} g\bigr)\bigl((\lambda + \tfrac{d}{dx})^{p+1} h\bigr) .
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor


@dataclass(frozen=True)
class FourierFeatures:
    """A constant, and cosines and sines of whole periods on [a, b], in the space of a Matern kernel.

    Attributes:
        a: start of the interval.
        b: its end.
        num_frequencies: J; there are 2 J + 1 features.
        order: p, so that the smoothness of the kernel is p + 1/2: 0, 1 or 2.
        lengthscale: of the kernel.
        variance: of the kernel.
    """

    a: float
    b: float
    num_frequencies: int
    order: int
    lengthscale: float
    variance: float

    @property
    def rate(self) -> float:
        r""":math:`\lambda = \sqrt{2 p + 1} / \ell`."""
        return math.sqrt(2 * self.order + 1) / self.lengthscale

    @property
    def frequencies(self) -> Tensor:
        """Angular, ``(J,)``."""
        return 2 * math.pi * torch.arange(1, self.num_frequencies + 1, dtype=torch.float64) / (self.b - self.a)

    def values(self, x: Tensor) -> Tensor:
        """The features, which are the covariances with f, ``(2 J + 1, n)``, for x in [a, b]."""
        if len(x) and (x.min() < self.a or x.max() > self.b):
            raise ValueError(f"x: expected times in [{self.a:g}, {self.b:g}], got {x.min():g} to {x.max():g}.")
        phase = self.frequencies.unsqueeze(-1) * (x.double() - self.a)
        return torch.cat([torch.ones(1, len(x), dtype=torch.float64), phase.cos(), phase.sin()])

    def kuu(self) -> Tensor:
        """Covariance of the inducing variables, ``(2 J + 1, 2 J + 1)``."""
        rate, p, w = self.rate, self.order, self.frequencies
        noise = self.variance * (2 * rate) ** (2 * p + 1) * math.factorial(p) ** 2 / math.factorial(2 * p)
        # The operator turns exp(iwx) into (rate + iw)^(p+1) exp(iwx), and over whole periods all is orthogonal.
        power = (rate**2 + w.square()) ** (p + 1) * (self.b - self.a) / 2
        constant = torch.tensor([rate ** (2 * p + 2) * (self.b - self.a)], dtype=torch.float64)
        at_start = self._derivatives()
        boundary = at_start.mT @ torch.linalg.solve(self._stationary(), at_start)
        return torch.diag(torch.cat([constant, power, power])) / noise + 0.5 * (boundary + boundary.mT)

    def _derivatives(self) -> Tensor:
        """Of the features at a, from none to p, ``(p + 1, 2 J + 1)``."""
        w = self.frequencies
        rows = []
        for i in range(self.order + 1):
            # d^i of cos and sin at 0: the parts of (iw)^i.
            cosine, sine = [(1, 0), (0, 1), (-1, 0)][i]
            first = torch.ones(1, dtype=torch.float64) if i == 0 else torch.zeros(1, dtype=torch.float64)
            rows.append(torch.cat([first, cosine * w**i, sine * w**i]))
        return torch.stack(rows)

    def _stationary(self) -> Tensor:
        """Covariance of f and its first p derivatives at one place, ``(p + 1, p + 1)``."""
        rate, p = self.rate, self.order
        # Derivatives of the kernel at distance 0, of orders 0, 2 and 4.
        second = {0: 0.0, 1: -(rate**2), 2: -(rate**2) / 3}[p]
        even = {0: 1.0, 2: second, 4: rate**4}
        rows = [[(-1) ** j * even.get(i + j, 0.0) for j in range(p + 1)] for i in range(p + 1)]
        return self.variance * torch.tensor(rows, dtype=torch.float64)


class VariationalFourier:
    """A stream on Fourier features, by the seam of the peers: ``update(x, y)``, ``predict(x)``.

    Args:
        num_features: at most so many; the number is odd.
        start: of the data.
        end: last time of the stream.
        kernel: ``ScaleKernel(MaternKernel(nu))`` of one column.
        likelihood: Gaussian.
        margin: what the interval has beyond the data at each end, as a fraction of their span. A period must not end
            where the data do, because f need not come back to where it began.
    """

    def __init__(
        self,
        num_features: int,
        start: float,
        end: float,
        kernel: ScaleKernel,
        likelihood: GaussianLikelihood,
        margin: float = 0.05,
    ) -> None:
        base = kernel.base_kernel
        if not isinstance(base, MaternKernel):
            raise TypeError(f"kernel: expected a scaled MaternKernel, got {type(base).__name__}.")
        reserve = margin * (end - start)
        self.kernel, self.noise = kernel, likelihood.noise.item()
        self.features = FourierFeatures(
            start - reserve,
            end + reserve,
            (num_features - 1) // 2,
            round(base.nu - 0.5),
            base.lengthscale.item(),
            kernel.outputscale.item(),
        )
        self.factor = torch.linalg.cholesky(self.features.kuu())
        self.precision = torch.eye(len(self.factor), dtype=torch.float64)
        self.shift = torch.zeros(len(self.factor), 1, dtype=torch.float64)
        self.warnings: list[str] = []

    def _whitened(self, x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, self.features.values(x), upper=False)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Add what a chunk says."""
        A = self._whitened(x)
        self.precision = self.precision + A @ A.mT / self.noise
        self.shift = self.shift + A @ y.double().unsqueeze(-1) / self.noise
        self.root = torch.linalg.cholesky(self.precision)

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of new observations."""
        A = self._whitened(x)
        mean = (A.mT @ torch.cholesky_solve(self.shift, self.root)).squeeze(-1)
        known = torch.linalg.solve_triangular(self.root, A, upper=False).square().sum(0)
        return mean, self.features.variance - A.square().sum(0) + known + self.noise

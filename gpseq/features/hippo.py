"""HiPPO features: a function's past as coefficients of orthogonal polynomials on a stretching interval."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from gpseq import hippo
from gpseq.checks import check_count, check_number
from gpseq.features.base import InducingFeatures, evaluate, evaluate_diagonal, project
from gpseq.linalg import cholesky

MEASURES = ("legs",)

#: Residual variances are averaged over this many times, spread evenly over the horizon.
NUM_PROBES = 256


class CapacityError(ValueError):
    """No admissible number of features holds what the kernel asks for on the horizon."""


class HippoFeatures(InducingFeatures):
    r"""Legendre memory of the whole elapsed interval (HiPPO-LegS), by Gauss-Legendre quadrature.

    .. math::
        u_m = \frac{1}{T - t_0} \int_{t_0}^{T} f(t)\, g_m(t)\, dt, \qquad
        g_m(t) = \sqrt{2m+1}\, P_m\!\left(2 \tfrac{t - t_0}{T - t_0} - 1\right), \quad m = 0, \dots, M-1

    M numbers summarise f on ``[start, horizon]``. When data pass the horizon the basis is stretched
    (:meth:`with_horizon`) and M stays as it is. A fixed M does not hold everything for ever: see :meth:`required`.

    Args:
        num_features: M.
        horizon: T, the end of the basis, in the unit of the time column (not a length).
        start: :math:`t_0`, the beginning of the basis, in the same unit.
        measure: ``"legs"``, uniform on the whole interval.
        window: length of a sliding measure; ``"legs"`` takes none.
        num_nodes: Q, the quadrature nodes; ``None`` means 2 M + 20, which is enough wherever M itself is enough.
        time_dim: the column of the inputs that holds time.
        other_inputs: values of the remaining columns at which f is followed, ``(d - 1,)``; ``None`` for inputs that
            are time alone.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a value is out of range; the message names the argument, what came and what was expected.

    Source:
        Gu et al. (2020), HiPPO, section 2.2 for the measure; the quadrature form of the covariances is derived here.

    Example:
        >>> import gpytorch
        >>> features = HippoFeatures(num_features=4, horizon=1.0)
        >>> kernel = gpytorch.kernels.RBFKernel()
        >>> kernel.lengthscale = 0.2
        >>> round(features.kuu(kernel)[0, 0].item(), 6)
        0.421326
    """

    _unit_nodes: Tensor
    _weights: Tensor
    _other_inputs: Tensor

    def __init__(
        self,
        num_features: int,
        horizon: float,
        start: float = 0.0,
        measure: str = "legs",
        window: float | None = None,
        num_nodes: int | None = None,
        time_dim: int = 0,
        other_inputs: Tensor | None = None,
    ) -> None:
        super().__init__()
        if measure not in MEASURES:
            raise ValueError(f"measure: expected one of {MEASURES}, got {measure!r}.")
        if window is not None:
            raise ValueError(f"window: measure {measure!r} covers the whole interval; expected None, got {window}.")
        self.measure = measure
        self._set_interval(start, horizon)
        self._set_order(num_features, num_nodes)

        other = torch.zeros(0) if other_inputs is None else other_inputs
        if not isinstance(other, Tensor) or other.dim() != 1 or not other.isfinite().all():
            got = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
            raise ValueError(f"other_inputs: expected finite values of shape (d - 1,), got {got}.")
        if not isinstance(time_dim, int) or not -1 - other.numel() <= time_dim <= other.numel():
            raise ValueError(f"time_dim: expected a column of {other.numel() + 1} input columns, got {time_dim!r}.")
        self.time_dim = time_dim % (other.numel() + 1)
        self.register_buffer("_other_inputs", other.double().clone(), persistent=False)

    def _set_interval(self, start: float, horizon: float) -> None:
        start, horizon = check_number("start", start), check_number("horizon", horizon)
        if not horizon > start:
            raise ValueError(f"horizon: expected a time after start={start}, got {horizon}.")
        self.start, self.horizon = start, horizon

    def _set_order(self, num_features: int, num_nodes: int | None) -> None:
        check_count("num_features", num_features)
        self._num_nodes_given = num_nodes
        num_nodes = 2 * num_features + 20 if num_nodes is None else check_count("num_nodes", num_nodes)
        if num_nodes < num_features:
            raise ValueError(f"num_nodes: expected at least num_features={num_features}, got {num_nodes}.")
        if num_nodes < num_features + 10:
            warnings.warn(
                f"num_nodes: {num_nodes} quadrature nodes for {num_features} features; with fewer than "
                f"{num_features + 10} the highest coefficients are not the integrals that they are named after.",
                stacklevel=3,
            )
        device = self._weights.device if "_weights" in self._buffers else None
        self.register_buffer("_unit_nodes", hippo.gauss_legendre(num_nodes)[0].to(device), persistent=False)
        self.register_buffer("_weights", hippo.legs_weights(num_features, num_nodes).to(device), persistent=False)

    @property
    def num_features(self) -> int:
        """M, the number of coefficients."""
        return self._weights.shape[-2]

    @property
    def num_nodes(self) -> int:
        """Q, the number of quadrature nodes."""
        return self._weights.shape[-1]

    def nodes(self) -> Tensor:
        """Quadrature nodes on ``[start, horizon]``, ``(Q, d)``, float64."""
        return self._at_times(self.start + (self.horizon - self.start) * 0.5 * (1 + self._unit_nodes))

    def weights(self) -> Tensor:
        r"""Weights :math:`W_{mq} = \sqrt{2m+1} P_m(\xi_q) w_q / 2`, ``(M, Q)``, float64; they know neither t nor k."""
        return self._weights

    def _at_times(self, times: Tensor) -> Tensor:
        before, after = self._other_inputs.tensor_split((self.time_dim,))
        rows = times.unsqueeze(-1)
        return torch.cat([before.expand(len(times), -1), rows, after.expand(len(times), -1)], dim=-1)

    def probes(self, num_probes: int = NUM_PROBES) -> Tensor:
        """Inputs at evenly spaced times of the horizon, where a memory is judged, ``(num_probes, d)``, float64."""
        steps = torch.arange(num_probes, dtype=torch.float64, device=self._weights.device)
        return self._at_times(self.start + (self.horizon - self.start) * (steps + 0.5) / num_probes)

    def with_horizon(self, horizon: float) -> HippoFeatures:
        """A copy on ``[start, horizon]`` with the same number of features.

        Args:
            horizon: the new end, in the unit of the time column; must be after ``start``.

        Returns:
            New features; these are untouched.
        """
        return self._copy(horizon=horizon)

    def with_order(self, num_features: int) -> HippoFeatures:
        """A copy with another number of features on the same interval.

        Args:
            num_features: the new M. A ``num_nodes`` that was given is kept if it is enough.

        Returns:
            New features; these are untouched.
        """
        given = self._num_nodes_given
        return self._copy(num_features=num_features, num_nodes=None if given is None else max(given, num_features + 10))

    def _copy(self, **changes: Any) -> HippoFeatures:
        kept: dict[str, Any] = {
            "num_features": self.num_features,
            "horizon": self.horizon,
            "start": self.start,
            "measure": self.measure,
            "num_nodes": self._num_nodes_given,
            "time_dim": self.time_dim,
            "other_inputs": self._other_inputs,
        }
        return type(self)(**(kept | changes)).to(self._weights.device)

    def reconstruct(self, coefficients: Tensor, x: Tensor) -> Tensor:
        r"""The memory's polynomial picture of the past, :math:`\sum_m u_m g_m(x)`.

        Args:
            coefficients: u, or its posterior mean, ``(*batch, M)``.
            x: times ``(n,)`` or inputs ``(n, d)`` inside ``[start, horizon]``; outside a polynomial means nothing.

        Returns:
            ``(*batch, n)``, float64.
        """
        times = (x if x.dim() == 1 else x[..., self.time_dim]).double()
        basis = hippo.legs_basis(self.num_features, times, self.start, self.horizon)
        return torch.einsum("...m,mn->...n", coefficients.double(), basis)

    @staticmethod
    def required(
        kernel: Kernel,
        horizon: float,
        tolerance: float = 1e-3,
        start: float = 0.0,
        time_dim: int = 0,
        other_inputs: Tensor | None = None,
        max_features: int = 2048,
        noise: float | None = None,
    ) -> int:
        r"""How many features a kernel needs on a horizon, found numerically.

        The smallest M whose mean residual prior variance over ``[start, horizon]``,

        .. math:: \overline{k(t, t) - k_{tu} K_{uu}^{-1} k_{ut}} \,/\, \overline{k(t, t)} ,

        is below ``tolerance``. For an RBF kernel that is about 1.5 features a lengthscale at 0.1 %; rough kernels
        need many more. The kernel is a black box: no lengthscale is read. What the memory cannot hold acts like
        extra noise, so for predictions that match the exact GP's name the noise of the data too: then the residual
        is held below ``tolerance`` times the smaller of the two variances.

        Args:
            kernel: any GPyTorch kernel; of a batch of kernels the most demanding decides.
            horizon: end of the interval.
            tolerance: admissible fraction of the prior variance.
            start: beginning of the interval.
            time_dim: as in the constructor.
            other_inputs: as in the constructor.
            max_features: where the search ends.
            noise: noise variance of the data; ``None`` compares with the prior variance alone.

        Returns:
            M. A stream that grows its horizon geometrically reserves up to the growth factor: ask for that horizon.

        Raises:
            CapacityError: ``max_features`` is not enough; the message says what it reaches.
            ValueError: ``tolerance``, ``noise`` or ``max_features`` is not positive.

        Example:
            >>> import gpytorch
            >>> kernel = gpytorch.kernels.RBFKernel()
            >>> kernel.lengthscale = 0.1
            >>> HippoFeatures.required(kernel, horizon=2.0)
            27
        """
        probe = HippoFeatures(1, horizon, start, time_dim=time_dim, other_inputs=other_inputs)
        return probe.required_order(kernel, tolerance, max_features, noise)

    @torch.no_grad()
    def required_order(
        self, kernel: Kernel, tolerance: float = 1e-3, max_features: int = 2048, noise: float | None = None
    ) -> int:
        """As :meth:`required`, on the interval of these features."""
        check_number("tolerance", tolerance, above=0.0, expected="a positive fraction of the variance")
        check_count("max_features", max_features)
        if noise is not None:
            check_number("noise", noise, above=0.0, expected="a positive variance")
        order = min(32, max_features)
        while True:
            curve = self.with_order(order).residual_curve(kernel, noise)
            if curve[-1] <= tolerance:
                break
            if order == max_features:
                reference = "prior variance" if noise is None else "prior variance or the noise, whichever is smaller,"
                raise CapacityError(
                    f"{max_features} features leave {curve[-1].item():.2%} of the {reference} on the horizon, and "
                    f"{tolerance:.2%} was asked for; a shorter horizon or a larger tolerance would need fewer."
                )
            order = min(2 * order, max_features)
        # The curve shares the quadrature of the largest order; a smaller memory has fewer nodes of its own, which
        # costs a rough kernel a little.
        needed = int((curve <= tolerance).to(torch.int8).argmax()) + 1
        while needed < order and self.with_order(needed).residual_curve(kernel, noise)[-1] > tolerance:
            needed = min(needed + 1 + needed // 512, order)
        return needed

    @torch.no_grad()
    def residual_curve(self, kernel: Kernel, noise: float | None = None) -> Tensor:
        """Mean residual prior variance over the horizon for 1, 2, ..., M features, as a fraction of the prior's.

        One factorisation serves all orders: the first m whitened features depend on the first m features only.

        Args:
            kernel: any GPyTorch kernel; of a batch of kernels the largest residual is taken.
            noise: a noise variance; the residual is then a fraction of the smaller of the two variances.

        Returns:
            ``(M,)``, float64, not increasing.
        """
        probes = self.probes()
        factor, _ = cholesky(self.kuu(kernel).to_dense())
        kuf = project(self._weights, evaluate(kernel, self.nodes(), probes))
        whitened = torch.linalg.solve_triangular(factor, kuf, upper=False)
        prior = evaluate_diagonal(kernel, probes)
        variance = prior.mean(-1).unsqueeze(-1)
        residual = variance - whitened.square().mean(-1).cumsum(-1)
        reference = variance if noise is None else variance.clamp_max(noise)
        return (residual / reference).reshape(-1, self.num_features).amax(0)

    def get_extra_state(self) -> Tensor:
        """What defines the basis as numbers, so that a saved stream restores it exactly."""
        given = -1 if self._num_nodes_given is None else self._num_nodes_given
        numbers = [self.num_features, given, self.start, self.horizon, self.time_dim, *self._other_inputs.tolist()]
        return torch.tensor(numbers, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` wrote."""
        num_features, given, start, horizon, time_dim, *other = state.tolist()
        if (num_features, given) != (self.num_features, self._num_nodes_given or -1):
            self._set_order(int(num_features), None if given < 0 else int(given))
        self._set_interval(start, horizon)
        self.time_dim = int(time_dim)
        self._other_inputs = self._other_inputs.new_tensor(other)

    def extra_repr(self) -> str:
        """The numbers that define the basis."""
        interval = f"start={self.start:g}, horizon={self.horizon:g}"
        return f"num_features={self.num_features}, {interval}, measure={self.measure!r}"

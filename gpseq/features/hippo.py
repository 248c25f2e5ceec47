"""HiPPO features: a function's past as coefficients of orthogonal functions, of all of it or of its recent part."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from gpseq import hippo
from gpseq.checks import check_count, check_number, stacklevel_outside
from gpseq.features.base import NUM_PROBES, InducingFeatures, as_inputs, evaluate, evaluate_diagonal, project
from gpseq.linalg import cholesky


@dataclass(frozen=True)
class _Measure:
    """What sets one measure apart. Its place is ``(start, horizon)`` if it stretches, else ``(horizon, window)``."""

    nodes: Callable[..., Tensor]  # (num_nodes, *place) -> (Q,)
    weights: Callable[[int, int], Tensor]  # (num_features, num_nodes) -> (M, Q)
    basis: Callable[..., Tensor]  # (num_features, times, *place) -> (M, n)
    window: str = ""  # what the window is; nothing where the measure stretches instead
    reach: float = 1.0  # how many windows back it is judged
    nodes_per_feature: float = 1.0  # what the fastest feature needs, besides a few nodes more
    nodes_more: int = 10

    def fewest_nodes(self, num_features: int) -> int:
        """With fewer, the highest coefficients are not the integrals that they are named after."""
        return math.ceil(self.nodes_per_feature * num_features) + self.nodes_more


# Saved states name a measure by its index: new ones go to the end.
_MEASURES = {
    "legs": _Measure(hippo.legs_nodes, hippo.legs_weights, hippo.legs_basis),
    "legt": _Measure(hippo.legt_nodes, hippo.legt_weights, hippo.legt_basis, "length"),
    "lagt": _Measure(hippo.lagt_nodes, hippo.lagt_weights, hippo.lagt_basis, "time constant", reach=3.0),
    "fout": _Measure(
        hippo.fout_nodes, hippo.fout_weights, hippo.fout_basis, "length", nodes_per_feature=1.6, nodes_more=20
    ),
}

#: What a memory may be of: all of the past, or its recent part in one of three ways.
MEASURES = tuple(_MEASURES)


#: Quadrature nodes whose weights are all smaller are left out; the largest are between 0.01 and 1.
NEGLIGIBLE_WEIGHT = 1e-30


class CapacityError(ValueError):
    """No admissible number of features holds what the kernel asks for on the horizon."""


class HippoFeatures(InducingFeatures):
    r"""A memory of the past in M numbers (HiPPO): of all of it, or of its recent part.

    .. math:: u_m = \int f(t)\, g_m(t)\, \mu(t)\, dt, \quad m = 0, \dots, M-1

    by quadrature, with functions g that are orthonormal under the measure :math:`\mu`. The measure says what is
    remembered; with :math:`t_0` the start, T the horizon and :math:`\theta` the window:

    - ``"legs"``: uniform on :math:`[t_0, T]`, everything equally well; Legendre polynomials.
    - ``"legt"``: uniform on :math:`[T - \theta, T]`, the last window; Legendre polynomials.
    - ``"lagt"``: :math:`e^{-(T - t) / \theta} / \theta` for all t up to T, the recent past best and what lies further
      back less and less; Laguerre polynomials.
    - ``"fout"``: uniform on :math:`[T - \theta, T]`, the last window; a constant, cosines and sines.

    ``"legs"`` stretches: when data pass the horizon it is re-stretched (:meth:`with_horizon`) and M stays as it is. A
    fixed M does not hold everything for ever: see :meth:`required`.

    The other three slide: the window moves along and keeps its length, and what it leaves behind is forgotten on
    purpose. They need as many features as the window asks for (:meth:`required_order`), however long the stream. A
    window may reach back beyond ``start``, where f is what the prior says. Laguerre polynomials are spread thin: the
    features that ``"lagt"`` needs grow like the square of its time constant in lengthscales; keep that at one or two.

    Args:
        num_features: M.
        horizon: T, the end of the basis, in the unit of the time column (not a length).
        start: :math:`t_0`, in the same unit: the beginning of the basis of ``"legs"``; for the others, of time.
        measure: ``"legs"``, ``"legt"``, ``"lagt"`` or ``"fout"``.
        window: :math:`\theta` in the same unit, the length for ``"legt"`` and ``"fout"``, the time constant for
            ``"lagt"``; ``"legs"`` takes none.
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
        >>> recent = HippoFeatures(num_features=4, horizon=10.0, measure="legt", window=1.0)
        >>> round(recent.kuu(kernel)[0, 0].item(), 6)
        0.421326
        >>> recent.with_horizon(12.0)
        HippoFeatures(num_features=4, start=0, horizon=12, measure='legt', window=1)
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
        self._set_measure(measure, window)
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

    def _set_measure(self, measure: str, window: float | None) -> None:
        if measure not in MEASURES:
            raise ValueError(f"measure: expected one of {MEASURES}, got {measure!r}.")
        role = _MEASURES[measure].window
        if role:
            window = check_number("window", window, above=0.0, expected=f"a positive {role} for measure {measure!r}")
        elif window is not None:
            raise ValueError(f"window: measure {measure!r} covers the whole interval; expected None, got {window}.")
        self.measure, self.window = measure, window

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
        measure = _MEASURES[self.measure]
        fewest = measure.fewest_nodes(num_features)
        if num_nodes < fewest:
            warnings.warn(
                f"num_nodes: {num_nodes} quadrature nodes for {num_features} features; with fewer than {fewest} the "
                "highest coefficients are not the integrals that they are named after.",
                stacklevel=stacklevel_outside(),
            )
        nodes, weights = measure.nodes(num_nodes, 0.0, 1.0), measure.weights(num_features, num_nodes)
        # Most of a large Gauss-Laguerre rule lies where its weights are nil: thousands of time constants back, far
        # enough to cost the distances between the other nodes their digits.
        counts = weights.abs().amax(0) > NEGLIGIBLE_WEIGHT
        device = self._weights.device if "_weights" in self._buffers else None
        self.register_buffer("_unit_nodes", nodes[counts].to(device), persistent=False)
        self.register_buffer("_weights", weights[:, counts].to(device), persistent=False)

    @property
    def num_features(self) -> int:
        """M, the number of coefficients."""
        return self._weights.shape[-2]

    @property
    def num_dims(self) -> int:
        """d, time and the other columns."""
        return 1 + self._other_inputs.numel()

    @property
    def other_inputs(self) -> Tensor:
        """Values of the columns that are not time, ``(d - 1,)``."""
        return self._other_inputs

    @property
    def num_nodes(self) -> int:
        """Q, the number of quadrature nodes; those of ``"lagt"`` without weight are left out."""
        return self._weights.shape[-1]

    def nodes(self) -> Tensor:
        """Quadrature nodes where the measure is, ``(Q, d)``, float64; those of ``"lagt"`` reach far behind start."""
        if self.window is None:
            return self._at_times(self.start + (self.horizon - self.start) * self._unit_nodes)
        return self._at_times(self.horizon + self.window * self._unit_nodes)

    def weights(self) -> Tensor:
        r"""Weights :math:`W_{mq} = g_m(t_q)` times that of the node, ``(M, Q)``, float64; they know neither t nor k."""
        return self._weights

    def _at_times(self, times: Tensor) -> Tensor:
        before, after = self._other_inputs.tensor_split((self.time_dim,))
        rows = times.unsqueeze(-1)
        return torch.cat([before.expand(len(times), -1), rows, after.expand(len(times), -1)], dim=-1)

    @property
    def forgets(self) -> bool:
        """Whether the measure is a moving window, which leaves the past behind."""
        return self.window is not None

    @property
    def interval(self) -> tuple[float, float]:
        """First and last time covered, of all the past or of the last window; three time constants for ``"lagt"``."""
        if self.window is None:
            return self.start, self.horizon
        return max(self.start, self.horizon - _MEASURES[self.measure].reach * self.window), self.horizon

    def probes(self, num_probes: int = NUM_PROBES) -> Tensor:
        """Inputs at evenly spaced times of the interval, where a memory is judged, ``(num_probes, d)``, float64."""
        start, horizon = self.interval
        steps = torch.arange(num_probes, dtype=torch.float64, device=self._weights.device)
        return self._at_times(start + (horizon - start) * (steps + 0.5) / num_probes)

    def with_horizon(self, horizon: float) -> HippoFeatures:
        """A copy that ends at another time, with the same number of features: stretched, or moved with its window.

        Args:
            horizon: the new end, in the unit of the time column; must be after ``start``.

        Returns:
            New features; these are untouched.
        """
        return self._copy(horizon=horizon)

    def following(self, x: Tensor, kernel: Kernel, growth: float | str | None = 1.25) -> HippoFeatures:
        """Features for a stream that has come to the inputs ``x``: these, or a copy whose horizon covers them.

        Args:
            x: new inputs, ``(n, d)``; n may be 0.
            kernel: not needed here.
            growth: by what factor a stretching horizon grows, as often as needed; ``None`` takes the last time itself,
                as a window that slides always does; ``"fixed"`` declares the horizon to be the end.

        Returns:
            These features if they reach the last time, else new ones that do.

        Raises:
            ValueError: a time passes a horizon that is fixed, or ``growth`` is none of these.
        """
        if growth is not None and growth != "fixed":
            growth = check_number("growth", growth, above=1.0, expected="a factor above 1, None or 'fixed'")
        times = as_inputs(x)[..., self.time_dim].double()
        if not times.numel():
            return self
        first, last = torch.stack(times.aminmax()).tolist()
        if self.window is None and first < self.start:
            warnings.warn(
                f"x: times from {first:g} lie before the start of the memory, {self.start:g}; they are used, but "
                "the features do not cover them.",
                stacklevel=stacklevel_outside(),
            )
        if last <= self.horizon:
            return self
        if growth == "fixed":
            raise ValueError(f"x: times up to {last:g} pass the horizon, which is fixed at {self.horizon:g}.")
        if isinstance(growth, float) and self.window is None:
            last = _grown(self.start, self.horizon, last, growth)
        return self.with_horizon(last)

    def with_order(self, num_features: int) -> HippoFeatures:
        """A copy with another number of features on the same interval.

        Args:
            num_features: the new M. A ``num_nodes`` that was given is kept if it is enough.

        Returns:
            New features; these are untouched.
        """
        given = self._num_nodes_given
        if given is not None:
            given = max(given, _MEASURES[self.measure].fewest_nodes(check_count("num_features", num_features)))
        return self._copy(num_features=num_features, num_nodes=given)

    def _copy(self, **changes: Any) -> HippoFeatures:
        kept: dict[str, Any] = {
            "num_features": self.num_features,
            "horizon": self.horizon,
            "start": self.start,
            "measure": self.measure,
            "window": self.window,
            "num_nodes": self._num_nodes_given,
            "time_dim": self.time_dim,
            "other_inputs": self._other_inputs,
        }
        return type(self)(**(kept | changes)).to(self._weights.device)

    def reconstruct(self, coefficients: Tensor, x: Tensor) -> Tensor:
        r"""The memory's picture of the past, :math:`\sum_m u_m g_m(x)`.

        Args:
            coefficients: u, or its posterior mean, ``(*batch, M)``.
            x: times ``(n,)`` or inputs ``(n, d)`` where the measure is; elsewhere the picture means nothing. That of
                ``"lagt"`` is good for a few time constants, and its error grows into the past. Waves see the two ends
                of a window as one point: unless f is periodic, the picture of ``"fout"`` is poor near both.

        Returns:
            ``(*batch, n)``, float64.
        """
        times = (x if x.dim() == 1 else x[..., self.time_dim]).double()
        place = (self.start, self.horizon) if self.window is None else (self.horizon, self.window)
        basis = _MEASURES[self.measure].basis(self.num_features, times, *place)
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
        r"""How many features of ``"legs"`` a kernel needs on a horizon, found numerically.

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
        """As :meth:`required`, for the measure and where these features are judged (:meth:`probes`)."""
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
                where = "horizon" if self.window is None else "window"
                raise CapacityError(
                    f"{max_features} features leave {curve[-1].item():.2%} of the {reference} on the {where}, and "
                    f"{tolerance:.2%} was asked for; a shorter {where} or a larger tolerance would need fewer."
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
        """Mean residual prior variance at the probes for 1, 2, ..., M features, as a fraction of the prior's.

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
        window = -1.0 if self.window is None else self.window
        place = [self.start, self.horizon, MEASURES.index(self.measure), window]
        numbers = [self.num_features, given, *place, self.time_dim, *self._other_inputs.tolist()]
        return torch.tensor(numbers, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` wrote."""
        num_features, given, start, horizon, index, window, time_dim, *other = state.tolist()
        before = (self.measure, self.num_features, self._num_nodes_given or -1)
        self._set_measure(MEASURES[int(index)], None if window < 0 else window)
        self._set_interval(start, horizon)
        if before != (self.measure, num_features, given):
            self._set_order(int(num_features), None if given < 0 else int(given))
        self.time_dim = int(time_dim)
        self._other_inputs = self._other_inputs.new_tensor(other)

    def extra_repr(self) -> str:
        """The numbers that define the basis."""
        interval = f"start={self.start:g}, horizon={self.horizon:g}"
        window = "" if self.window is None else f", window={self.window:g}"
        return f"num_features={self.num_features}, {interval}, measure={self.measure!r}{window}"


def _grown(start: float, horizon: float, last: float, growth: float) -> float:
    """The first horizon of a geometric sequence that reaches ``last``."""
    length = horizon - start
    # A time within rounding of a member of the sequence counts as that member.
    steps = math.ceil(math.log((last - start) / length) / math.log(growth) - 1e-11)
    return max(start + length * growth**steps, last)

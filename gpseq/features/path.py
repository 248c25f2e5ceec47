"""HiPPO along a path: many dimensions, one pseudo-time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from gpytorch.kernels import Kernel
from linear_operator import LinearOperator, to_linear_operator
from torch import Tensor

from gpseq import hippo
from gpseq.checks import check_count, check_inputs, check_number
from gpseq.features import orderings
from gpseq.features.base import NUM_PROBES, InducingFeatures
from gpseq.features.random_features import RandomFeatures

MODES = ("keep", "rff")
SCHEMES = ("exact", "midpoint", "bilinear", "backward", "euler", "zoh")

#: Schemes that hold the value of a point on its cell, which is all that a path knows.
_HELD = ("exact", "zoh")

#: Points that move the state at once, for the exact scheme and for the others; it bounds the memory of one update.
_BLOCK, _RECURRENCE_BLOCK = 1024, 64


def path_step(num_features: int, edges: Tensor, scheme: str = "exact") -> tuple[Tensor, Tensor]:
    r"""What a run of path points does to the Legendre coefficients: :math:`c \leftarrow P c + W f`.

    ============  =====================================================================================
    scheme        the value at point n is taken for that of the path
    ============  =====================================================================================
    exact         on the whole cell between edge n - 1 and edge n; integrated exactly
    midpoint      in the middle of the cell, and before the first point as at that point
    bilinear      at the end of the cell; the path begins with c = 0, as published
    backward      at the end of the cell; begins with c = 0
    euler         at the end of the cell; begins with c = 0; unstable while n is below about 2 M
    ============  =====================================================================================

    The last four are the schemes of these names in :func:`gpseq.hippo.legs_step`. Its "exact-held" and "zoh" hold the
    value over the cell as well and differ only in where they read a signal; a path has nothing to read but its
    points, so that "zoh" is "exact" here.

    Args:
        num_features: M.
        edges: times since the start, ``(n + 1,)``, increasing, of the last point before the run and of the n in it.
        scheme: one of the table.

    Returns:
        P ``(M, M)`` and W ``(M, n)``, float64. At time 0 there is nothing before, and P applies to c = 0.

    Raises:
        ValueError: an unknown scheme, or edges that do not increase from 0 or later.

    Example:
        >>> _, weights = path_step(2, torch.tensor([0.0, 1.0, 4.0]))
        >>> weights
        tensor([[ 0.2500,  0.7500],
                [-0.3248,  0.3248]], dtype=torch.float64)
    """
    _check_choice("scheme", scheme, SCHEMES)
    if scheme in _HELD:
        before = hippo.legs_reprojection(num_features, edges[0], edges[-1])
        return before, hippo.legs_cell_weights(num_features, edges)
    # The recurrence, applied to the identity: its columns are what was before and each of the values.
    size = num_features + len(edges) - 1
    identity = torch.eye(size, dtype=torch.float64, device=edges.device)
    state = identity[:num_features].clone()
    if scheme == "midpoint" and edges[0] == 0:
        state[0, num_features] = 1.0
    with warnings.catch_warnings():
        if scheme == "euler":  # has warned once, when it was chosen
            warnings.simplefilter("ignore", UserWarning)
        for (t1, t2), value in zip(pairwise(edges), identity[num_features:], strict=True):
            state = hippo.legs_step(state, t1, t2, value, scheme)
    return state[:, :num_features], state[:, num_features:]


class PathFeatures(InducingFeatures):
    r"""Legendre memory (HiPPO-LegS) of f along a path through its inputs, for inputs of many dimensions.

    .. math::
        u_m = \frac{1}{T} \int_0^T f(x(s))\, g_m^{(T)}(s)\, ds \quad\Longrightarrow\quad
        u = \Phi f(X_{\mathrm{path}}), \qquad
        \Phi_{mn} = \frac{1}{T} \int_{s_{n-1}}^{s_n} g_m^{(T)}(s)\, ds, \quad T = s_N

    Every point that arrives is appended to the path, point n of the stream at pseudo-time s = n step, and stands for
    the cell that ends with it. The covariances are ordinary ones of weighted sums of f, so that the model is valid
    whatever the path. The basis covers the path up to its last point and is stretched at every update; there is no
    horizon to reserve, and ``growth`` has no meaning here. So few large updates lose less than many small ones, and M
    should be above what the function needs.

    **What it cannot do.** One path is an arbitrary one-dimensional summary of a function of many dimensions. M numbers
    hold what is smooth *along the path*; if the path jumps about, f along it is rough and most of it is lost. Off the
    path, predictions rely on the correlation that the kernel provides and nothing else. For f of time alone use
    `HippoFeatures`; inducing points are the comparison that has to be made.

    =========  ========================  =====================================  ===========================
    mode       memory                    kernel                                 hyperparameters
    =========  ========================  =====================================  ===========================
    "keep"     the path, N (d + M)       any                                    may change
    "rff"      M x 2 R, constant         RBF or Matérn, by random features      frozen at construction
    =========  ========================  =====================================  ===========================

    "keep" is exact and costs N² for a covariance of the features; take it as long as the path fits. "rff" is for
    streams without end: every covariance then comes from the same random features (mixed with the exact kernel they
    would be no joint Gaussian), so that f itself is a linear model of R frequencies, with errors of about R^-1/2.

    A path is empty at first. What :meth:`nodes` and :meth:`weights` then say is a placeholder for a state without
    information.

    Args:
        num_features: M.
        num_dims: d, columns of the inputs.
        mode: ``"keep"`` or ``"rff"``.
        scheme: how a point enters the integral, see :func:`gpseq.features.path.path_step`. All but ``"euler"`` are
            stable; ``"exact"`` is the one that moves many points at once.
        ordering: in which order the points of one update join the path: ``"given"``; ``"oracle"``, by ``key``;
            ``"kernel"``, each next the one most alike the last, see :mod:`gpseq.features.orderings`; ``"random"``.
        key: of ``"oracle"``, a column or a function from ``(n, d)`` to ``(n,)``.
        step: pseudo-time between points. The unit cancels, as the basis is stretched over whatever there is.
        every: of so many points of the stream the last joins the path, and the others are passed over.
        time_dim: a column that holds physical time, which then takes the place of the pseudo-time. In "keep" mode a
            point that comes late is sorted in; in "rff" mode, where the past is no longer there, it is refused.
        start: where physical time begins.
        kernel: of "rff" mode, frozen at its present hyperparameters; ``None`` in "keep" mode.
        num_frequencies: R, of "rff" mode.
        paper: admit the scheme ``"euler"``, which is the published recurrence.
        generator: draws the frequencies and the random order; ``None`` is torch's default generator. Copies share it,
            and a saved state does not contain it.

    Raises:
        TypeError: a count is no integer, or the kernel has no random features.
        ValueError: a value is out of range or does not go with another.

    Source:
        The OHSVGP paper for features along a path, the orderings and the recurrences; the weights are derived here.

    Example:
        >>> import gpytorch
        >>> kernel = gpytorch.kernels.RBFKernel()
        >>> features = PathFeatures(num_features=4, num_dims=2)
        >>> features = features.following(torch.rand(30, 2), kernel).following(torch.rand(20, 2), kernel)
        >>> features.num_points, features.kuu(kernel).shape
        (50, torch.Size([4, 4]))
    """

    _path: Tensor
    _weights: Tensor
    _random: RandomFeatures | None
    _kernel: Kernel | None

    def __init__(
        self,
        num_features: int,
        num_dims: int,
        mode: str = "keep",
        scheme: str = "exact",
        ordering: str = "given",
        key: int | Callable[[Tensor], Tensor] | None = None,
        step: float = 1.0,
        every: int = 1,
        time_dim: int | None = None,
        start: float = 0.0,
        kernel: Kernel | None = None,
        num_frequencies: int = 1000,
        paper: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("num_features", num_features)
        check_count("num_dims", num_dims)
        _check_choice("mode", mode, MODES)
        _check_choice("scheme", scheme, SCHEMES)
        _check_choice("ordering", ordering, orderings.ORDERINGS)
        self.step = check_number("step", step, above=0.0, expected="a positive number")
        self.every = check_count("every", every)
        self.start = check_number("start", start)
        self.time_dim = None if time_dim is None else orderings.check_column("time_dim", time_dim, num_dims)
        if time_dim is None and self.start != 0:
            raise ValueError(f"start: pseudo-time begins at 0; only with time_dim is there another, got {start}.")
        if time_dim is not None and ordering != "given":
            raise ValueError(f"ordering: with time_dim the times are the order; expected 'given', got {ordering!r}.")
        if (key is None) == (ordering == "oracle"):
            raise ValueError(f"key: ordering 'oracle' needs one and no other takes one; got {ordering!r} and {key!r}.")
        if key is not None and not callable(key):
            orderings.check_column("key", key, num_dims)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}.")
        if scheme == "euler" and not paper:
            raise ValueError("scheme: 'euler' is not stable and there for reproduction only; it needs paper=True.")
        if paper:
            warnings.warn(
                "paper=True: this admits the published Euler recurrence, which is not stable: until the path has about "
                "2 M points it amplifies the first of them, mode m by up to 2^m. scheme='exact' is a contraction.",
                stacklevel=2,
            )
        self.mode, self.scheme, self.ordering, self.key = mode, scheme, ordering, key
        self._generator = generator
        self._num_seen = 0
        self._random = self._kernel = None
        if mode == "rff":
            if kernel is None:
                raise ValueError("kernel: mode 'rff' draws its random features from one, got None.")
            self._random = RandomFeatures(kernel, num_dims, num_frequencies, generator)
            if ordering == "kernel":
                self._kernel = copy.deepcopy(kernel).double().requires_grad_(False)
        elif kernel is not None:
            raise ValueError("kernel: mode 'keep' is handed one with every call; expected None.")
        device = self._random.frequencies.device if self._random is not None else None
        columns = self._random.num_outputs if self._random is not None else 0
        self.register_buffer("_path", torch.zeros(0, num_dims, dtype=torch.float64, device=device))
        self.register_buffer("_weights", torch.zeros(num_features, columns, dtype=torch.float64, device=device))

    @property
    def num_features(self) -> int:
        """M, the number of coefficients."""
        return self._weights.shape[-2]

    @property
    def num_dims(self) -> int:
        """d, the number of input columns."""
        return self._path.shape[-1]

    @property
    def num_points(self) -> int:
        """N, the number of points on the path; those that were passed over do not count."""
        return self._num_seen // self.every

    @property
    def elapsed(self) -> float:
        """T, the time at the last point of the path, since the start; 0 for an empty path."""
        if self.time_dim is None:
            return self.num_points * self.every * self.step
        return self._path[-1, self.time_dim].item() - self.start if len(self._path) else 0.0

    @property
    def embedding(self) -> RandomFeatures | None:
        """The random features, in "rff" mode; ``None`` in "keep" mode."""
        return self._random

    def nodes(self) -> Tensor:
        """The path ``(N, d)``, float64; in "rff" mode ``(2 R, 0)``, as the nodes stand for weights of f."""
        if self._random is not None:
            return self._path.new_zeros(self._random.num_outputs, 0)
        return self._path if len(self._path) else self._path.new_zeros(1, self.num_dims)

    def weights(self) -> Tensor:
        r""":math:`\Phi`, ``(M, N)``, float64; in "rff" mode :math:`Z = \Phi \psi(X_{path})`, ``(M, 2 R)``."""
        if self.num_points:
            return self._weights
        placeholder = self._weights.new_zeros(self.num_features, max(1, self._weights.shape[-1]))
        placeholder[0, 0] = 1.0
        return placeholder

    def kuu(self, kernel: Kernel) -> LinearOperator:
        """Prior covariance of the inducing variables.

        Args:
            kernel: any GPyTorch kernel; in "rff" mode not used, the frozen one speaks.

        Returns:
            ``(*batch, M, M)``, symmetric, float64.
        """
        if self._random is None:
            return super().kuu(kernel)
        weights = self.weights()
        covariance = weights @ weights.mT
        return to_linear_operator(0.5 * (covariance + covariance.mT))

    def kuf(self, kernel: Kernel, x: Tensor) -> Tensor:
        """Prior covariance between the inducing variables and f at ``x``.

        Args:
            kernel: any GPyTorch kernel; in "rff" mode not used.
            x: ``(*batch, n, d)``, or ``(n,)`` for one-dimensional inputs.

        Returns:
            ``(*batch, M, n)``, float64.
        """
        return super().kuf(kernel, x) if self._random is None else self.weights() @ self._random(x).mT

    def cross(self, kernel: Kernel, other: InducingFeatures) -> Tensor:
        """Prior covariance with other features of the same f.

        Args:
            kernel: any GPyTorch kernel; in "rff" mode not used.
            other: M' features; random features go with the same random features only.

        Returns:
            ``(*batch, M, M')``, float64.

        Raises:
            ValueError: one has random features and the other does not have the same.
        """
        random = other.embedding
        if self._random is None and random is None:
            return super().cross(kernel, other)
        if self._random is None or not isinstance(random, RandomFeatures) or not self._random.same_as(random):
            raise ValueError(
                "other: expected features that share their random features with these, such as following() returns; "
                "covariances of one model come from one kernel."
            )
        return self.weights() @ other.weights().mT

    def following(self, x: Tensor, kernel: Kernel, growth: float | str | None = 1.25) -> PathFeatures:
        """Features for a path that goes on to ``x``.

        Args:
            x: new points, ``(n, d)``, or ``(n,)`` for one-dimensional inputs; their order is that of ``ordering``.
            kernel: decides the order ``"kernel"`` in "keep" mode; in "rff" mode the frozen one does.
            growth: not used. A path has no horizon to reserve, it is stretched at every update.

        Returns:
            New features that share what is frozen with these, or these where n is 0; these are untouched.

        Raises:
            TypeError: ``x`` is no floating-point tensor.
            ValueError: it has another shape or values that are not finite; or physical times are not after the start,
                equal, or, in "rff" mode, not increasing from the end of the path.
        """
        x = check_inputs(x, self.num_dims)
        if x.dim() != 2:
            raise ValueError(f"x: expected shape (n, {self.num_dims}), one stream, got {tuple(x.shape)}.")
        if not x.isfinite().all():
            raise ValueError("x: expected finite values, got NaN or infinity.")
        if len(x) == 0:
            return self
        x = x.detach().to(self._path)
        self._check_times(x)
        x = x[self._order(x, kernel)]
        joins = self._num_seen + torch.arange(1, len(x) + 1, device=x.device)  # numbers of the points in the stream
        on_path = joins % self.every == 0
        return self._joined(x[on_path], joins[on_path], self._num_seen + len(x))

    def probes(self, num_probes: int = NUM_PROBES) -> Tensor | None:
        """Points of the path, evenly picked, where the memory is judged.

        Args:
            num_probes: how many at most.

        Returns:
            ``(n, d)``, float64; ``None`` for an empty path, and in "rff" mode, where the path is not kept.
        """
        check_count("num_probes", num_probes)
        if self._random is not None or not len(self._path):
            return None
        count = min(num_probes, len(self._path))
        middles = (torch.arange(count, dtype=torch.float64, device=self._path.device) + 0.5) / count
        return self._path[(middles * len(self._path)).long()]

    def _order(self, x: Tensor, kernel: Kernel) -> Tensor:
        if self.time_dim is not None:
            return x[:, self.time_dim].argsort()
        if self.ordering == "oracle":
            assert self.key is not None  # checked at construction
            return orderings.oracle(x, self.key)
        if self.ordering == "kernel":
            last = self._path[-1] if len(self._path) else None
            return orderings.kernel_greedy(x, kernel if self._kernel is None else self._kernel, last)
        if self.ordering == "random":
            return orderings.random(len(x), self._generator).to(x.device)
        return torch.arange(len(x), device=x.device)

    def _check_times(self, x: Tensor) -> None:
        if self.time_dim is None:
            return
        times = x[:, self.time_dim]
        since = times - self.start
        if not (since > 0).all():
            raise ValueError(
                f"x: expected times after start={self.start:g} in column {self.time_dim}, got {times.min().item():g}."
            )
        if self.mode == "rff":
            if not (torch.cat([since.new_tensor([self.elapsed]), since]).diff() > 0).all():
                raise ValueError(
                    f"x: mode 'rff' has not kept the past; expected times in column {self.time_dim} that increase from "
                    f"after {self.start + self.elapsed:g}, the end of the path, got {_brief(times)}."
                )
            return
        present = torch.cat([self._path[:, self.time_dim] - self.start, since]).sort().values
        if (present.diff() == 0).any():
            raise ValueError(
                f"x: expected times in column {self.time_dim} that differ from one another and from those of the path, "
                f"got {_brief(times)}."
            )

    def _joined(self, x: Tensor, numbers: Tensor, num_seen: int) -> PathFeatures:
        """A copy whose path has gone on by these points, which bear these numbers in the stream."""
        path, weights, elapsed = self._path, self._weights, self.elapsed
        if len(x):
            if self.time_dim is None:
                times = numbers.double() * self.step
            else:
                times = x[:, self.time_dim] - self.start
                if times[0] <= elapsed:  # some come late: the weights follow from all points anew
                    x = torch.cat([path, x])
                    x = x[x[:, self.time_dim].argsort()]
                    times, elapsed = x[:, self.time_dim] - self.start, 0.0
                    path, weights = path[:0], weights[:, :0]
            edges = torch.cat([times.new_tensor([elapsed]), times])
            for points, before, added in self._steps(x, edges):
                if self._random is None:
                    weights = torch.cat([before @ weights, added], dim=-1)
                else:
                    weights = before @ weights + added @ self._random(points)
            path = torch.cat([path, x]) if self._random is None else x[-1:].clone()
        # Not deepcopy: what is frozen is shared.
        new = copy.copy(self)
        new._buffers = {**self._buffers, "_path": path, "_weights": weights}
        new._modules = dict(self._modules)
        new._num_seen = num_seen
        return new

    def _steps(self, x: Tensor, edges: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        size = _BLOCK if self.scheme in _HELD else _RECURRENCE_BLOCK
        for first in range(0, len(x), size):
            points = x[first : first + size]
            yield points, *path_step(self.num_features, edges[first : first + len(points) + 1], self.scheme)

    def __deepcopy__(self, memo: dict[int, Any]) -> PathFeatures:
        if self._generator is not None:  # a source of randomness is not state; older versions cannot copy it at all
            memo[id(self._generator)] = self._generator
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def get_extra_state(self) -> Tensor:
        """What defines the path as numbers, so that a saved stream goes on exactly."""
        time_dim = -1 if self.time_dim is None else self.time_dim
        numbers = [self._num_seen, self.every, self.step, time_dim, self.start, SCHEMES.index(self.scheme)]
        return torch.tensor(numbers, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` wrote."""
        num_seen, every, step, time_dim, start, scheme = state.tolist()
        self._num_seen, self.every, self.step, self.start = int(num_seen), int(every), step, start
        self.time_dim = None if time_dim < 0 else int(time_dim)
        self.scheme = SCHEMES[int(scheme)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The saved path has a length of its own; and what is frozen may be shared with other features.
        for name in ("_path", "_weights"):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor):
                self._buffers[name] = getattr(self, name).new_empty(saved.shape)
        self._random, self._kernel = copy.deepcopy((self._random, self._kernel))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The numbers that define the path."""
        size = f"num_features={self.num_features}, num_dims={self.num_dims}, num_points={self.num_points}"
        return f"{size}, mode={self.mode!r}, scheme={self.scheme!r}, ordering={self.ordering!r}"


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}.")


def _brief(times: Tensor) -> str:
    """A few of the times."""
    shown = ", ".join(f"{t:g}" for t in times[:6].tolist())
    return f"[{shown}{', ...' if len(times) > 6 else ''}]"

"""Several kinds of features side by side, and a ready-made pyramid of nested windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from gpytorch.kernels import Kernel
from linear_operator import to_dense
from torch import Tensor, nn

from gpseq.checks import check_count, check_number
from gpseq.features.base import NUM_PROBES, InducingFeatures
from gpseq.features.hippo import HippoFeatures


class CompositeFeatures(InducingFeatures):
    r"""Parts side by side: :math:`u = (u^{(1)}, \dots, u^{(p)})`, all functionals of the same f.

    A long memory beside a sharp recent window, a memory beside inducing points, or, for several outputs, a memory of
    each: with a kernel over (time, output), ``HippoFeatures(..., other_inputs=torch.tensor([k]))`` follows output k.

    The parts know of each other: every covariance between them is taken into account, so nothing is counted twice
    where they overlap. In a stream each part follows the data in its own way.

    Args:
        parts: one or more features with the same number of input columns, without batch shape.

    Raises:
        TypeError: a part is something else.
        ValueError: no parts, parts of different inputs, or parts that see f through features of their own.

    Example:
        >>> long, recent = HippoFeatures(12, horizon=10.0), HippoFeatures(8, 10.0, measure="legt", window=1.0)
        >>> features = CompositeFeatures([long, recent])
        >>> features.num_features, features.with_horizon(12.0).parts[1].interval
        (20, (11.0, 12.0))
    """

    def __init__(self, parts: Sequence[InducingFeatures]) -> None:
        super().__init__()
        parts = list(parts)
        if not parts:
            raise ValueError("parts: expected at least one, got none.")
        for part in parts:
            if not isinstance(part, InducingFeatures):
                raise TypeError(f"parts: expected InducingFeatures, got {type(part).__name__}.")
            if part.embedding is not None:
                raise ValueError("parts: features of a random path stand alone; got some among the parts.")
            if part.nodes().dim() != 2:
                raise ValueError(f"parts: expected nodes of shape (Q, d), got {tuple(part.nodes().shape)}.")
        if len({part.num_dims for part in parts}) > 1:
            dims = [part.num_dims for part in parts]
            raise ValueError(f"parts: expected the same number of input columns, got {dims}.")
        self._parts = nn.ModuleList(parts)

    @property
    def parts(self) -> list[InducingFeatures]:
        """The parts in the order of their features."""
        return [cast(InducingFeatures, part) for part in self._parts]

    @property
    def num_features(self) -> int:
        """M, of all parts together."""
        return sum(part.num_features for part in self.parts)

    @property
    def num_dims(self) -> int:
        """d, of each part."""
        return self.parts[0].num_dims

    def nodes(self) -> Tensor:
        """The nodes of all parts, ``(Q, d)``, float64."""
        return torch.cat([part.nodes() for part in self.parts])

    def weights(self) -> Tensor:
        """Block diagonal, ``(M, Q)``, float64."""
        return torch.block_diag(*(to_dense(part.weights()) for part in self.parts))

    @property
    def interval(self) -> tuple[float, float] | None:
        """From the first to the last time that a part covers."""
        intervals = [part.interval for part in self.parts if part.interval is not None]
        return (min(a for a, _ in intervals), max(b for _, b in intervals)) if intervals else None

    def probes(self, num_probes: int = NUM_PROBES) -> Tensor | None:
        """Those of the part that covers the longest time; shared out among all that do, as over several outputs."""
        lengths = [None if part.interval is None else part.interval[1] - part.interval[0] for part in self.parts]
        longest = max((length for length in lengths if length is not None), default=None)
        if longest is None:
            return None
        widest = [part for part, length in zip(self.parts, lengths, strict=True) if length == longest]
        probes = [part.probes(max(num_probes // len(widest), 1)) for part in widest]
        return torch.cat([probe for probe in probes if probe is not None])

    @property
    def forgets(self) -> bool:
        """Whether any part does."""
        return any(part.forgets for part in self.parts)

    def with_horizon(self, horizon: float) -> CompositeFeatures:
        """A copy whose memories of time end at ``horizon``; other parts stay as they are."""
        return CompositeFeatures(
            [
                part.with_horizon(horizon) if isinstance(part, HippoFeatures | CompositeFeatures) else part
                for part in self.parts
            ]
        )

    def following(self, x: Tensor, kernel: Kernel, growth: float | str | None = 1.25) -> CompositeFeatures:
        """Each part in its own way; these features where no part has to change."""
        parts = [part.following(x, kernel, growth) for part in self.parts]
        if all(new is old for new, old in zip(parts, self.parts, strict=True)):
            return self
        return CompositeFeatures(parts)


class PyramidFeatures(CompositeFeatures):
    r"""Nested windows that all end now: the whole past, its last quarter, its last sixteenth, ...

    .. math:: [t_0, T], \quad [T - (T - t_0) / \rho, T], \quad \dots, \quad [T - (T - t_0) / \rho^{L-1}, T]

    with one Legendre memory on each. For a rough series whose whole past no fixed number of features can hold: far
    back the memory is coarse, near it is sharp, and it ages gracefully as the windows grow with the past. The
    resolution at age a is about that of a memory of :math:`M / L` features on the last :math:`\rho a`.

    It ends at the last time seen, so a stream moves it at every update, whatever its ``horizon_growth``. Detail is
    given up at each of these moves.

    Args:
        num_features: M, shared out over the levels as evenly as possible.
        horizon: T.
        start: :math:`t_0`.
        levels: L, how many windows.
        ratio: :math:`\rho`, how much longer each window is than the next.
        time_dim: as in ``HippoFeatures``.
        other_inputs: as in ``HippoFeatures``.

    Raises:
        TypeError: a count is not an integer.
        ValueError: fewer features than levels, or a ratio that is not above 1.

    Example:
        >>> features = PyramidFeatures(30, horizon=16.0)
        >>> [part.interval for part in features.parts]
        [(0.0, 16.0), (12.0, 16.0), (15.0, 16.0)]
    """

    def __init__(
        self,
        num_features: int,
        horizon: float,
        start: float = 0.0,
        levels: int = 3,
        ratio: float = 4.0,
        time_dim: int = 0,
        other_inputs: Tensor | None = None,
    ) -> None:
        check_count("levels", levels)
        check_count("num_features", num_features, least=levels)
        number = check_number("ratio", ratio, above=1.0, expected="a number above 1")
        shares = [num_features // levels + (level < num_features % levels) for level in range(levels)]
        rest: dict[str, Any] = {"time_dim": time_dim, "other_inputs": other_inputs}
        parts = [HippoFeatures(shares[0], horizon, start, **rest)]
        length = parts[0].horizon - parts[0].start
        for level in range(1, levels):
            window = length / number**level
            parts.append(HippoFeatures(shares[level], horizon, start, "legt", window, **rest))
        super().__init__(parts)
        self.ratio = number

    def get_extra_state(self) -> Tensor:
        """The ratio; the windows are those of the parts."""
        return torch.tensor(self.ratio, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` wrote."""
        self.ratio = float(state)

    @property
    def interval(self) -> None:
        """``None``: far back it is coarse by design, so a stream does not judge its capacity."""
        return None

    @property
    def _whole(self) -> HippoFeatures:
        return cast(HippoFeatures, self._parts[0])

    def with_horizon(self, horizon: float) -> PyramidFeatures:
        """A copy whose windows end at ``horizon``, in proportion to its distance from the start."""
        whole, levels = self._whole, len(self.parts)
        other = whole.other_inputs
        copy = PyramidFeatures(self.num_features, horizon, whole.start, levels, self.ratio, whole.time_dim, other)
        return copy.to(whole.nodes().device)

    def following(self, x: Tensor, kernel: Kernel, growth: float | str | None = 1.25) -> PyramidFeatures:
        """A copy that ends at the last time of ``x``, if that is new; a ``"fixed"`` end is not passed."""
        whole = self._whole.following(x, kernel, growth if growth == "fixed" else None)
        return self if whole is self._whole else self.with_horizon(whole.horizon)

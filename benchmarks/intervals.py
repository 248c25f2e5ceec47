"""Mean and 95 % interval over a few seeds, by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % interval; the half width of a single value is NaN."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        if not self.count:
            return "–"
        return f"{self.mean:.3f}" if math.isnan(self.half) else f"{self.mean:.3f} ± {self.half:.3f}"

    @property
    def signed(self) -> str:
        """For differences."""
        if not self.count:
            return "–"
        return f"{self.mean:+.3f}" if math.isnan(self.half) else f"{self.mean:+.3f} ± {self.half:.3f}"

    @property
    def verdict(self) -> str:
        """Of a difference of losses: ``"better"`` or ``"worse"`` where the interval leaves zero out."""
        if not self.count or math.isnan(self.half):
            return "not decided"
        if self.mean - self.half > 0:
            return "worse"
        return "better" if self.mean + self.half < 0 else "level"


def interval(values: Sequence[float]) -> Interval:
    r"""Mean of n values and :math:`t_{n-1, 0.975}\, s / \sqrt n`.

    Example:
        >>> str(interval([1.0, 2.0, 3.0]))
        '2.000 ± 2.484'
    """
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, 0)
    if n == 1:
        return Interval(values[0], math.nan, 1)
    from scipy.stats import t

    return Interval(statistics.fmean(values), float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n), n)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Of the differences ours - theirs, seed by seed."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])

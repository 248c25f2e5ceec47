r"""Scales of a propagated covariance that fit held-out data: one for all, or one for each group of weights."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpseq.checks import check_count, stacklevel_outside
from gpseq.prediction_checks import check_generator
from gpseq.predictive import NUM_DRAWS, PROBS_METHODS, Predictive
from gpseq.propagation.contributions import Contributions, corrected
from gpseq.propagation.posteriors import WeightPosterior
from gpseq.spread import Spread

#: Fitted numbers are between exp(-BOUND) and exp(BOUND), noise variances in units of the mean squared residual.
BOUND = 14.0
# Logarithms of scales that the fit is begun from; the best of them is taken.
_STARTS = (-6.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
#: The least temperature beside a scale, where probabilities are averages of draws.
_COLDEST = 0.25
_TEMPERATURES = (-0.5, 0.0, 0.5)
_FAR, _FLAT = 2.0, 1e-6  # a step of a logarithm, and a change of the loss that is none
_PIECES = 32
_NUMBERS = 1 << 24  # of intermediate results at a time


@dataclass(frozen=True, eq=False)
class Calibration:
    r"""Numbers that a prediction is corrected by, and what they brought on the data of the fit.

    The covariance is multiplied by c; logits, mean and deviations alike, are divided by :math:`\tau`; noise variances
    of observations take the place of those that there are.

    Attributes:
        scale: c.
        temperature: :math:`\tau`.
        noise: variances, one for each output, ``(E,)``; ``None`` leaves the prediction's own.
        method: how probabilities were made, see :meth:`gpseq.predictive.Predictive.probs`.
        nlpd: negative log probability or density of a target, in nats.
        nlpd_before: without any of it; infinite where there is no density.
        num_targets: how many there were.

    Example:
        >>> p = Predictive.from_moments(torch.zeros(4, 2), variance=torch.ones(4, 2))
        >>> Calibration(scale=4.0, temperature=2.0).apply(p).variance[0]
        tensor([1., 1.])
    """

    scale: float = 1.0
    temperature: float = 1.0
    noise: Tensor | None = None
    method: str = "sample"
    nlpd: float = math.nan
    nlpd_before: float = math.nan
    num_targets: int = 0

    def apply(self, predictive: Predictive) -> Predictive:
        """The corrected prediction; scores and notes travel along.

        Args:
            predictive: a Gaussian.

        Raises:
            TypeError: it is no prediction, or one by draws.
        """
        check_gaussian("predictive", predictive)
        like = predictive.mean
        scale, temperature = like.new_tensor(self.scale), like.new_tensor(self.temperature)
        noise = predictive.noise if self.noise is None else self.noise.to(like)
        return corrected(predictive, [Spread.of(predictive.covariance)], scale.view(1), temperature, noise)


def calibrate(
    predictive: Predictive,
    y: Tensor,
    scale: bool = True,
    temperature: bool = False,
    noise: bool = False,
    method: str = "sample",
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Calibration:
    r"""Fit a scale of the covariance, a temperature or noise variances to held-out targets.

    .. math:: \min_{c, \tau} -\frac1n \sum_i \log p \bigl( y_i \mid \mathcal N(m_i / \tau,\, c\, C_i / \tau^2) \bigr)

    The moments are those that the prediction holds, so that the network is not run again. Logarithms are optimised by
    LBFGS from the best point of a grid: all numbers are positive, and between :math:`e^{-14}` and :math:`e^{14}`. The
    data have to be others than those of the training, on which a network is too sure.

    Args:
        predictive: a Gaussian for held-out inputs, with a batch.
        y: labels in an integer dtype ``(*batch,)``, or ``(*batch, n)`` for events ``(n, K)``; or real numbers of the
            shape of the mean, judged jointly over the event.
        scale: whether c is fitted, or stays one.
        temperature: likewise; for labels only. Beside a scale and with draws it is at least 0.25: with less, draws are
            votes, of which the label of a test input may have none.
        noise: whether noise variances are fitted, one for each output; for real numbers only.
        method: from a Gaussian to probabilities of labels, see :meth:`gpseq.predictive.Predictive.probs`; fit the one
            that will be used. ``"probit_pairs"`` is several times as fast and good for few classes; it is too flat for
            many, which the scale makes up for by being too small. The draws of ``"sample"`` are the same throughout the
            fit, and others for each 32nd of the batch.
        num_samples: number of draws, 256 by default; few of them ask for too small a scale.
        generator: of draws; ``None`` is torch's default generator.

    Returns:
        The calibration, to be applied to later predictions.

    Raises:
        TypeError: the prediction is no Gaussian, or y is no tensor.
        ValueError: y has another shape, NaN, or labels that do not exist; nothing is to be fitted, or something that
            the targets know nothing of; there are no targets, or there is no density.

    Warns:
        UserWarning: a scale or temperature ran away, because the targets ask for as little or as much of it as there
            can be: a scale that ends near zero says that the variance only hurts on these data.

    Example:
        >>> mean = torch.zeros(500, 2)
        >>> y = 3 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> p = Predictive.from_moments(mean, variance=torch.ones(2))
        >>> round(calibrate(p, y).scale / float(y.square().mean()), 3)  # variances of about nine, not of one
        1.0
    """
    check_gaussian("predictive", predictive)
    with torch.inference_mode(False):  # the fit has gradients of its own
        problem = _Problem.of(predictive, [predictive], y, temperature, noise, method, num_samples, generator)
        return problem.fit(("scale",) if scale else ())[1]


@dataclass(frozen=True, eq=False)
class LayerCalibration:
    """One scale for each group of weights, and what is left to do with the outputs.

    Attributes:
        groups: names of parameters, by the names of groups.
        scales: positive, by the names of groups.
        output: temperature and noise variances, and what all of it brought; its scale is one.
    """

    groups: Mapping[str, tuple[str, ...]]
    scales: Mapping[str, float]
    output: Calibration

    def apply(self, contributions: Contributions) -> Predictive:
        """The corrected prediction from contributions of the same groups.

        Args:
            contributions: for any inputs.
        """
        return self.output.apply(contributions.weighted(self.scales))

    def scaled(self, posterior: WeightPosterior) -> WeightPosterior:
        """The posterior with the covariances of each group scaled, for propagations that need no contributions.

        Temperature and noise, if they were fitted, remain to be applied: ``calibration.output.apply(prediction)``.

        Args:
            posterior: of the weights.
        """
        for name, parameters in self.groups.items():
            posterior = posterior.scaled(self.scales[name], parameters)
        return posterior


def calibrate_layers(
    contributions: Contributions,
    y: Tensor,
    temperature: bool = False,
    noise: bool = False,
    method: str = "sample",
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
) -> LayerCalibration:
    """Fit one scale for each group of weights to held-out targets.

    As :func:`calibrate`, with the weighted sum of the contributions as covariance. A group whose variance only hurts
    ends near zero. Groups whose contributions are alike cannot be told apart, and with few targets they fit noise.

    Args:
        contributions: for held-out inputs.
        y: as for :func:`calibrate`, and so are all others.
        temperature: whether it is fitted as well.
        noise: whether noise variances are fitted as well.
        method: from a Gaussian to probabilities of labels.
        num_samples: number of draws.
        generator: of those.

    Returns:
        The scales.

    Raises:
        TypeError: as for :func:`calibrate`.
        ValueError: likewise.
    """
    if not isinstance(contributions, Contributions):
        raise TypeError(
            f"contributions: expected those of layer_contributions, got {type(contributions).__name__}; calibrate "
            "takes a prediction."
        )
    with torch.inference_mode(False):
        problem = _Problem.of(
            contributions.total, contributions.parts, y, temperature, noise, method, num_samples, generator
        )
        scales, output = problem.fit(tuple(contributions.groups))
    found = dict(zip(contributions.groups, scales.tolist(), strict=True))
    return LayerCalibration(contributions.groups, found, output)


def check_gaussian(name: str, predictive: Any) -> None:
    """A Gaussian prediction.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(predictive, Predictive):
        raise TypeError(f"{name}: expected a Predictive, got {type(predictive).__name__}.")
    if predictive.samples is not None:
        raise TypeError(f"{name}: expected a Gaussian, whose covariance can be scaled, got {predictive!r}.")


def _plain(predictive: Predictive) -> Predictive:
    """In float64, without a graph, and of tensors that a graph can begin with."""
    wide = predictive.detach().to(torch.float64)
    return copy.deepcopy(wide) if wide.mean.is_inference() else wide


def _rooted(spread: Spread, like: Predictive) -> Spread:
    """With a root in place of a matrix: a scale only multiplies it, so that it is factored once and not at each point.

    Args:
        spread: in float64.
        like: the prediction that it is of.
    """
    if spread.matrix is None:
        return spread
    ones = torch.eye(spread.width, dtype=like.dtype, device=like.device)
    columns = spread.colour(ones.view(-1, *[1] * len(like.batch_shape), spread.width))
    return Spread(root=columns.movedim(0, -1))


@dataclass(frozen=True, eq=False)
class _Problem:
    """Targets, and the moments that they are judged by, in pieces of the batch.

    Attributes:
        pieces: predictions that have the mean, covariances that are weighted, and targets; in float64 and without a
            graph.
        count: targets that are judged: labels, or events of real numbers.
        temperature: whether it is fitted.
        noise: where noise variances begin, ``(E,)``; ``None`` if they are not fitted.
        method: from a Gaussian to probabilities.
        num_samples: number of draws.
        seed: of those.
    """

    pieces: tuple[tuple[Predictive, tuple[Spread, ...], Tensor], ...]
    count: int
    temperature: bool
    noise: Tensor | None
    method: str
    num_samples: int | None
    seed: int

    @classmethod
    def of(
        cls,
        like: Predictive,
        parts: Sequence[Predictive],
        y: Any,
        temperature: bool,
        noise: bool,
        method: str,
        num_samples: int | None,
        generator: torch.Generator | None,
    ) -> _Problem:
        """Check what came."""
        if method not in PROBS_METHODS:
            raise ValueError(f"method: expected one of {', '.join(PROBS_METHODS)}, got {method!r}.")
        draws = NUM_DRAWS if num_samples is None else check_count("num_samples", num_samples)
        check_generator(generator)
        if not isinstance(y, Tensor):
            raise TypeError(f"y: expected a tensor, got {type(y).__name__}.")
        real = y.is_floating_point()
        if temperature and real:
            raise ValueError("temperature: it is for labels, but y has real numbers; expected False, got True.")
        if noise and not real:
            raise ValueError("noise: it is for real numbers, but y has labels; expected False, got True.")
        if not real and like.event_dim == 2:
            like, parts = like.pointwise(), [part.pointwise() for part in parts]
        if y.numel() == 0 or not like.batch_shape:
            raise ValueError(
                f"y: expected targets for a batch, got shape {tuple(y.shape)} beside a batch {tuple(like.batch_shape)}."
            )
        like, y = _plain(like), y.detach().clone()
        # Refuses other shapes, NaN and labels that do not exist; this Gaussian has a density if the other has none.
        wide = Predictive.from_moments(like.mean, variance=torch.ones_like(like.mean), event_dim=like.event_dim)
        wide.log_prob(y, "probit")
        white = (y.double() - like.mean).square().flatten(0, -2).mean(0).clamp_min(1e-30) if noise else None
        spreads = [Spread.of(_plain(part).covariance) for part in parts]
        size, each = like.event_shape.numel(), like.batch_shape[1:].numel()
        drawn = method == "sample" and not real
        if drawn and len(spreads) == 1:
            spreads = [_rooted(spreads[0], like)]
        numbers = each * size * (draws if drawn else 8 * size)
        step = max(_NUMBERS // max(numbers, 1), 1)
        if drawn:  # each piece has draws of its own: what they have by chance would move a scale that all rows share
            step = min(step, max(-(-len(like) // _PIECES), 64))
        pieces = []
        for start in range(0, len(like), step):
            rows = slice(start, start + step)
            pieces.append((like[rows], tuple(spread.take((rows,), True) for spread in spreads), y[rows]))
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(1 << 62, (), generator=generator, device=device))
        count = like.batch_shape.numel()
        return cls(tuple(pieces), count, temperature, white, method, num_samples, seed)

    def fit(self, names: tuple[str, ...]) -> tuple[Tensor, Calibration]:
        """Weights of the covariances, as many as there are names, and the rest."""
        if not names and not self.temperature and self.noise is None:
            raise ValueError("scale: expected something to fit, got False for scale, temperature and noise.")
        like = self.pieces[0][0].mean
        starts = [like.new_tensor(start) for start in self._starts(len(names))]
        with torch.no_grad():
            losses = [float(self._loss(start, len(names))) for start in starts]
        if not any(map(math.isfinite, losses)):
            raise ValueError("predictive: expected moments under which the targets are possible, got none of them.")
        start = starts[min(range(len(starts)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)]
        point = start.clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [point], max_iter=200, tolerance_grad=1e-7, tolerance_change=1e-10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            with torch.enable_grad():
                return self._loss(point, len(names), backward=True)

        optimiser.step(closure)
        with torch.no_grad():
            loss = float(self._loss(point, len(names)))
            if not loss <= min(losses):
                point, loss = start, min(losses)
            if self.method == "laplace_bridge":
                point, loss = self._polished(point.detach(), loss, len(names))
            weights, temperature, noise = self._numbers(point.detach(), len(names))
            alone = names == ("scale",)
            free = [*(("scale",) if alone else ()), *(("temperature",) if self.temperature else ())]
            loose = [name for i, name in enumerate(free) if self._is_loose(point.detach(), i, len(names), loss)]
        if loose:
            warnings.warn(
                f"calibration: the targets ask for as little or as much {' and '.join(loose)} as there can be; the fit "
                f"stopped at a scale of {float(weights[0]):.2g} and a temperature of {float(temperature):.2g}.",
                UserWarning,
                stacklevel=stacklevel_outside(),
            )
        scale = float(weights[0]) if alone else 1.0
        made = Calibration(scale, float(temperature), noise, self.method, loss, self._before(), self.count)
        return weights, made

    def _polished(self, point: Tensor, loss: float, number: int) -> tuple[Tensor, float]:
        """Where no step along a coordinate is downhill; the Laplace bridge has edges, where a line search may stop.

        The other methods are smooth, but for the least temperature of draws. With many scales there are many steps.
        """
        step = 0.2
        while step > 1e-4:
            better = False
            for direction in torch.cat([torch.eye(len(point)), -torch.eye(len(point))]).to(point):
                found = float(self._loss(point + step * direction, number))
                if found < loss - 1e-10:
                    point, loss, better = point + step * direction, found, True
            step = step if better else step / 2
        return point, loss

    def _starts(self, number: int) -> list[list[float]]:
        """Points of a grid, all scales alike."""
        temperatures = _TEMPERATURES if self.temperature else (0.0,)
        noises = (-2.0, 0.0) if self.noise is not None else (0.0,)
        size = 0 if self.noise is None else len(self.noise)
        return [
            [scale] * number + [heat] * self.temperature + [white] * size
            for scale in (_STARTS if number else (0.0,))
            for heat in temperatures
            for white in noises
        ]

    def _numbers(self, point: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weights, temperature and noise variances at a point; positive and bounded."""
        values = (BOUND * (point / BOUND).tanh()).exp()
        weights = values[:number] if number else values.new_ones(len(self.pieces[0][1]))
        temperature = values[number] if self.temperature else values.new_ones(())
        if number and self.method == "sample":  # cold and wide, draws are votes, of which a label may have none
            temperature = temperature.clamp_min(_COLDEST)
        return weights, temperature, None if self.noise is None else self.noise * values[number + self.temperature :]

    def _loss(self, point: Tensor, number: int, backward: bool = False) -> Tensor:
        """Negative log probability of a target, the mean over all; adds the gradient to that of the point if asked."""
        total = point.new_zeros(())
        for i in range(len(self.pieces)):
            part = self._judged(i, *self._numbers(point, number)) / self.count
            if backward:
                part.backward()
            total = total + part.detach()
        return total

    def _is_loose(self, point: Tensor, index: int, number: int, loss: float) -> bool:
        """Whether a number could be much smaller, or much larger, and the targets would not mind."""
        moved = [point.index_add(0, torch.tensor([index]), point.new_tensor([step])) for step in (-_FAR, _FAR)]
        return any(float(self._loss(other, number)) <= loss + _FLAT for other in moved)

    def _judged(self, number: int, weights: Tensor, temperature: Tensor, noise: Tensor | None) -> Tensor:
        like, spreads, y = self.pieces[number]
        made = corrected(like, spreads, weights, temperature, like.noise if noise is None else noise)
        # The same draws at each point of the fit.
        generator = torch.Generator(device=like.device).manual_seed(self.seed + number)
        return -made.log_prob(y, self.method, self.num_samples, generator).sum()

    @torch.no_grad()
    def _before(self) -> float:
        one = self.pieces[0][0].mean.new_ones(len(self.pieces[0][1]))
        try:
            return float(sum(self._judged(i, one, one[0], None) for i in range(len(self.pieces)))) / self.count
        except ValueError:  # no density without noise
            return math.inf

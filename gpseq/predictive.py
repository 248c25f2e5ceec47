"""What every method of the package answers with: a Gaussian or draws, under one interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from types import MappingProxyType
from typing import Any

import torch
from linear_operator.operators import DiagLinearOperator, LinearOperator
from torch import Tensor

from gpseq.checks import check_count, check_floating, check_number
from gpseq.logits import entropy, laplace_bridge, log_mean_exp, log_softmax, probit, probit_pairs, widened
from gpseq.prediction_checks import (
    broadcast,
    check_dim,
    check_event_dim,
    check_generator,
    check_index,
    check_like,
    check_noise,
    check_parts,
    check_scores,
)
from gpseq.spread import Spread

#: Draws from a Gaussian where class probabilities are averaged over them.
NUM_DRAWS = 256
#: How a Gaussian over logits becomes probabilities.
PROBS_METHODS = ("sample", "probit", "probit_pairs", "laplace_bridge")


@dataclass(frozen=True, eq=False, repr=False)
class Predictive:
    r"""A prediction: a Gaussian, or draws from any distribution.

    It is about the latent function values or logits f. For each element of the batch there is one *event*: the E
    outputs of a network, the n points of a Gaussian process, or n points with t tasks each. Noise of observations
    stands beside it, and only :meth:`log_prob` and :meth:`interval` look at it: the variance of y is
    ``variance + noise``.

    Make one with :meth:`from_samples`, :meth:`from_moments` or :meth:`from_distribution`. Gradients flow through
    everything. Probabilities, entropies and log probabilities are in float32 where f is in half precision.

    Attributes:
        samples: draws, ``(S, *batch, *event)``; ``None`` for a Gaussian.
        noise: noise variances of y, as ``samples`` or, for a Gaussian, ``(*batch, *event)``; ``None`` if not known.
        scores: named tensors ``(*batch, ...)`` that travel along.
        event_dim: number of dimensions of an event, 1 or 2.
        notes: how it was made, by name, such as the form of covariance that a propagation took; see :meth:`noted`.

    Example:
        >>> p = Predictive.from_samples(torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]]))  # two draws of two logits
        >>> p.probs()
        tensor([[0.5000, 0.5000]])
        >>> p.entropy(), p.mutual_information()
        (tensor([0.6931]), tensor([0.3278]))
    """

    samples: Tensor | None
    noise: Tensor | None
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    event_dim: int = 1
    _mean: Tensor | None = None
    _spread: Spread | None = None
    _interleaved: bool = True  # whether the covariance counts tasks before points
    notes: Mapping[str, Any] = field(default_factory=dict)

    # Making one

    @classmethod
    def from_samples(
        cls,
        samples: Tensor,
        noise: Tensor | float | None = None,
        scores: Mapping[str, Tensor] | None = None,
        event_dim: int = 1,
    ) -> Predictive:
        """A prediction by draws.

        Args:
            samples: ``(S, *batch, *event)``, S at least 1.
            noise: noise variances of y, broadcastable to the samples: each draw may have its own.
            scores: named tensors ``(*batch, ...)``.
            event_dim: dimensions of an event: 1 for ``(E,)``, 2 for ``(n, t)``.

        Returns:
            The prediction.

        Raises:
            TypeError: the samples are no floating-point tensor.
            ValueError: shapes that do not fit, or a negative noise.

        Example:
            >>> Predictive.from_samples(torch.zeros(10, 8, 3))
            Predictive(samples=10, batch_shape=(8,), event_shape=(3,), dtype=float32, device=cpu)
        """
        draws = check_floating("samples", samples)
        check_event_dim(event_dim)
        if draws.dim() < 1 + event_dim or len(draws) == 0:
            expected = f"shape (S, *batch, {'E' if event_dim == 1 else 'n, t'}) with S at least 1"
            raise ValueError(f"samples: expected {expected}, got {tuple(draws.shape)}.")
        batch = draws.shape[1 : draws.dim() - event_dim]
        return cls(draws, check_noise(noise, draws), check_scores(scores, batch), event_dim)

    @classmethod
    def from_moments(
        cls,
        mean: Tensor,
        covariance: Tensor | LinearOperator | None = None,
        variance: Tensor | None = None,
        noise: Tensor | float | None = None,
        scores: Mapping[str, Tensor] | None = None,
        event_dim: int = 1,
    ) -> Predictive:
        """A prediction by a Gaussian.

        Args:
            mean: ``(*batch, *event)``.
            covariance: ``(*batch, E, E)``, dense or lazy; for an event ``(n, t)`` that of its ``n t`` numbers in the
                order in which they lie in memory, tasks before points. Batch dimensions broadcast.
            variance: instead of it, variances of independent numbers, broadcastable to the mean.
            noise: noise variances of y, broadcastable to the mean.
            scores: named tensors ``(*batch, ...)``.
            event_dim: dimensions of an event: 1 for ``(E,)``, 2 for ``(n, t)``.

        Returns:
            The prediction.

        Raises:
            TypeError: the mean is no floating-point tensor, or the covariance has not its dtype.
            ValueError: shapes that do not fit, a variance that is negative or NaN, or not exactly one of covariance
                and variance.

        Example:
            >>> p = Predictive.from_moments(torch.zeros(4, 3), variance=torch.ones(3))
            >>> p.log_prob(torch.zeros(4, 3))
            tensor([-2.7568, -2.7568, -2.7568, -2.7568])
        """
        centre = check_floating("mean", mean)
        check_event_dim(event_dim)
        if centre.dim() < event_dim:
            raise ValueError(f"mean: expected at least {event_dim} dimensions, got shape {tuple(centre.shape)}.")
        if (covariance is None) == (variance is None):
            raise ValueError(
                "covariance: expected either it or variance, got " + ("none." if variance is None else "both.")
            )
        shape = centre.shape
        if variance is not None:
            variances = broadcast("variance", check_floating("variance", variance), shape)
            check_like("variance", variances, centre)
            if not (variances >= 0).all():
                raise ValueError(f"variance: expected numbers that are not negative, got {float(variances.min())}.")
            covariance = DiagLinearOperator(variances.reshape(*shape[: len(shape) - event_dim], -1))
        assert covariance is not None
        size = math.prod(shape[len(shape) - event_dim :])
        if not isinstance(covariance, LinearOperator):
            covariance = check_floating("covariance", covariance)
        check_like("covariance", covariance, centre)
        if covariance.dim() < 2 or covariance.shape[-2:] != (size, size):
            raise ValueError(
                f"covariance: expected shape (*batch, {size}, {size}) beside a mean of shape {tuple(shape)}, got "
                f"{tuple(covariance.shape)}."
            )
        try:
            batch = torch.broadcast_shapes(shape[: len(shape) - event_dim], covariance.shape[:-2])
        except RuntimeError as error:
            raise ValueError(
                f"covariance: its batch dimensions {tuple(covariance.shape[:-2])} do not broadcast with those of the "
                f"mean, {tuple(shape[: len(shape) - event_dim])}."
            ) from error
        centre = centre.expand(*batch, *shape[len(shape) - event_dim :])
        spread = Spread.of(covariance).expand(batch)
        return cls(
            None, check_noise(noise, centre), check_scores(scores, batch), event_dim, _mean=centre, _spread=spread
        )

    @classmethod
    def from_distribution(
        cls, distribution: Any, noise: Tensor | float | None = None, scores: Mapping[str, Tensor] | None = None
    ) -> Predictive:
        """A prediction by one of GPyTorch's distributions, whose covariance stays lazy.

        A lazy covariance may look at its model when it is evaluated: read what you need before the model changes.

        Args:
            distribution: ``MultivariateNormal``, whose event is the n points, or ``MultitaskMultivariateNormal``,
                whose event is ``(n, t)``.
            noise: noise variances of y, broadcastable to the mean.
            scores: named tensors ``(*batch, ...)``.

        Returns:
            The prediction.

        Raises:
            TypeError: it is another distribution.

        Example:
            >>> from gpytorch.distributions import MultivariateNormal
            >>> Predictive.from_distribution(MultivariateNormal(torch.zeros(5), torch.eye(5)))
            Predictive(Gaussian, batch_shape=(), event_shape=(5,), dtype=float32, device=cpu)
        """
        covariance = getattr(distribution, "lazy_covariance_matrix", None)
        if not isinstance(distribution, torch.distributions.MultivariateNormal) or covariance is None:
            raise TypeError(
                "distribution: expected a gpytorch MultivariateNormal or MultitaskMultivariateNormal, got "
                f"{type(distribution).__name__}."
            )
        event_dim = len(distribution.event_shape)
        if covariance.dtype != distribution.mean.dtype:  # what a lazy kernel says is the dtype of its parameters
            covariance = covariance.to_dense().to(distribution.mean.dtype)
        made = cls.from_moments(distribution.mean, covariance, noise=noise, scores=scores, event_dim=event_dim)
        object.__setattr__(made, "_interleaved", event_dim == 1 or bool(getattr(distribution, "_interleaved", True)))
        return made

    # What it is

    @property
    def num_samples(self) -> int | None:
        """S, or ``None`` for a Gaussian."""
        return None if self.samples is None else len(self.samples)

    @property
    def _like(self) -> Tensor:
        """A tensor of shape ``(*batch, *event)``: its mean, without the cost of averaging."""
        if self.samples is not None:
            return self.samples[0]
        assert self._mean is not None
        return self._mean

    @property
    def batch_shape(self) -> torch.Size:
        """Sizes of the batch."""
        return self._like.shape[: self._like.dim() - self.event_dim]

    @property
    def event_shape(self) -> torch.Size:
        """Sizes of an event, ``(E,)`` or ``(n, t)``."""
        return self._like.shape[self._like.dim() - self.event_dim :]

    @property
    def dtype(self) -> torch.dtype:
        """Of the mean."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Of the mean."""
        return self._like.device

    def __len__(self) -> int:
        if not self.batch_shape:
            raise TypeError("a prediction without batch dimensions has no length.")
        return self.batch_shape[0]

    def __repr__(self) -> str:
        kind = "Gaussian" if self.samples is None else f"samples={len(self.samples)}"
        shapes = f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}"
        scores = f", scores={sorted(self.scores)}" if self.scores else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Predictive({kind}, {shapes}, dtype={dtype}, device={self.device}{scores})"

    def noted(self, **notes: Any) -> Predictive:
        """The same with notes, values that say how it was made.

        Parts of the batch and copies keep them. Of several predictions that are put together those remain in which all
        agree.

        Args:
            notes: small values that can be compared, such as strings and numbers; earlier ones of other names stay.

        Returns:
            The prediction.

        Example:
            >>> p = Predictive.from_samples(torch.zeros(10, 8, 3)).noted(covariance="full")
            >>> p[2:5].notes["covariance"]
            'full'
        """
        return replace(self, notes=MappingProxyType({**self.notes, **notes}))

    # Moments and draws

    @property
    def mean(self) -> Tensor:
        """Mean of f, ``(*batch, *event)``."""
        if self.samples is None:
            return self._like
        return self.samples.mean(0)

    @property
    def variance(self) -> Tensor:
        """Variances of f, ``(*batch, *event)``; of draws, their mean squared deviation, divided by S."""
        if self.samples is None:
            assert self._spread is not None
            return self._unflatten(self._spread.variance)
        return (self.samples - self.samples.mean(0)).square().mean(0)

    @property
    def covariance(self) -> LinearOperator:
        """Covariance of f over the event, ``(*batch, E, E)``; of draws, low rank, with rank S - 1 at most.

        An event ``(n, t)`` is counted in the order in which it lies in memory, tasks before points. A lazy covariance
        in GPyTorch's other order, ``interleaved=False``, is evaluated for it.
        """
        return self._in_order().operator

    def rsample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draws of f, differentiable in the mean and the covariance, or in the draws that were given.

        A Gaussian is drawn through a root of its covariance: at O(E) if it is diagonal, O(E r) if it is low rank plus
        diagonal, O(E^3) otherwise. Of given draws n are taken with replacement, each for the whole batch, so that what
        is joint over the batch stays so.

        Args:
            n: number of draws.
            generator: where they come from; ``None`` is torch's default generator.

        Returns:
            ``(n, *batch, *event)``.

        Example:
            >>> p = Predictive.from_moments(torch.zeros(4, 3), variance=torch.ones(3))
            >>> p.rsample(5, generator=torch.Generator().manual_seed(0)).shape
            torch.Size([5, 4, 3])
        """
        check_count("n", n)
        check_generator(generator)
        if self.samples is not None:
            chosen = torch.randint(len(self.samples), (n,), generator=generator, device=self.device)
            return self.samples[chosen]
        assert self._spread is not None
        normals = self._normals(n, self.batch_shape, generator)
        return self.mean + self._unflatten(self._spread.colour(normals))

    # Observations

    def log_prob(
        self,
        y: Tensor,
        method: str = "sample",
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Log probability of labels, or log density of real observations.

        Labels are integers; the probabilities are averaged before the logarithm. Real observations are judged jointly
        over the event:

        - Gaussian: :math:`\log N(y \mid m, C + \text{noise})`;
        - draws with noise: :math:`\log \tfrac1S \sum_s N(y \mid f_s, \text{noise}_s)`;
        - draws without noise: the Gaussian with their moments, which needs more draws than numbers in an event.

        Densities are computed in float64, and come in float32 where f is in half precision.

        Args:
            y: labels in an integer dtype or bool, ``(*batch,)``, or ``(*batch, n)`` for events ``(n, K)``; 0 or 1 where
                there is one logit. Or real numbers, ``(*batch, *event)``.
            method: for labels and a Gaussian, see :meth:`probs`.
            num_samples: the same.
            generator: the same.

        Returns:
            In nats; for labels as y, each by itself, for real numbers ``(*batch)``.

        Raises:
            TypeError: y is no tensor.
            ValueError: y has another shape, NaN, or labels that do not exist; or there is no density.

        Example:
            >>> p = Predictive.from_samples(torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]]))
            >>> p.log_prob(torch.tensor([0]))
            tensor([-0.6931])
        """
        if not isinstance(y, Tensor):
            raise TypeError(f"y: expected a tensor, got {type(y).__name__}.")
        if y.is_complex():
            raise TypeError(f"y: expected labels or real numbers, got {y.dtype}.")
        if not y.is_floating_point():
            labels = self._check_labels(y)
            log_probs = self._log_probs(method, num_samples, generator)
            return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        if y.shape != self._like.shape:
            raise ValueError(
                f"y: expected real numbers of shape {tuple(self._like.shape)}, or labels in an integer dtype, got "
                f"shape {tuple(y.shape)} in {y.dtype}."
            )
        if y.isnan().any():
            raise ValueError(f"y: expected numbers, got NaN in {int(y.isnan().sum())} of {y.numel()} entries.")
        if self.samples is not None and self.noise is not None:
            white = self.noise.double()
            if not (white > 0).all():
                raise ValueError("noise: there is no density of draws without noise; expected positive variances.")
            squared = (y.double() - self.samples.double()).square() / white
            densities = -0.5 * (squared + white.log() + math.log(2 * math.pi))
            events = tuple(range(-self.event_dim, 0))
            return (densities.sum(events).logsumexp(0) - math.log(len(self.samples))).to(widened(self._like).dtype)
        size = self.event_shape.numel()
        if self.samples is not None and len(self.samples) <= size:
            raise ValueError(
                f"samples: without noise a density needs more draws than the {size} numbers of an event, got "
                f"{len(self.samples)}; give noise, or take pointwise()."
            )
        noise = None if self.noise is None else self._flatten(self.noise)
        exact = self._map(Tensor.double) if self.samples is not None else self
        residual = self._flatten(y.double() - exact.mean.double())
        return exact._moments().log_density(residual, noise).to(widened(self._like).dtype)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        r"""Central interval of each observation by itself, which it is in with a probability.

        A Gaussian has :math:`m \mp z \sqrt{v + \text{noise}}` with :math:`\Phi(z) = (1 + \text{level}) / 2`. Draws have
        the quantiles of their mixture, each with its noise about it; they carry no gradient. Without noise the interval
        is that of f.

        Args:
            level: the probability, between 0 and 1.

        Returns:
            Lower and upper ends, ``(*batch, *event)`` each.

        Raises:
            ValueError: another level.

        Example:
            >>> p = Predictive.from_moments(torch.tensor([1.0]), variance=torch.tensor([3.0]), noise=1.0)
            >>> p.interval(0.95)
            (tensor([-2.9199]), tensor([4.9199]))
        """
        expected = "a probability between 0 and 1"
        probability = check_number("level", level, above=0.0, expected=expected)
        if probability >= 1:
            raise ValueError(f"level: expected {expected}, got {level!r}.")
        if self.samples is not None:
            ends = (1 - probability) / 2, (1 + probability) / 2
            lower, upper = (_mixture_quantile(self.samples, self.noise, end) for end in ends)
            return lower, upper
        total = self.variance if self.noise is None else self.variance + self.noise
        width = NormalDist().inv_cdf((1 + probability) / 2) * total.sqrt()
        return self.mean - width, self.mean + width

    # Classes

    def probs(
        self, method: str = "sample", num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""Class probabilities, where f are logits.

        Draws: :math:`\tfrac1S \sum_s \operatorname{softmax}(f_s)`; the logits are never averaged. A Gaussian has
        four methods:

        - ``"sample"``: the same with antithetic draws, the same for all elements of the batch, so that rows can be
          compared.
        - ``"probit"``: :math:`\operatorname{softmax}(m / \sqrt{1 + \tfrac\pi8 v})`. Deterministic, and blind to
          correlations: noise that all logits share moves it, though it moves no probability.
        - ``"probit_pairs"``: :math:`p_k \propto 1 / \sum_j \exp(-(m_k - m_j) / \sqrt{1 + \tfrac\pi8 s_{kj}^2})`,
          :math:`s_{kj}^2` the variance of the difference of the logits k and j. Deterministic, exact where shared noise
          is all there is, O(K^2). For few classes: each pair is flattened by itself, which adds up, so that with ten
          independent logits of unit variance about a twentieth of the probability is misplaced, towards the unlikely
          classes, and with a hundred more than a tenth.
        - ``"laplace_bridge"``: mean of the Dirichlet that :func:`gpseq.logits.laplace_bridge` makes of the Gaussian.
          Deterministic, and for comparison only: with more than two classes it is too flat however small the
          variances are.

        One logit is that of class 1 of two.

        Args:
            method: how a Gaussian is averaged; draws know ``"sample"`` only.
            num_samples: draws from a Gaussian, 256 by default; given draws are all used.
            generator: where those come from; ``None`` is torch's default generator.

        Returns:
            ``(*batch, K)``, or ``(*batch, n, K)`` for events ``(n, K)``; K is 2 where there is one logit.

        Raises:
            ValueError: an unknown method, a number of draws where the draws are given, or NaN among the logits.

        Source:
            MacKay (1992), The evidence framework applied to classification networks, for the probit rule;
            Hobbhahn, Kristiadi and Hennig (2022), Fast predictive uncertainty for classification with Bayesian deep
            networks, for the bridge.

        Example:
            >>> p = Predictive.from_moments(torch.tensor([3.0]), variance=torch.tensor([9.0]))
            >>> p.probs("probit"), torch.tensor(3.0).sigmoid()  # less sure than the mean alone
            (tensor([0.1964, 0.8036]), tensor(0.9526))
        """
        if method == "sample":  # without the detour by the logarithm of the average
            return self._log_probs_of_draws(num_samples, generator).exp().mean(0)
        return self._log_probs(method, num_samples, generator).exp()

    def entropy(
        self, method: str = "sample", num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""Entropy of the averaged probabilities, :math:`-\sum_k \bar p_k \log \bar p_k`: the whole uncertainty.

        Args:
            method: as in :meth:`probs`, and so are the others.
            num_samples: draws from a Gaussian.
            generator: where they come from.

        Returns:
            ``(*batch)``, or ``(*batch, n)`` for events ``(n, K)``, in nats.
        """
        return entropy(self._log_probs(method, num_samples, generator))

    def expected_entropy(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        r"""Average entropy of the draws, what certainty about f would leave.

        .. math:: \tfrac1S \sum_s H[\operatorname{softmax}(f_s)]

        Args:
            num_samples: draws from a Gaussian, as in :meth:`probs`.
            generator: where they come from.

        Returns:
            ``(*batch)``, or ``(*batch, n)`` for events ``(n, K)``, in nats.
        """
        return entropy(self._log_probs_of_draws(num_samples, generator)).mean(0)

    def mutual_information(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        r"""Mutual information of the label and f: :meth:`entropy` minus :meth:`expected_entropy`, of the same draws.

        Args:
            num_samples: draws from a Gaussian, as in :meth:`probs`.
            generator: where they come from.

        Returns:
            ``(*batch)``, or ``(*batch, n)`` for events ``(n, K)``, in nats, not negative.
        """
        log_probs = self._log_probs_of_draws(num_samples, generator)
        return (entropy(log_mean_exp(log_probs)) - entropy(log_probs).mean(0)).clamp_min(0)

    # Batches

    def pointwise(self) -> Predictive:
        """Each point of an event as an element of the batch of its own; what is known across points is left out.

        Returns:
            Event ``(n,)``: batch ``(*batch, n)``, event ``(1,)``. Event ``(n, t)``: batch ``(*batch, n)``, event
            ``(t,)``, with the covariance of the tasks. Scores are repeated for each point.

        Example:
            >>> p = Predictive.from_moments(torch.zeros(5), torch.eye(5), noise=0.1)
            >>> p.pointwise().log_prob(torch.zeros(5, 1)).shape
            torch.Size([5])
        """
        batch, n = self.batch_shape, self.event_shape[0]
        t = 1 if self.event_dim == 1 else self.event_shape[1]
        scores = {
            name: s.unsqueeze(len(batch)).expand(*batch, n, *s.shape[len(batch) :]) for name, s in self.scores.items()
        }
        noise = self.noise
        if noise is not None and self.event_dim == 1:
            noise = noise.unsqueeze(-1)
        if self.samples is not None:
            samples = self.samples if self.event_dim == 2 else self.samples.unsqueeze(-1)
            return Predictive(samples, noise, MappingProxyType(scores), notes=self.notes)
        assert self._spread is not None
        if self.event_dim == 1:
            return Predictive(
                None,
                noise,
                MappingProxyType(scores),
                _mean=self.mean.unsqueeze(-1),
                _spread=Spread(self.variance.unsqueeze(-1)),
                notes=self.notes,
            )
        spread = self._spread.blocks(n, t, self._interleaved)
        return Predictive(None, noise, MappingProxyType(scores), _mean=self.mean, _spread=spread, notes=self.notes)

    def __getitem__(self, index: Any) -> Predictive:
        """Part of the batch: integers, slices, tensors, arrays or lists of them, masks and ``...``, as for tensors."""
        entries, basic = check_index(index, self.batch_shape)

        def take(value: Tensor) -> Tensor:
            return value[entries]

        def take_draws(value: Tensor) -> Tensor:  # draws last, where they are in no index's way
            return value.movedim(0, -1)[entries].movedim(-1, 0)

        spread = None if self._spread is None else self._spread.take(entries, basic)
        return self._with(take, take_draws, spread)

    @classmethod
    def cat(cls, predictions: Sequence[Predictive], dim: int = 0) -> Predictive:
        """Predictions for several batches as one.

        Args:
            predictions: of one kind, with the same event, number of draws, names of scores, dtype and device; either
                all with noise or none.
            dim: batch dimension along which they follow one another; negative ones count from the last.

        Returns:
            The prediction.

        Raises:
            TypeError: one is no prediction, or dim is no integer.
            ValueError: they do not fit.
            IndexError: there is no such dimension.

        Example:
            >>> p = Predictive.from_samples(torch.randn(10, 8, 3))
            >>> Predictive.cat([p[:5], p[5:]])
            Predictive(samples=10, batch_shape=(8,), event_shape=(3,), dtype=float32, device=cpu)
        """
        parts = check_parts(predictions, cls)
        first = parts[0]
        dim = check_dim(dim, len(first.batch_shape))
        for number, part in enumerate(parts[1:], start=1):
            for what, one, other in (
                ("kind", first._kind, part._kind),
                ("event shape", tuple(first.event_shape), tuple(part.event_shape)),
                ("batch shape elsewhere", _without(first.batch_shape, dim), _without(part.batch_shape, dim)),
                ("dtype", first.dtype, part.dtype),
                ("device", first.device, part.device),
                ("noise", first.noise is not None, part.noise is not None),
                ("scores", sorted(first.scores), sorted(part.scores)),
            ):
                if one != other:
                    raise ValueError(
                        f"predictions: expected the same {what} everywhere, got {one} in number 0 and {other} in "
                        f"number {number}."
                    )
        if first.samples is not None:
            samples = torch.cat([part.samples for part in parts if part.samples is not None], dim + 1)
        else:
            samples = None
        shift = 0 if samples is None else 1
        noises = [part.noise for part in parts if part.noise is not None]
        scores = {name: torch.cat([part.scores[name] for part in parts], dim) for name in first.scores}
        spreads = [part._in_order() for part in parts if part.samples is None]
        return cls(
            samples,
            torch.cat(noises, dim + shift) if noises else None,
            MappingProxyType(scores),
            first.event_dim,
            torch.cat([part.mean for part in parts], dim) if samples is None else None,
            Spread.cat(spreads, dim) if spreads else None,
            notes=MappingProxyType({name: first.notes[name] for name in first.notes if _agree(parts, name)}),
        )

    # Places and copies

    def to(self, *args: Any, **kwargs: Any) -> Predictive:
        """On another device or in another floating dtype, as ``Tensor.to``; a lazy covariance is evaluated."""

        def move(value: Tensor) -> Tensor:
            if value.is_floating_point():
                return value.to(*args, **kwargs)
            device = torch.empty(0, device=value.device).to(*args, **kwargs).device
            return value.to(device)

        moved = self._like[(0,) * self._like.dim()] if self._like.numel() else self._like
        target = move(moved.detach())
        if not target.is_floating_point():
            raise TypeError(f"dtype: expected a floating-point one, got {target.dtype}.")
        return self if (target.dtype, target.device) == (self.dtype, self.device) else self._map(move)

    def cpu(self) -> Predictive:
        """In the memory of the CPU."""
        return self.to("cpu")

    def detach(self) -> Predictive:
        """Without a graph; a lazy covariance is evaluated, so that it does not look at its model any more."""
        with torch.no_grad():
            return self._map(Tensor.detach)

    def __deepcopy__(self, memo: dict[int, Any]) -> Predictive:
        return self._map(Tensor.clone)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: values, and never a lazy covariance that drags its model along."""
        plain = self._map(lambda t: t)
        return {**vars(plain), "scores": dict(plain.scores), "notes": dict(plain.notes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {"notes": {}, **state}.items():  # files of earlier versions have no notes
            object.__setattr__(self, name, MappingProxyType(value) if name in ("scores", "notes") else value)

    # Inside

    @property
    def _kind(self) -> str:
        return "a Gaussian" if self.samples is None else f"{len(self.samples)} draws"

    def _with(
        self, function: Callable[[Tensor], Tensor], on_draws: Callable[[Tensor], Tensor], spread: Spread | None
    ) -> Predictive:
        """Its tensors by one function, those with a dimension of draws by another."""
        of_noise = function if self.samples is None else on_draws
        return Predictive(
            None if self.samples is None else on_draws(self.samples),
            None if self.noise is None else of_noise(self.noise),
            MappingProxyType({name: function(score) for name, score in self.scores.items()}),
            self.event_dim,
            None if self._mean is None else function(self._mean),
            spread,
            self._interleaved,
            self.notes,
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> Predictive:
        spread = None if self._spread is None else self._spread.map(lambda t, _: function(t))
        return self._with(function, function, spread)

    def _in_order(self) -> Spread:
        """The covariance with tasks before points."""
        spread = self._moments()
        if self._interleaved:
            return spread
        n, t = self.event_shape
        return spread.permuted(torch.arange(n * t, device=self.device).view(t, n).T.reshape(-1))

    def _moments(self) -> Spread:
        """The covariance over the event in the order of :meth:`_flatten`."""
        if self._spread is not None:
            return self._spread
        assert self.samples is not None
        centred = self._flatten(self.samples - self.samples.mean(0)) / math.sqrt(len(self.samples))
        return Spread(root=centred.movedim(0, -1))

    def _flatten(self, value: Tensor) -> Tensor:
        """``(..., *event)`` as ``(..., E)`` in the order of the covariance."""
        if self.event_dim == 1:
            return value
        return (value if self._interleaved else value.mT).flatten(-2)

    def _unflatten(self, value: Tensor) -> Tensor:
        """The inverse of :meth:`_flatten`."""
        if self.event_dim == 1:
            return value
        n, t = self.event_shape
        return value.unflatten(-1, (n, t)) if self._interleaved else value.unflatten(-1, (t, n)).mT

    def _normals(self, n: int, batch: Sequence[int], generator: torch.Generator | None) -> Tensor:
        check_generator(generator)
        assert self._spread is not None
        size = (n, *batch, self._spread.width)
        return torch.randn(size, generator=generator, dtype=self.dtype, device=self.device)

    def _check_labels(self, y: Tensor) -> Tensor:
        expected = self._like.shape[:-1]
        if y.shape != expected:
            raise ValueError(
                f"y: expected labels of shape {tuple(expected)}, got {tuple(y.shape)} in {y.dtype}; a density is asked "
                "for with a floating-point y."
            )
        classes = max(self.event_shape[-1], 2)
        labels = y.long()
        if labels.numel() and (labels.min() < 0 or labels.max() >= classes):
            raise ValueError(
                f"y: expected labels from 0 to {classes - 1}, got from {int(labels.min())} to {int(labels.max())}."
            )
        return labels

    def _log_probs_of_draws(self, num_samples: int | None, generator: torch.Generator | None) -> Tensor:
        """Log probabilities of each draw, ``(S, *batch, K)``."""
        if self.samples is not None:
            if num_samples is not None:
                raise ValueError(f"num_samples: the {len(self.samples)} draws are given, got {num_samples}.")
            return log_softmax(self.samples)
        n = NUM_DRAWS if num_samples is None else check_count("num_samples", num_samples)
        assert self._spread is not None
        half = self._normals((n + 1) // 2, [1] * len(self.batch_shape), generator)
        deviations = self._spread.colour(torch.cat([half, -half])[:n])
        return log_softmax(self.mean + self._unflatten(deviations))

    def _log_probs(self, method: str, num_samples: int | None, generator: torch.Generator | None) -> Tensor:
        """Log of the probabilities, ``(*batch, K)``."""
        if method not in PROBS_METHODS:
            raise ValueError(f"method: expected one of {', '.join(PROBS_METHODS)}, got {method!r}.")
        if method == "sample":
            return log_mean_exp(self._log_probs_of_draws(num_samples, generator))
        if self.samples is not None:
            raise ValueError(f"method: draws are averaged by 'sample', got {method!r}, which is for Gaussians.")
        if method == "probit":
            return log_softmax(probit(self.mean, self.variance))
        if self.event_shape[-1] == 1 and method == "probit_pairs":  # a pair already
            return self._log_probs("probit", None, None)
        if self.event_dim == 2:
            return self.pointwise()._log_probs(method, None, None)
        assert self._spread is not None
        mean, covariance = self.mean, self._spread.dense
        if method == "probit_pairs":
            return log_softmax(probit_pairs(mean, covariance))
        if self.event_shape[-1] == 1:
            mean, covariance = torch.nn.functional.pad(mean, (1, 0)), torch.nn.functional.pad(covariance, (1, 0, 1, 0))
        return log_softmax(laplace_bridge(mean, covariance))


def _agree(predictions: Sequence[Predictive], name: str) -> bool:
    """Whether all have the same note."""
    found = [p.notes[name] for p in predictions if name in p.notes]
    return len(found) == len(predictions) and all(value == found[0] for value in found)


@torch.no_grad()
def _mixture_quantile(centres: Tensor, variances: Tensor | None, probability: float) -> Tensor:
    """Quantile of a mixture of normal distributions, ``(S, *shape)`` to ``(*shape)``, by bisection."""
    wide = centres.double()
    deviation = torch.zeros_like(wide) if variances is None else variances.double().sqrt()
    ends = wide + NormalDist().inv_cdf(probability) * deviation  # of each, and that of the mixture is between them
    low, high = ends.amin(0), ends.amax(0)
    safe = deviation.clamp_min(torch.finfo(wide.dtype).tiny)
    for _ in range(60):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle - wide) / safe).mean(0) < probability
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high.to(centres.dtype)


def _without(batch: torch.Size, dim: int) -> tuple[int, ...]:
    return (*batch[:dim], *batch[dim + 1 :])

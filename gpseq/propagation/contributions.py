"""What each group of weights contributes to the covariance of a network's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.predictive import Predictive
from gpseq.propagation.forward import propagate
from gpseq.propagation.posteriors import WeightPosterior, bind
from gpseq.spread import Spread


@dataclass(frozen=True, eq=False)
class Contributions:
    """What each group of weights contributes to the covariance of the outputs, to first order.

    Attributes:
        groups: names of parameters, by the names of groups.
        total: the prediction with all of them uncertain.
        parts: predictions with the weights of one group uncertain and all others certain, in the order of the groups.
    """

    groups: Mapping[str, tuple[str, ...]]
    total: Predictive
    parts: tuple[Predictive, ...]

    @property
    def mean(self) -> Tensor:
        """Mean with all weights uncertain, ``(*batch, *event)``."""
        return self.total.mean

    @property
    def covariances(self) -> Tensor:
        """Those of the groups, dense, ``(groups, *batch, E, E)``."""
        return torch.stack([part.covariance.to_dense() for part in self.parts])

    def weighted(self, scales: Mapping[str, float] | None = None) -> Predictive:
        """The mean with the weighted sum of the covariances.

        Args:
            scales: positive weights by names of groups; a group that is not named has weight one.

        Returns:
            The prediction.

        Raises:
            ValueError: an unknown group.
        """
        scales = dict(scales or {})
        unknown = sorted(set(scales) - set(self.groups))
        if unknown:
            raise ValueError(f"scales: expected names of groups ({', '.join(self.groups)}), got {', '.join(unknown)}.")
        weights = self.mean.new_tensor([scales.get(name, 1.0) for name in self.groups])
        spreads = [Spread.of(part.covariance) for part in self.parts]
        return corrected(self.total, spreads, weights, self.mean.new_ones(()), self.total.noise)


def layer_contributions(
    model: nn.Module,
    posterior: WeightPosterior,
    x: Tensor | Mapping[str, Any],
    groups: Mapping[str, Sequence[str]] | None = None,
    **options: Any,
) -> Contributions:
    """Propagate once for each group of weights, with all others certain, and once with all of them uncertain.

    To first order the covariance of the outputs is the sum of the contributions. What is of second order, products of
    the noise of two groups, is in the total only.

    Args:
        model: as for :func:`~gpseq.propagation.propagate`.
        posterior: of its weights.
        x: held-out inputs.
        groups: names of uncertain parameters by names of groups, each parameter once; ``None`` is one group for each
            module that has uncertain parameters of its own, where those that share a joint law stay together.
        options: of :func:`~gpseq.propagation.propagate`, and further arguments of the model.

    Returns:
        The contributions.

    Raises:
        ValueError: groups that leave out parameters, have some twice or cut a joint law.

    Example:
        >>> from gpseq.propagation import from_variances
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> posterior = from_variances({name: torch.full_like(p, 0.01) for name, p in model.named_parameters()})
        >>> layer_contributions(model, posterior, torch.randn(5, 3)).covariances.shape
        torch.Size([2, 5, 2, 2])
    """
    bind(posterior, model)
    chosen = _by_module(posterior) if groups is None else _checked(posterior, groups)
    total = propagate(model, posterior, x, **options)
    parts = tuple(propagate(model, restricted(posterior, names), x, **options) for names in chosen.values())
    return Contributions(chosen, total, parts)


def restricted(posterior: WeightPosterior, names: Sequence[str]) -> WeightPosterior:
    """A posterior with only some parameters uncertain; the means of all stay.

    Args:
        posterior: any.
        names: of parameters; a joint law is in it as a whole or not at all.
    """
    laws = {name: law for name, law in posterior.laws.items() if name in names}
    joints = tuple(joint for joint in posterior.joints if set(joint.names) <= set(names))
    return WeightPosterior(laws, joints, posterior.means)


def corrected(
    like: Predictive, spreads: Sequence[Spread], weights: Tensor, temperature: Tensor, noise: Tensor | None
) -> Predictive:
    """A mean with a weighted sum of covariances, and all of it over a temperature.

    Args:
        like: the prediction that has the mean, scores and notes.
        spreads: the covariances, tasks before points.
        weights: of them, one each.
        temperature: a number.
        noise: variances of observations.
    """
    spread = _combined(spreads, weights / temperature.square())
    made = Predictive.from_moments(
        like.mean / temperature, spread.operator, noise=noise, scores=like.scores, event_dim=like.event_dim
    )
    return made.noted(**like.notes)


def _combined(spreads: Sequence[Spread], weights: Tensor) -> Spread:
    """A weighted sum of covariances, in the form that they have."""
    pairs = list(zip(spreads, weights.unbind(), strict=True))
    if any(spread.matrix is not None for spread in spreads):
        if len(spreads) == 1 and spreads[0].matrix is not None:
            return Spread(matrix=spreads[0].matrix * weights[0])  # what is lazy stays so
        return Spread(matrix=torch.stack([spread.dense * weight for spread, weight in pairs]).sum(0))
    diagonals = [spread.diagonal * weight for spread, weight in pairs if spread.diagonal is not None]
    roots = [spread.root * weight.sqrt() for spread, weight in pairs if spread.root is not None]
    return Spread(torch.stack(diagonals).sum(0) if diagonals else None, torch.cat(roots, dim=-1) if roots else None)


def _by_module(posterior: WeightPosterior) -> dict[str, tuple[str, ...]]:
    """Groups of parameters by the module that they belong to; those of a joint law are together."""
    place = {name: name.rpartition(".")[0] or "model" for name in posterior.names}
    for joint in posterior.joints:
        together = {place[name] for name in joint.names}
        place = {name: min(together) if found in together else found for name, found in place.items()}
    groups: dict[str, tuple[str, ...]] = {}
    for name, found in place.items():
        groups[found] = (*groups.get(found, ()), name)
    return groups


def _checked(posterior: WeightPosterior, groups: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    found = {group: tuple(names) for group, names in groups.items()}
    listed = [name for names in found.values() for name in names]
    if sorted(listed) != sorted(posterior.names):
        wrong = sorted(set(listed) ^ set(posterior.names) | {name for name in listed if listed.count(name) > 1})
        raise ValueError(
            f"groups: expected each uncertain parameter once, got {', '.join(wrong)} not at all, more than once, or "
            "without a law."
        )
    for joint in posterior.joints:
        if not any(set(joint.names) <= set(names) for names in found.values()):
            raise ValueError(f"groups: expected {', '.join(joint.names)}, which have a joint law, in one group.")
    return found

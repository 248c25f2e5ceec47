"""Several frozen streams side by side, each believed as far as its evidence goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

from gpseq.checks import check_number
from gpseq.models.observations import is_gaussian
from gpseq.models.streaming_gp import StreamingGP
from gpseq.precision import Float64Buffers


class StreamingEnsemble(Float64Buffers):
    r"""Streams with different frozen hyperparameters, weighted by their evidence.

    The safer way to let a lengthscale move: nothing is ever learnt by gradients, each member is a plain
    :class:`StreamingGP`, and after every chunk the weights follow the evidence increments,

    .. math::
        w_e \propto w_e^{\,\delta} \exp\bigl(\mathcal L_e^{new} - \mathcal L_e^{old}\bigr).

    With the discount :math:`\delta = 1` these are the posterior probabilities of the members, to the accuracy of their
    bounds; below one the past of the weights fades, so that another member can take over when the series changes.
    All members see the same chunks and must have the same basis schedule, because evidence compares at nothing else.

    Args:
        models: the members: same features and ``horizon_growth``, no batch shape, ``learn="never"``, and no
            ``max_features``, which would let their orders differ.
        discount: :math:`\delta`, in (0, 1].

    Raises:
        TypeError: a member is something else.
        ValueError: fewer than two members, members whose evidence does not compare, or a discount out of range.

    Source:
        Raftery, Karny and Ettler (2010), Online prediction under model uncertainty via dynamic model averaging, for
        the discount.

    Example:
        >>> import gpseq, gpytorch
        >>> def member(lengthscale):
        ...     kernel = gpytorch.kernels.RBFKernel()
        ...     kernel.lengthscale = lengthscale
        ...     likelihood = gpytorch.likelihoods.GaussianLikelihood()
        ...     return StreamingGP(gpseq.features.HippoFeatures(40, horizon=6.0), kernel, likelihood)
        >>> ensemble = StreamingEnsemble([member(0.3), member(1.5)])
        >>> x = torch.linspace(0.0, 6.0, 60)
        >>> ensemble = ensemble.update(x, x.sin())
        >>> bool(ensemble.weights[1] > 0.9), ensemble.predict(torch.tensor([3.0])).mean.shape
        (True, torch.Size([1]))
    """

    log_weights: Tensor

    def __init__(self, models: Sequence[StreamingGP], discount: float = 1.0) -> None:
        super().__init__()
        models = list(models)
        for model in models:
            if not isinstance(model, StreamingGP):
                raise TypeError(f"models: expected StreamingGP, got {type(model).__name__}.")
        if len({id(model) for model in models}) < len(models):
            raise ValueError("models: expected different streams, got one of them twice.")
        if len(models) < 2:
            raise ValueError(f"models: expected at least two, got {len(models)}.")
        for model in models[1:]:
            if (reason := _difference(models[0], model)) is not None:
                raise ValueError(f"models: expected the same {reason} in all; their evidence would not compare.")
        if any(m.learn != "never" or m.max_features is not None or m.state.r.dim() > 1 for m in models):
            raise ValueError("models: expected learn='never', max_features=None and no batch shape in all.")
        number = check_number("discount", discount, 0.0, "a number in (0, 1]")
        if number > 1:
            raise ValueError(f"discount: expected a number in (0, 1], got {discount!r}.")
        self.models = nn.ModuleList(models)
        self.discount = number
        self.register_buffer("log_weights", torch.zeros(len(models), dtype=torch.float64))
        self.log_weights = self.log_weights.to(models[0].state.r.device) - torch.tensor(len(models)).log()

    @property
    def members(self) -> list[StreamingGP]:
        """The streams."""
        return [cast(StreamingGP, model) for model in self.models]

    @property
    def weights(self) -> Tensor:
        """Probabilities of the members, ``(E,)``, float64."""
        return self.log_weights.softmax(0)

    def update(self, x: Tensor, y: Tensor, **kwargs: Any) -> StreamingEnsemble:
        """Absorb a chunk in every member and move the weights, in place; if one member fails, nothing has changed.

        Args:
            x: as in :meth:`StreamingGP.update`.
            y: likewise.
            kwargs: likewise.

        Returns:
            The ensemble itself.
        """
        snapshots, log_weights = [model._snapshot() for model in self.members], self.log_weights
        before = torch.stack([model.log_evidence for model in self.members])
        try:
            for model in self.members:
                model.update(x, y, **kwargs)
                if not torch.equal(model.state.nodes, self.members[0].state.nodes):
                    raise ValueError(
                        f"models: {type(model.features).__name__} have come to different bases in different members, "
                        "so that their evidence does not compare."
                    )
            if all(
                torch.equal(model.state.count, old[1].count) for model, old in zip(self.members, snapshots, strict=True)
            ):
                return self  # nothing was observed
            gain = torch.stack([model.log_evidence for model in self.members]) - before
            self.log_weights = (self.discount * log_weights + gain).log_softmax(0)
        except BaseException:
            for model, snapshot in zip(self.members, snapshots, strict=True):
                model._restore(snapshot)
            self.log_weights = log_weights
            raise
        return self

    def predict(self, x: Tensor, noise: Tensor | None = None) -> MixtureSameFamily:
        """Marginal predictions of new observations, with Gaussian likelihoods.

        Args:
            x: inputs, ``(n,)`` or ``(n, d)``.
            noise: noise variances, for likelihoods without noise of their own.

        Returns:
            A mixture of normals over ``(n,)`` values: its ``mean``, ``variance`` and ``log_prob`` are those of the
            ensemble.

        Raises:
            TypeError: the likelihood of a member is not Gaussian.
        """
        for model in self.members:
            if not is_gaussian(model.likelihood):
                got = type(model.likelihood).__name__
                raise TypeError(f"models: only Gaussian likelihoods predict normals, got {got}.")
        kwargs = {} if noise is None else {"noise": noise}
        members = [model.likelihood(model(x), **kwargs) for model in self.members]
        mean = torch.stack([member.mean for member in members], dim=-1)
        std = torch.stack([member.variance for member in members], dim=-1).sqrt()
        mixing = Categorical(logits=self.log_weights.to(mean.dtype).expand(mean.shape))
        return MixtureSameFamily(mixing, Normal(mean, std))


def _difference(first: StreamingGP, other: StreamingGP) -> str | None:
    """What of the schedules of two streams differs, if anything does."""
    a, b = first.state, other.state
    if type(first.features) is not type(other.features) or a.nodes.shape != b.nodes.shape:
        return "features"
    saved = zip(first.features.state_dict().values(), other.features.state_dict().values(), strict=True)
    if not torch.equal(a.nodes, b.nodes) or not all(torch.equal(one, two) for one, two in saved):
        return "features"
    if type(first.likelihood) is not type(other.likelihood):
        return "kind of likelihood"
    if first.horizon_growth != other.horizon_growth:
        return "horizon_growth"
    if first.variational_strategy.transfer != other.variational_strategy.transfer:
        return "transfer"
    if not torch.equal(a.count, b.count):
        return "number of observations"
    return None

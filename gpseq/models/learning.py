"""Hyperparameters that follow a stream: a few careful steps on the online bound of one chunk."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

import gpytorch
import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from gpytorch.means import Mean
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor

from gpseq.features import InducingFeatures
from gpseq.models.observations import Observations, expectation_of, is_gaussian, longest_step, noise_of
from gpseq.models.scales import chain_gradients, scales_of
from gpseq.variational import OnlineState, Prior, online, sites
from gpseq.variational.sites import Sites

#: Steps and rate at a change of basis: no hyperparameter moves by more than about a fifth of itself.
STEPS, RATE = 20, 0.01

#: How far hyperparameters are expected to drift from one change of basis to the next, in their logarithms: a chunk
#: that says little moves them little.
DRIFT = 0.1

#: Steps and rate in a warm-up by the bound, which ends early when it stops rising.
WARMUP_STEPS, WARMUP_RATE = 400, 0.05

#: Steps of the sites for each step of the hyperparameters.
SITE_STEPS = 5

#: A search ends when so many steps have not raised the best value by this many nats.
PATIENCE, LEAST_GAIN = 40, 1e-3


def learn_from(
    data: Observations,
    state: OnlineState,
    features: InducingFeatures,
    kernel: Kernel,
    mean: Mean,
    likelihood: Likelihood,
    jitter: float | None = None,
    steps: int = STEPS,
    rate: float = RATE,
    drift: float | None = DRIFT,
) -> float:
    r"""Move hyperparameters towards a larger online bound on one chunk, in place.

    The objective is the collapsed bound of past and chunk on the new basis, with the information of the past
    :math:`(G, r, c)` and the factor of its basis held constant: everything else, :math:`K_{aa}, K_{ab}, K_{bb}`
    included, depends on the hyperparameters. Adam on their logarithms (a constant mean, which has none, in units of
    the prior's standard deviation). The best values met on the way are kept, and the first ones if nothing better or
    nothing finite was met.

    Args:
        data: the chunk.
        state: what is known before it, on any basis.
        features: the basis for it.
        kernel: learnt, as its parameters require gradients.
        mean: likewise.
        likelihood: likewise.
        jitter: of factorisations.
        steps: how many at most.
        rate: learning rate.
        drift: standard deviation of the random walk that the logarithms are taken to do from chunk to chunk, which
            enters the objective; ``None`` leaves it out.

    Returns:
        The rise of the bound, in nats.
    """
    originals = torch.nn.ModuleList([kernel, mean, likelihood])
    # Copies move, so that a failure leaves the caller's modules, dtypes and gradients alone.
    fitted = copy.deepcopy(originals).double()
    prior = Prior(fitted[0], fitted[1])
    # Hyperparameters that equal nothing: no shortcut for a basis that has not changed, whose derivatives are needed.
    state = replace(state, hyperparameters=torch.full_like(state.hyperparameters, torch.nan))

    collapsed = _collapsed_bound(prior, fitted[2], data)

    def objective() -> Tensor:
        basis = online.initial_state(features, prior, jitter)
        past = online.transfer(state, basis, prior)
        value = collapsed(past).sum()
        for module in cast(Iterable[gpytorch.Module], fitted):
            for _, owner, log_prior, closure, _ in module.named_priors():
                value = value + log_prior.log_prob(closure(owner)).sum()
        return value

    with torch.enable_grad():
        unit = prior.variance(data.x).mean().sqrt().item()
        gain, best = _ascend(objective, fitted, steps, rate, unit, drift)
    for scale, value in zip(scales_of(originals), best, strict=True):
        scale.write(value)
    return gain


def _collapsed_bound(prior: Prior, likelihood: Likelihood, data: Observations) -> Callable[[OnlineState], Tensor]:
    """The bound of past and chunk at the best q, differentiable in the hyperparameters, ``(*batch)``."""
    if is_gaussian(likelihood):

        def closed_form(past: OnlineState) -> Tensor:
            noise = noise_of(likelihood, data.given_noise, data.y)
            return online.log_evidence(online.update(past, prior, data.x, data.y, noise, data.observed))

        return closed_form

    expectation = expectation_of(likelihood, data)
    longest = longest_step(likelihood)
    found: Sites | None = None  # each search starts where the last one ended

    def by_sites(past: OnlineState) -> Tensor:
        nonlocal found
        # Later a few steps will do: any q gives a bound, and the search comes by again.
        steps = None if found is None else SITE_STEPS
        found, _ = sites.find(past, prior, data.x, expectation, steps, longest, longest, found)
        q = sites.posterior(past, prior, data.x, found)
        # At its maximum over q the bound has the same derivatives with q held.
        return sites.bound(past, prior, data.x, expectation, *q)

    return by_sites


def _ascend(
    objective: Callable[[], Tensor],
    modules: torch.nn.ModuleList,
    steps: int,
    rate: float,
    unit: float,
    drift: float | None,
) -> tuple[float, list[Tensor]]:
    """Adam; the rise of the best value over the first one, and the logarithms where it was.

    Parameters that are not positive, such as a constant mean, move in units of ``unit``.
    """
    scales = scales_of(modules)
    theta = [scale.read().requires_grad_() for scale in scales]
    units = [1.0 if scale.is_logarithmic else unit for scale in scales]
    start = [t.detach().clone() for t in theta]
    first, best_value = math.nan, -math.inf
    best = [t.detach().clone() for t in theta]
    if not theta:
        return 0.0, best
    optimiser = torch.optim.Adam([{"params": [t], "lr": rate * size} for t, size in zip(theta, units, strict=True)])
    gain, since, weight = 0.0, 0, 0.0 if drift is None else drift**-2
    for step in range(steps + 1):
        raw = [scale.raw(t) for scale, t in zip(scales, theta, strict=True)]
        for scale, t in zip(scales, theta, strict=True):
            scale.write(t)
        modules.zero_grad()
        try:
            value = objective()
        except (NanError, NotPSDError, ValueError):
            break  # a step too far; what was met before it counts
        # By hand, because gradients of the objective arrive at the parameters, not at their logarithms.
        moved = [(t.detach() - s) / size for t, s, size in zip(theta, start, units, strict=True)]
        height = value.item() - 0.5 * weight * sum(m.square().sum().item() for m in moved)
        if not math.isfinite(height):
            break
        first = value.item() if step == 0 else first
        since = 0 if height > best_value + LEAST_GAIN else since + 1
        if height > best_value:
            best_value, best = height, [t.detach().clone() for t in theta]
            gain = value.item() - first
        if step == steps or since > PATIENCE:
            break
        (-value).backward()
        chain_gradients(scales, theta, raw)
        for t, m, size in zip(theta, moved, units, strict=True):
            if t.grad is not None:
                t.grad += weight * m / size
        if not all(t.grad is None or bool(t.grad.isfinite().all()) for t in theta):
            break
        optimiser.step()
    return gain, best

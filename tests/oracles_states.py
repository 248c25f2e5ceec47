"""States with random covariances in each form, and what maps make of them by dense algebra."""

import itertools
import math

import torch

from gpseq.propagation.moments import Blocks, Diagonal, Full, GaussianState, LowRank
from gpseq.propagation.posteriors import WeightPosterior
from gpseq.propagation.walk import Options, Walk


def seeded(seed=0):
    """A generator."""
    return torch.Generator().manual_seed(seed)


def random_covariance(form, batch, event, generator, dtype=torch.float64, rank=4):
    """Any covariance in a form."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    size = math.prod(event)
    if form == "diag":
        return Diagonal(normal(batch, *event).square())
    if form == "blockdiag":
        root = normal(batch, *event, event[-1])
        return Blocks(root @ root.mT)
    if form == "lowrank":
        return LowRank(normal(rank, batch, *event), normal(batch, *event).square())
    root = normal(batch, size, size + 1)
    return Full(root @ root.mT / size, tuple(event))


def random_state(form, batch, event, generator, dtype=torch.float64, scale=1.0, rank=4):
    """Any state in a form; "certain" is one without a covariance."""
    mean = torch.randn(batch, *event, generator=generator, dtype=dtype)
    if form == "certain":
        return GaussianState(mean)
    covariance = random_covariance(form, batch, event, generator, dtype, rank)
    return GaussianState(mean, covariance.scale(torch.full_like(mean, math.sqrt(scale))))


def dense(state):
    """The covariance of the flat event, ``(B, N, N)``."""
    covariance = state.covariance if isinstance(state, GaussianState) else state
    return covariance.operator().to_dense()


def walk_of(module, form, posterior=None, num_draws=8, seed=0, **options):
    """A walk through a module, as propagate makes it."""
    posterior = WeightPosterior() if posterior is None else posterior
    return Walk(module, posterior.bind(module), Options(form=form, **options), num_draws, seeded(seed))


def jacobian(function, mean):
    """``(B, N', N)`` of a function of a batch that keeps to its elements."""
    rows = [torch.func.jacrev(lambda x: function(x.unsqueeze(0))[0].flatten())(element) for element in mean]
    return torch.stack([row.flatten(1).detach() for row in rows])


def keep(form, covariance, width):
    """What a form keeps of a dense covariance ``(B, N, N)``; blocks are of some width."""
    if form == "diag":
        return torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    if form == "blockdiag":
        places = torch.arange(covariance.shape[-1]) // width
        return torch.where(places.unsqueeze(0) == places.unsqueeze(1), covariance, 0.0)
    return covariance


def carried(state, function, form, width=None):
    """The covariance after the tangent of a function, dense, with what its form keeps."""
    jacobians = jacobian(function, state.mean)
    if form == "lowrank":
        columns = jacobians @ state.covariance.columns.flatten(2).permute(1, 2, 0)
        variance = (jacobians.square() @ state.covariance.entries.flatten(1).unsqueeze(-1)).squeeze(-1)
        return columns @ columns.mT + torch.diag_embed(variance)
    found = jacobians @ dense(state) @ jacobians.mT
    return keep(form, found, width)


def weight_jacobian(network, names, x):
    """``(B, N, n)`` of the flat outputs in the flat parameters of some names, one after the other."""
    parameters = {name: network.get_parameter(name).detach() for name in names}

    def call(weights):
        return torch.func.functional_call(network, weights, (x,)).flatten(1)

    found = torch.func.jacrev(call)(parameters)
    return torch.cat([found[name].flatten(2) for name in names], -1)


def all_patterns(network, deviations, x):
    """Mean and covariance of the flat outputs over all patterns of weights: means plus or minus deviations."""
    sizes = [value.numel() for value in deviations.values()]
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=sum(sizes))), dtype=x.dtype).split(sizes, 1)
    weights = {
        name: (network.get_parameter(name) + value * sign.unflatten(1, value.shape)).detach()
        for (name, value), sign in zip(deviations.items(), signs, strict=True)
    }
    drawn = torch.func.vmap(lambda w: torch.func.functional_call(network, w, (x,)).flatten(1))(weights)
    mean = drawn.mean(0)
    centred = (drawn - mean).movedim(0, 1)
    return mean, centred.mT @ centred / len(drawn)

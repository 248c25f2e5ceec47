"""Slow and obviously right: moments of a network's outputs by enumeration, and by Monte Carlo over weights."""

import itertools

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpseq.propagation import from_variances


def entries(rows, columns, slope, shift, start=1):
    """A matrix sin(slope n + shift), n counting row by row."""
    numbers = torch.arange(start, start + rows * columns, dtype=torch.float64)
    return torch.sin(slope * numbers + shift).view(rows, columns)


def enumerate_moments(network, deviations, x):
    """Mean and covariance of the flat outputs, each weight being its mean plus or minus its deviation."""
    names = list(deviations)
    sizes = [deviations[name].numel() for name in names]
    outputs = []
    for signs in itertools.product((-1.0, 1.0), repeat=sum(sizes)):
        parts = torch.tensor(signs, dtype=x.dtype).split(sizes)
        weights = {
            name: network.get_parameter(name) + deviations[name] * part.view_as(deviations[name])
            for name, part in zip(names, parts, strict=True)
        }
        outputs.append(functional_call(network, weights, (x,)).flatten(1).detach())
    drawn = torch.stack(outputs, 1)  # (B, 2^n, E)
    mean = drawn.mean(1)
    centred = drawn - mean.unsqueeze(1)
    return mean, centred.mT @ centred / drawn.shape[1]


def monte_carlo(network, variances, x, num_samples, generator, chunk=2000):
    """Mean and covariance of the flat outputs over Gaussian weights."""
    total, outer = 0.0, 0.0
    count = 0
    names = list(variances)

    def one(weights):
        return functional_call(network, weights, (x,)).flatten(1)

    means = {name: network.get_parameter(name).detach() for name in names}
    while count < num_samples:
        size = min(chunk, num_samples - count)
        weights = {
            name: means[name]
            + variances[name].sqrt()
            * torch.randn(size, *means[name].shape, generator=generator, dtype=means[name].dtype)
            for name in names
        }
        with sdpa_kernel(SDPBackend.MATH):  # the fused one knows no batches of weights
            drawn = torch.func.vmap(one)(weights).detach()  # (S, B, E)
        total = total + drawn.sum(0)
        outer = outer + torch.einsum("sbi,sbj->bij", drawn, drawn)
        count += size
    mean = total / count
    return mean, outer / count - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def relative_variances(network, ratio, names=None):
    """Variances of each weight: the square of a ratio of the parameter's root mean square."""
    chosen = {name: p for name, p in network.named_parameters() if names is None or any(n in name for n in names)}
    return {
        name: torch.full_like(p, (ratio * max(p.detach().square().mean().sqrt().item(), 1e-3)) ** 2)
        for name, p in chosen.items()
    }


def posterior(network, ratio, names=None):
    """The same as a posterior."""
    return from_variances(relative_variances(network, ratio, names))


def held(part, model, values):
    """Some of what is known by the model's names, by those that the part has."""
    names = {id(value): name for name, value in part.named_parameters()}
    return {names[id(p)]: values[name] for name, p in model.named_parameters() if id(p) in names and name in values}

"""Rules for layers that everybody has: matrices of weights, elementwise functions, containers, dropout, flattening."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from gpseq.propagation.activations import of_module
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.products import gated
from gpseq.propagation.registry import register
from gpseq.propagation.walk import Walk


@register(nn.Linear)
def linear(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """A matrix of weights, shared by all tokens."""
    return walk.linear(state, module.weight, module.bias)


def is_linear(module: nn.Module) -> bool:
    """Whether a module does nothing but what its weight and bias say, for rules that look at these."""
    replaced = "forward" in vars(module) or is_parametrized(module)
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and not replaced


@register(nn.Sequential)
def sequential(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """One module after the other."""
    for part in module:
        state = walk(part, state)
    return state


@register(nn.Identity)
def identity(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Nothing."""
    return state


@register(nn.Dropout)
def dropout(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Nothing in eval mode; with ``dropout="variance"`` a source of variance, whose mean is kept."""
    rate = module.p
    if walk.options.dropout != "variance" or rate == 0:
        return state
    # E of x mask / (1 - p), whose mask is 1 with probability 1 - p: the variance is (v + m^2 p) / (1 - p).
    added = (state.variance + state.mean.square()) * (rate / (1 - rate))
    return walk.independent(state, added)


@register(nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
def structured_dropout(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Nothing in eval mode; not known as a source of variance."""
    if walk.options.dropout == "variance" and module.p > 0:
        raise NotImplementedError(
            f"dropout: 'variance' is known for nn.Dropout only, got {walk.path(module)}, a {type(module).__name__}; "
            "take dropout='off'."
        )
    return state


@register(nn.Flatten)
def flatten(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Entries of the event one after the other.

    Blocks of tokens raise: they would lose what is between the features that come to stand in different tokens, or gain
    a token whose covariances nobody knows.
    """
    if module.start_dim % state.mean.dim() == 0:
        raise ValueError(f"model: expected {walk.path(module)} to keep the batch, start_dim=1, got {module.start_dim}.")
    return _reshaped(module, state)


@register(nn.Unflatten)
def unflatten(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """The event in another shape."""
    return _reshaped(module, state)


def _reshaped(module: Any, state: GaussianState) -> GaussianState:
    # what changes nothing is fine for blocks, too
    return state if module(state.mean).shape == state.mean.shape else state.move(module)


@register(nn.GLU)
def glu(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Half of the features times the sigmoid of the other half, with the covariance of both."""
    return gated(state, walk, "sigmoid", dim=module.dim)


@register(lambda module: of_module(module) is not None)
def activation(module: Any, state: GaussianState, walk: Walk) -> GaussianState:
    """Exact moments of an elementwise function, or its tangent."""
    found = of_module(module)
    assert found is not None
    return walk.elementwise(state, found)

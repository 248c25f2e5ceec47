r"""What a posterior's covariance does to Jacobians, :math:`J \Sigma J^\top`, and Gaussian draws from it.

No covariance of all weights is ever formed but where the posterior itself is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import singledispatch

import torch
from torch import Tensor

from gpseq.linalg import covariance_root
from gpseq.propagation.laws import Dense, Diagonal, Kronecker, KroneckerLaplace, Law, LowRank
from gpseq.propagation.posteriors import BoundPosterior, Joint, matrix_shape


@singledispatch
def times(law: Law, matrices: Tensor) -> Tensor:
    r"""The covariance of a law times matrices.

    .. math:: (\Sigma M)_{ki} = \sum_{lj} \operatorname{Cov}(W_{ki}, W_{lj})\, M_{lj}

    Args:
        law: of a matrix, ``(K, D)``.
        matrices: ``(..., K, D)``.

    Returns:
        ``(..., K, D)``.

    Raises:
        NotImplementedError: the law is of a kind that is not known here.

    Example:
        >>> times(Diagonal(torch.tensor([[2.0, 3.0]])), torch.ones(1, 2))
        tensor([[2., 3.]])
    """
    raise NotImplementedError(f"posterior: products with the covariance of {type(law).__name__} are not known.")


@times.register
def _(law: Diagonal, matrices: Tensor) -> Tensor:
    return law.entries * matrices


@times.register
def _(law: Kronecker, matrices: Tensor) -> Tensor:
    return law.outputs @ matrices @ law.inputs


@times.register
def _(law: KroneckerLaplace, matrices: Tensor) -> Tensor:
    turned = law.output_vectors.mT @ matrices @ law.input_vectors
    return law.output_vectors @ (turned * law.eigenvalues) @ law.input_vectors.mT


@times.register
def _(law: Dense, matrices: Tensor) -> Tensor:
    return torch.einsum("kilj,...lj->...ki", law.entries, matrices)


@times.register
def _(law: LowRank, matrices: Tensor) -> Tensor:
    along = torch.einsum("rki,...ki->...r", law.columns, matrices)
    return law.entries * matrices + torch.einsum("...r,rki->...ki", along, law.columns)


@singledispatch
def gaussian_draws(law: Law, num_draws: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Independent Gaussian matrices with the covariance of a law.

    Args:
        law: of a matrix, ``(K, D)``.
        num_draws: S.
        generator: of the draws; ``None`` is torch's default generator.
        like: gives their dtype and device.

    Returns:
        ``(S, K, D)``.

    Raises:
        NotImplementedError: the law is of a kind that is not known here.
    """
    raise NotImplementedError(f"posterior: draws from {type(law).__name__} are not known.")


def _normals(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


@gaussian_draws.register
def _(law: Diagonal, num_draws: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    return law.entries.to(like).sqrt() * _normals((num_draws, *law.shape), generator, like)


@gaussian_draws.register
def _(law: Kronecker, num_draws: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    known = law.to(like)
    outputs, inputs = covariance_root(known.outputs), covariance_root(known.inputs)
    return outputs @ _normals((num_draws, *law.shape), generator, like) @ inputs.mT


@gaussian_draws.register
def _(law: KroneckerLaplace, num_draws: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    known = law.to(like)
    normals = _normals((num_draws, *known.eigenvalues.shape), generator, like)
    return known.output_vectors @ (normals * known.eigenvalues.sqrt()) @ known.input_vectors.mT


@gaussian_draws.register
def _(law: Dense, num_draws: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    size = law.shape[0] * law.shape[1]
    root = covariance_root(law.entries.to(like).reshape(size, size))
    return (_normals((num_draws, size), generator, like) @ root.mT).unflatten(-1, law.shape)


@gaussian_draws.register
def _(law: LowRank, num_draws: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    known = law.to(like)
    along = torch.einsum("sr,rki->ski", _normals((num_draws, len(law.columns)), generator, like), known.columns)
    return along + known.entries.sqrt() * _normals((num_draws, *law.shape), generator, like)


def draw_weights(bound: BoundPosterior, num_draws: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Independent draws of all uncertain weights: what Monte Carlo runs a network with.

    Args:
        bound: posterior of a model's weights.
        num_draws: S.
        generator: of the draws; ``None`` is torch's default generator.

    Returns:
        By names of the uncertain parameters, ``(S, *shape)``, their means included.

    Example:
        >>> from gpseq.propagation import from_variances
        >>> network = torch.nn.Linear(3, 2)
        >>> bound = from_variances({"weight": torch.full((2, 3), 0.1)}).bind(network)
        >>> draw_weights(bound, 5)["weight"].shape
        torch.Size([5, 2, 3])
    """
    drawn = {}
    for name, law in bound.posterior.laws.items():
        mean = bound.mean(bound.parameters[name])
        drawn[name] = mean + gaussian_draws(law, num_draws, generator, mean).view(num_draws, *mean.shape)
    for joint in bound.posterior.joints:
        for name, part in _joint_draws(bound, joint, num_draws, generator).items():
            drawn[name] = bound.mean(bound.parameters[name]) + part
    return drawn


def _joint_draws(
    bound: BoundPosterior, joint: Joint, num_draws: int, generator: torch.Generator | None
) -> dict[str, Tensor]:
    like = bound.parameters[joint.names[0]]
    size = sum(bound.parameters[name].numel() for name in joint.names)
    if joint.covariance is not None:
        flat = _normals((num_draws, size), generator, like) @ covariance_root(joint.covariance.to(like)).mT
    else:
        assert joint.columns is not None
        flat = _normals((num_draws, len(joint.columns)), generator, like) @ joint.columns.to(like)
        if joint.variances is not None:
            flat = flat + _normals((num_draws, size), generator, like) * joint.variances.to(like).sqrt()
    return {name: flat[:, index.to(like.device)] for name, index in bound.places(joint).items()}


def covariance(bound: BoundPosterior, jacobians: Mapping[str, Tensor]) -> Tensor:
    r"""Covariance of outputs that are linear in the weights, :math:`J \Sigma J^\top`.

    Args:
        bound: posterior of the weights.
        jacobians: by names of uncertain parameters, derivatives of E outputs, ``(..., E, *shape)``.

    Returns:
        ``(..., E, E)``, a symmetric matrix.
    """
    total: Tensor | float = 0.0
    for left, right in _pairs(bound, jacobians):
        total = total + left.flatten(-2) @ right.flatten(-2).mT
    assert isinstance(total, Tensor)
    return (total + total.mT) / 2


def variance(bound: BoundPosterior, jacobians: Mapping[str, Tensor]) -> Tensor:
    """The diagonal of :func:`covariance`, ``(..., E)``.

    Args:
        bound: posterior of the weights.
        jacobians: as there.
    """
    total: Tensor | float = 0.0
    for left, right in _pairs(bound, jacobians):
        total = total + (left * right).sum((-2, -1))
    assert isinstance(total, Tensor)
    return total


def _pairs(bound: BoundPosterior, jacobians: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    r"""Pairs :math:`(L, R)` of matrices ``(..., E, K, D)`` whose products :math:`L R^\top` add up to the covariance."""
    for name, law in bound.posterior.laws.items():
        if name in jacobians:
            rows, columns = matrix_shape(bound.parameters[name])
            left = _as_matrices(jacobians[name], bound.parameters[name]).unflatten(-1, (rows, columns))
            yield left, times(law.to(left), left)
    for joint in bound.posterior.joints:
        inside = [name for name in joint.names if name in jacobians]
        if not inside:
            continue
        flat = torch.cat([_as_matrices(jacobians[name], bound.parameters[name]) for name in inside], -1)
        places = bound.places(joint)
        index = torch.cat([places[name].flatten() for name in inside])
        if joint.covariance is not None:
            yield flat.unsqueeze(-1), (flat @ joint.covariance[index][:, index].to(flat)).unsqueeze(-1)
        if joint.columns is not None:
            made = (flat @ joint.columns[:, index].to(flat).mT).unsqueeze(-1)
            yield made, made
        if joint.variances is not None:
            yield flat.unsqueeze(-1), (flat * joint.variances[index].to(flat)).unsqueeze(-1)


def _as_matrices(jacobian: Tensor, parameter: Tensor) -> Tensor:
    """``(..., E, *shape)`` as ``(..., E, n)``."""
    return jacobian.flatten(-parameter.dim()) if parameter.dim() else jacobian.unsqueeze(-1)

"""Weight posteriors of laplace-torch.

laplace-torch is not imported here, nor by what is defined here: its objects are met by their contract, that of version
0.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gpseq.propagation.laws import Dense, Kronecker, KroneckerLaplace, Law
from gpseq.propagation.makers import from_columns, from_covariance, from_variances
from gpseq.propagation.posteriors import WeightPosterior, matrix_shape


def from_laplace(la: Any, prefix: str = "") -> WeightPosterior:
    r"""The posterior of a fitted Laplace approximation of laplace-torch.

    Prior precisions, the noise and the temperature are those that it has now: what is optimised later needs another
    call. Its covariance is taken over exactly, in the structure that it has:

    - diagonal, over all weights, the last layer or a subnetwork: variances;
    - Kronecker factors, over all weights or the last layer: the eigenbases of :math:`(B \otimes A + \lambda I)^{-1}`,
      with one prior precision or one for each parameter; where its precision is damped,
      :math:`(B + \sqrt\lambda I)^{-1} \otimes (A + \sqrt\lambda I)^{-1}`;
    - full, over all weights or the last layer: one covariance; over a subnetwork that is not made of whole parameters:
      columns, as many as the subnetwork has weights.

    Args:
        la: ``Laplace(...)`` after ``fit``.
        prefix: of names of parameters, taken away from them: for a model that laplace-torch saw inside of a wrapper,
            and that is propagated without it. ``"net."`` makes ``"0.weight"`` of ``"net.0.weight"``.

    Returns:
        The posterior, with the means that ``la`` has. For regression :func:`gpseq.propagation.propagate` takes the
        noise apart from it, ``noise=la.sigma_noise**2``.

    Raises:
        TypeError: it is no parametric Laplace approximation, or of low rank.
        ValueError: it is not fitted, or a name does not begin with the prefix.

    Example:
        ::

            la = Laplace(model, "classification", subset_of_weights="last_layer", hessian_structure="kron")
            la.fit(loader)
            propagate(model, from_laplace(la), x)
    """
    structure = _structure(la)
    parameters = _parameters(la, prefix)
    means = _split(la.mean.detach(), parameters)
    if structure == "kron":
        return WeightPosterior(_kronecker_laws(la.posterior_precision, parameters), means=means)
    indices = la.backend.subnetwork_indices if la._key[0] == "subnetwork" else None
    if structure == "diag":
        return _independent(la.posterior_variance.detach(), indices, parameters, means)
    covariance = la.posterior_covariance.detach()
    if indices is None:
        return from_covariance(list(parameters), _symmetric(covariance), means)
    return _subnetwork(la.posterior_scale.detach(), covariance, indices, parameters, means)


def _structure(la: Any) -> str:
    """``"diag"``, ``"kron"`` or ``"full"``, of something that is fitted."""
    key = getattr(la, "_key", None)
    known = ("diag", "kron", "full")
    if not isinstance(key, tuple) or len(key) != 2 or key[1] not in known:
        got = type(la).__name__ + (f" of structure {key[1]!r}" if isinstance(key, tuple) and len(key) == 2 else "")
        raise TypeError(f"la: expected a Laplace approximation of structure {', '.join(known)}, got {got}.")
    # An approximation that has not seen data has a mean that is no vector, and no number of outputs.
    if not getattr(la, "n_outputs", 0) or not isinstance(la.mean, Tensor) or la.mean.dim() != 1:
        raise ValueError("la: expected it fitted, got one without la.fit(loader).")
    return str(key[1])


def _parameters(la: Any, prefix: str) -> dict[str, Tensor]:
    """Parameters in the order in which the entries of its mean stand, by their names in the model."""
    if la._key[0] == "last_layer":
        path = la.model._last_layer_name
        found = {f"{path}.{name}" if path else name: p for name, p in la.model.last_layer.named_parameters()}
    else:
        chosen = {id(p) for p in la.params}
        found = {name: p for name, p in la.model.named_parameters() if id(p) in chosen}
    wrong = [name for name in found if not name.startswith(prefix)]
    if wrong:
        raise ValueError(f"prefix: expected the beginning of all names, got {prefix!r} for {', '.join(wrong)}.")
    return {name.removeprefix(prefix): p for name, p in found.items()}


def _split(flat: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vector of all entries as tensors in the shapes of the parameters."""
    sizes = [p.numel() for p in parameters.values()]
    return {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), flat.split(sizes), strict=True)}


def _kronecker_laws(precision: Any, parameters: Mapping[str, Tensor]) -> dict[str, Law]:
    """Laws of all parameters from eigendecompositions, of which there is one pair, or one matrix, for each."""
    if len(precision.eigenvalues) != len(parameters):
        raise ValueError(
            f"la: expected factors for {len(parameters)} parameters, got {len(precision.eigenvalues)}; does it know "
            "all kinds of layers of the model?"
        )
    laws: dict[str, Law] = {}
    deltas = precision.deltas.detach().expand(len(parameters))
    found = zip(parameters.items(), precision.eigenvectors, precision.eigenvalues, deltas, strict=True)
    for (name, parameter), vectors, values, delta in found:
        shape = matrix_shape(parameter)
        if len(values) == 1:
            laws[name] = _single(vectors[0], values[0], delta, shape)
        elif precision.damping:
            root = delta.sqrt()
            outputs, inputs = ((q / (v + root)) @ q.mT for q, v in zip(vectors, values, strict=True))
            laws[name] = Kronecker(outputs, inputs)
        else:
            laws[name] = KroneckerLaplace(vectors[0], values[0], vectors[1], values[1], delta)
        if laws[name].shape != shape:
            raise ValueError(f"la: expected factors for {name} of shape {shape}, got {laws[name].shape}.")
    return laws


def _single(vectors: Tensor, values: Tensor, delta: Tensor, shape: tuple[int, int]) -> Law:
    """The law of a vector of parameters, or of a matrix that has one factor for all of its entries."""
    if shape[1] == 1:
        one = values.new_ones(1)
        return KroneckerLaplace(vectors, values, one.unsqueeze(-1), one, delta)
    covariance = (vectors / (values + delta)) @ vectors.mT
    return Dense(covariance.view(*shape, *shape))


def _independent(
    variance: Tensor, indices: Tensor | None, parameters: Mapping[str, Tensor], means: Mapping[str, Tensor]
) -> WeightPosterior:
    """Variances of all entries, or of those of a subnetwork."""
    if indices is None:
        return from_variances(_split(variance, parameters), means)
    names = _touched(indices, parameters)
    size = sum(p.numel() for p in parameters.values())
    everywhere = _split(variance.new_zeros(size).index_copy(0, indices, variance), parameters)
    return from_variances({name: everywhere[name] for name in names}, {name: means[name] for name in names})


def _subnetwork(
    root: Tensor,
    covariance: Tensor,
    indices: Tensor,
    parameters: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
) -> WeightPosterior:
    """The covariance of some entries, and a root of it."""
    names = _touched(indices, parameters)
    means = {name: means[name] for name in names}
    if len(indices) == sum(parameters[name].numel() for name in names):  # whole parameters, in any order
        order = indices.argsort()
        return from_covariance(names, _symmetric(covariance[order][:, order]), means)
    sizes = [p.numel() for p in parameters.values()]
    columns = root.new_zeros(root.shape[1], sum(sizes)).index_copy(1, indices, root.mT)
    parts = dict(zip(parameters, columns.split(sizes, 1), strict=True))
    return from_columns({name: parts[name].reshape(-1, *parameters[name].shape) for name in names}, means=means)


def _touched(indices: Tensor, parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of parameters that have entries in a subnetwork."""
    size = sum(p.numel() for p in parameters.values())
    inside = _split(torch.zeros(size, device=indices.device).index_fill(0, indices, 1), parameters)
    return [name for name, value in inside.items() if value.any()]


def _symmetric(covariance: Tensor) -> Tensor:
    return (covariance + covariance.mT) / 2

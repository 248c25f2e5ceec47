"""How near what a model generates is to what it learnt from: scores of two sets of features.

Features are the user's choice, and scores of different features, sizes of sets or reference sets cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpseq.checks import check_count, check_floating
from gpseq.metrics.arguments import at_least_float32, finite, refuse

#: Rows of a matrix of distances that are computed at once.
ROWS = 1024
#: How far a covariance may be from symmetric, relative to its largest entry.
ASYMMETRY = 1e-4


def frechet(
    feature_fn: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, batch_size: int | None = None
) -> Tensor:
    r"""Squared Fréchet distance between Gaussians that are fitted to the features of two sets.

    .. math:: |\mu_1 - \mu_2|^2 + \operatorname{tr}(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})

    It is biased upwards for small sets. So give every model the same number of draws and the same reference set, and
    show the floor beside them: the distance between real training and real test data at these sizes. It is the FID with
    the standard Inception features only.

    Args:
        feature_fn: features of what it is given, ``(n, ...) -> (n, d)``; a network in evaluation mode. It runs without
            a graph.
        real: the reference set, ``(n, ...)``, n at least 2.
        fake: what was generated, ``(m, ...)``, m at least 2.
        batch_size: how many go through ``feature_fn`` at once; ``None`` is all of a set.

    Returns:
        A number of at least 0, in the dtype of the features.

    Raises:
        TypeError: a set is no tensor, or features are not floating.
        ValueError: fewer than two elements, features of another shape or of different widths, NaN or infinity.

    Source:
        Heusel et al. (2017), GANs trained by a two time-scale update rule converge to a local Nash equilibrium,
        equation 6; Dowson and Landau (1982), The Fréchet distance between multivariate normal distributions.

    Example:
        >>> real = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> bool(frechet(torch.tanh, real, real) < 1e-12)
        True
        >>> frechet(lambda x: x, real, real + 2.0)
        tensor(12.0000, dtype=torch.float64)
    """
    if batch_size is not None:
        check_count("batch_size", batch_size)
    first = _features("real", feature_fn, real, batch_size)
    second = _features("fake", feature_fn, fake, batch_size)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"feature_fn: expected as many features of fake as of real, got {second.shape[1]} and {first.shape[1]}."
        )
    refuse(finite("feature_fn(real)", first), finite("feature_fn(fake)", second))
    x, y = first.double(), second.double().to(first.device)
    return frechet_distance(x.mean(0), _covariance(x), y.mean(0), _covariance(y)).to(first.dtype)


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    r"""Squared Fréchet (2-Wasserstein) distance between two Gaussians.

    .. math:: |\mu_1 - \mu_2|^2 + \operatorname{tr} C_1 + \operatorname{tr} C_2 - 2 \, \|C_1^{1/2} C_2^{1/2}\|_*

    The last term, the sum of singular values, is the trace of :math:`(C_1^{1/2} C_2 C_1^{1/2})^{1/2}`. Roots come from
    symmetric eigendecompositions with eigenvalues clamped at 0. Singular values of the product of the roots keep the
    digits that eigenvalues of its square would lose where covariances are singular. All in float64.

    Args:
        mean: ``(*batch, d)``.
        covariance: ``(*batch, d, d)``, symmetric and positive semi-definite.
        other_mean: ``(*batch, d)``.
        other_covariance: ``(*batch, d, d)``.

    Returns:
        ``(*batch)``, at least 0, in the dtype of the mean.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes that do not fit, NaN or infinity, or a covariance that is not symmetric.

    Source:
        Dowson and Landau (1982), The Fréchet distance between multivariate normal distributions.

    Example:
        >>> frechet_distance(torch.zeros(2), torch.eye(2), torch.tensor([3.0, 0.0]), 4 * torch.eye(2))
        tensor(11.)
    """
    centre, other_centre = _mean("mean", mean), _mean("other_mean", other_mean)
    size = centre.shape[-1]
    spread, other_spread = (
        _square("covariance", covariance, size),
        _square("other_covariance", other_covariance, size),
    )
    if other_centre.shape[-1] != size:
        raise ValueError(f"other_mean: expected {size} features, as mean has, got shape {tuple(other_mean.shape)}.")
    refuse(
        finite("mean", centre),
        finite("other_mean", other_centre),
        finite("covariance", spread),
        finite("other_covariance", other_spread),
        _asymmetric("covariance", spread),
        _asymmetric("other_covariance", other_spread),
    )
    overlap = torch.linalg.svdvals(_root(spread) @ _root(other_spread)).sum(-1)
    shift = (centre.double() - other_centre.double()).square().sum(-1)
    distance = shift + _trace(spread) + _trace(other_spread) - 2 * overlap
    return distance.clamp(min=0).to(centre.dtype)


def precision_recall(real_features: Tensor, fake_features: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """How much of what was generated looks real, and how much of what is real is generated.

    Around each element of a set lies a ball that reaches to its k-th nearest neighbour in the set, itself not counted.
    Precision is the fraction of generated elements in some ball of a real one; recall is the fraction of real elements
    in some ball of a generated one. Equal sets score 1 and 1; a model that draws one good image again and again has
    precision 1 and little recall.

    Args:
        real_features: ``(n, d)``, n above k.
        fake_features: ``(m, d)``, m above k.
        k: which neighbour.

    Returns:
        Precision and recall, from 0 to 1, in the dtype of the real features. O(n m d) time, O(n + m) memory beside the
        features.

    Raises:
        TypeError: features are not floating, or k is no integer.
        ValueError: shapes that do not fit, too few elements, NaN or infinity.

    Source:
        Kynkäänniemi et al. (2019), Improved precision and recall metric for assessing generative models, section 2.

    Example:
        >>> real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
        >>> precision_recall(real, torch.tensor([[0.0], [0.1], [0.2], [0.3]]), k=1)
        (tensor(1.), tensor(0.2500))
    """
    check_count("k", k)
    real, fake = _set("real_features", real_features, k + 1), _set("fake_features", fake_features, k + 1)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"fake_features: expected shape (m, {real.shape[1]}), as real_features has, got {tuple(fake.shape)}."
        )
    refuse(finite("real_features", real), finite("fake_features", fake))
    x, y = real.double(), fake.double().to(real.device)
    return _covered(y, x, k).to(real.dtype), _covered(x, y, k).to(real.dtype)


def _features(name: str, feature_fn: Callable[[Tensor], Tensor], data: Any, batch_size: int | None) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(data).__name__}.")
    if data.dim() == 0 or len(data) < 2:
        raise ValueError(f"{name}: expected shape (n, ...) with n at least 2, got {tuple(data.shape)}.")
    parts = []
    with torch.no_grad():
        for batch in data.split(batch_size or len(data)):
            found = check_floating(f"feature_fn({name})", feature_fn(batch))
            if found.dim() != 2 or len(found) != len(batch) or found.shape[1] == 0:
                raise ValueError(
                    f"feature_fn({name}): expected shape ({len(batch)}, d) with d at least 1, got {tuple(found.shape)}."
                )
            parts.append(at_least_float32(found))
    return torch.cat(parts)


def _set(name: str, value: Any, least: int) -> Tensor:
    found = at_least_float32(check_floating(name, value))
    if found.dim() != 2 or len(found) < least or found.shape[1] == 0:
        raise ValueError(f"{name}: expected shape (n, d) with n at least {least}, got {tuple(found.shape)}.")
    return found


def _mean(name: str, value: Any) -> Tensor:
    found = at_least_float32(check_floating(name, value))
    if found.dim() == 0 or found.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape (*batch, d) with d at least 1, got {tuple(found.shape)}.")
    return found


def _square(name: str, value: Any, size: int) -> Tensor:
    """In float64."""
    found = check_floating(name, value)
    if found.shape[-2:] != (size, size):
        raise ValueError(f"{name}: expected shape (*batch, {size}, {size}), got {tuple(found.shape)}.")
    return found.double()


def _asymmetric(name: str, value: Tensor) -> tuple[Tensor, Callable[[], str]]:
    largest = value.abs().amax((-2, -1), keepdim=True)
    found = (value - value.mT).abs() > ASYMMETRY * largest

    def message() -> str:
        return f"{name}: expected a symmetric matrix, got entries that differ by {float((value - value.mT).max()):.4g}."

    return found, message


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.mT @ centred / (len(x) - 1)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(0.5 * (covariance + covariance.mT))
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Without the expansion of the square, which gives equal points a distance."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _covered(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """Fraction of points in some ball around the centres, float64."""
    radii = []
    for start in range(0, len(centres), ROWS):
        distance = _distances(centres[start : start + ROWS], centres)
        distance.diagonal(start).fill_(torch.inf)  # itself
        radii.append(distance.kthvalue(k).values)
    radius = torch.cat(radii)
    inside = [(_distances(part, centres) <= radius).any(-1) for part in points.split(ROWS)]
    return torch.cat(inside).double().mean()

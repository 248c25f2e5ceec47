"""Dense linear algebra of Gaussians: factorisation with relative jitter, KL, natural and moment parameters.

Pure functions on tensors. They keep the dtype they are given; callers that want float64 (all of gpseq) cast first.
"""

from __future__ import annotations

import warnings

import torch
from linear_operator.utils.errors import NanError, NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

#: Largest relative jitter that a factorisation may reach before it gives up.
MAX_JITTER = 1e-4


def default_jitter(dtype: torch.dtype) -> float:
    """Relative jitter for a factorisation in ``dtype``: 1e-10 in float64, 1e-6 in anything shorter."""
    return 1e-10 if dtype == torch.float64 else 1e-6


def cholesky(covariance: Tensor, jitter: float | None = None) -> tuple[Tensor, Tensor]:
    r"""Factor a covariance with jitter relative to its mean diagonal.

    .. math:: L L^\top = K + \epsilon I, \qquad \epsilon = \text{jitter} \cdot \tfrac{1}{M} \operatorname{tr} K

    Jitter is relative because interdomain covariances shrink as the horizon grows (the mean diagonal of a Legendre
    memory is about :math:`2.5\,\ell / T`), so that no absolute number is small at all times. When the factorisation
    fails the jitter is multiplied by ten, up to ``MAX_JITTER``, and a ``NumericalWarning`` says how far it went.

    Args:
        covariance: symmetric positive semi-definite, ``(*batch, M, M)``.
        jitter: relative jitter; ``None`` means :func:`default_jitter` of the dtype, 0 adds nothing.

    Returns:
        The lower factor ``(*batch, M, M)`` and the absolute jitter that it contains, :math:`\epsilon`, ``(*batch)``.

    Raises:
        NanError: the covariance is not finite.
        NotPSDError: it cannot be factored with ``MAX_JITTER`` either.

    Example:
        >>> L, eps = cholesky(torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64), jitter=0.0)
        >>> L @ L.mT
        tensor([[4., 2.],
                [2., 3.]], dtype=torch.float64)
    """
    relative = default_jitter(covariance.dtype) if jitter is None else jitter
    scale = covariance.diagonal(dim1=-1, dim2=-2).mean(-1)
    asked = relative
    while True:
        epsilon = relative * scale
        jittered = covariance + torch.diag_embed(epsilon.unsqueeze(-1).expand(covariance.shape[:-1]))
        factor, info = torch.linalg.cholesky_ex(jittered)
        if not info.any() and factor.isfinite().all():
            break
        if not covariance.isfinite().all():
            raise NanError(f"covariance of shape {tuple(covariance.shape)} has entries that are not finite.")
        if relative >= MAX_JITTER:
            raise NotPSDError(
                f"covariance of shape {tuple(covariance.shape)} is not positive definite, not even with a relative "
                f"jitter of {relative:.0e}."
            )
        relative = min(max(10 * relative, default_jitter(covariance.dtype)), MAX_JITTER)
    if relative > asked:
        warnings.warn(
            f"A covariance of shape {tuple(covariance.shape)} was factored with a relative jitter of {relative:.0e} "
            f"where {asked:.0e} was asked for.",
            NumericalWarning,
            stacklevel=2,
        )
    return factor, epsilon


def covariance_root(covariance: Tensor, jitter: float | None = None) -> Tensor:
    r"""A square root of a covariance that may be singular, by its eigenvectors, which are found in float64.

    .. math:: R R^\top = K + \epsilon I, \qquad \epsilon = \text{jitter} \cdot \tfrac{1}{M} \operatorname{tr} K

    Args:
        covariance: symmetric positive semi-definite, ``(*batch, M, M)``; what rounding made negative of it is zero.
        jitter: relative jitter, with which a singular covariance has finite gradients; ``None`` means
            :func:`default_jitter` of float64, 0 adds nothing.

    Returns:
        R, ``(*batch, M, M)``, in the dtype of the covariance.

    Example:
        >>> root = covariance_root(torch.ones(2, 2), jitter=0.0)
        >>> root @ root.mT
        tensor([[1., 1.],
                [1., 1.]])
    """
    double = covariance.double()
    relative = default_jitter(torch.float64) if jitter is None else jitter
    if relative > 0:
        size = double.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
        double = double + torch.diag_embed((relative * size).unsqueeze(-1).expand(double.shape[:-1]))
    values, vectors = torch.linalg.eigh(double)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)).to(covariance.dtype)


def gaussian_kl(mean: Tensor, scale_tril: Tensor) -> Tensor:
    r"""KL divergence from a Gaussian to the standard normal.

    .. math:: \mathrm{KL}[N(m, S S^\top) \,\|\, N(0, I)] = \tfrac12 (\|S\|_F^2 + \|m\|^2 - M) - \sum_i \log |S_{ii}|

    Args:
        mean: ``(*batch, M)``.
        scale_tril: lower factor of the covariance, ``(*batch, M, M)``.

    Returns:
        ``(*batch)``, in nats.

    Example:
        >>> gaussian_kl(torch.zeros(3), torch.eye(3))
        tensor(0.)
    """
    trace = scale_tril.square().sum((-2, -1))
    half_logdet = scale_tril.diagonal(dim1=-1, dim2=-2).abs().log().sum(-1)
    return 0.5 * (trace + mean.square().sum(-1) - mean.shape[-1]) - half_logdet


def natural_to_moments(shift: Tensor, precision: Tensor, smallest: float | None = None) -> tuple[Tensor, Tensor]:
    r"""Mean and lower covariance factor of :math:`N(P^{-1} r, P^{-1})`.

    The factor of the inverse comes from the *reversed* Cholesky factor of P and one triangular solve, so the
    covariance is never formed.

    Args:
        shift: r, ``(*batch, M)``.
        precision: P, symmetric positive definite, ``(*batch, M, M)``.
        smallest: a known lower bound of the eigenvalues of P. With it, a P that rounding has made indefinite is
            repaired: its eigenvalues are raised to the bound.

    Returns:
        The mean ``(*batch, M)`` and the lower factor of the covariance ``(*batch, M, M)``.

    Raises:
        NotPSDError: P is not positive definite, and no bound was given.

    Example:
        >>> mean, scale_tril = natural_to_moments(torch.tensor([4.0]), torch.tensor([[4.0]]))
        >>> mean, scale_tril
        (tensor([1.]), tensor([[0.5000]]))
    """
    # P = U U^T with U upper, from the Cholesky factor of P in reversed order; then P^-1 = U^-T U^-1 and U^-T is lower.
    reversed_factor, info = torch.linalg.cholesky_ex(precision.flip(-1, -2))
    if not info.any():
        eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
        scale_tril = torch.linalg.solve_triangular(reversed_factor.flip(-1, -2), eye, upper=True).mT
    elif smallest is not None:
        values, vectors = torch.linalg.eigh(precision)
        # Any root of the covariance becomes a lower factor by QR, with the signs of its diagonal made positive.
        root = vectors * values.clamp_min(smallest).rsqrt().unsqueeze(-2)
        upper = torch.linalg.qr(root.mT, mode="r").R
        scale_tril = (upper * upper.diagonal(dim1=-1, dim2=-2).sign().unsqueeze(-1)).mT
    else:
        raise NotPSDError(f"precision of shape {tuple(precision.shape)} is not positive definite.")
    mean = (scale_tril @ (scale_tril.mT @ shift.unsqueeze(-1))).squeeze(-1)
    return mean, scale_tril


def moments_to_natural(mean: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
    r"""Shift :math:`r = P m` and precision :math:`P = (S S^\top)^{-1}`: the inverse of :func:`natural_to_moments`.

    Args:
        mean: ``(*batch, M)``.
        scale_tril: lower factor S of the covariance, ``(*batch, M, M)``.

    Returns:
        The shift ``(*batch, M)`` and the precision ``(*batch, M, M)``.

    Example:
        >>> moments_to_natural(torch.tensor([1.0]), torch.tensor([[0.5]]))
        (tensor([4.]), tensor([[4.]]))
    """
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    inverse = torch.linalg.solve_triangular(scale_tril, eye, upper=False)
    precision = inverse.mT @ inverse
    return (precision @ mean.unsqueeze(-1)).squeeze(-1), precision


def row_major(value: Tensor) -> Tensor:
    """The same numbers in the order in which they would be read from a file; expanded tensors stay as they are.

    Solvers leave columns side by side. Products of the same numbers in another order round otherwise on some
    processors, so what is to be the same after it was saved and loaded has to be kept in this order from the start.

    Args:
        value: any tensor.

    Example:
        >>> row_major(torch.zeros(2, 3).mT).stride()
        (2, 1)
    """
    expanded = any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True))
    return value if expanded else value.contiguous()

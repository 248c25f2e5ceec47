"""Factorisation with relative jitter, Gaussian KL, natural and moment parameters."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_operator.utils.errors import NanError, NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from gpseq.linalg import (
    MAX_JITTER,
    cholesky,
    covariance_root,
    default_jitter,
    gaussian_kl,
    moments_to_natural,
    natural_to_moments,
)
from tests import oracles
from tests.oracles import close

F64 = torch.float64
BATCHES = [(), (3,), (3, 1), (2, 3)]


def covariance(batch: tuple[int, ...], size: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    """Well conditioned, eigenvalues between about 0.3 and 5."""
    draws = torch.randn(*batch, size, 4 * size, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return (draws @ draws.mT / (4 * size) + 0.2 * torch.eye(size)).to(dtype)


def with_eigenvalues(values: list[float], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=F64, generator=generator))
    matrix = rotation @ torch.diag(torch.tensor(values, dtype=F64)) @ rotation.mT
    return 0.5 * (matrix + matrix.mT)


# Cholesky


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_without_jitter_it_is_the_factor(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = covariance(batch, 5, dtype)
    factor, epsilon = cholesky(matrix, jitter=0.0)
    assert factor.dtype == epsilon.dtype == dtype
    assert epsilon.shape == batch and not epsilon.any()
    assert torch.equal(factor, factor.tril())
    expected = np.linalg.cholesky(matrix.double().numpy())
    close(factor, torch.from_numpy(expected), 1e-14 if dtype == F64 else 1e-6)


@given(scale=st.floats(1e-12, 1e12), jitter=st.floats(1e-10, 0.9), size=st.integers(1, 8))
def test_jitter_is_relative_to_the_mean_diagonal(scale: float, jitter: float, size: int) -> None:
    matrix = scale * covariance((2,), size)
    factor, epsilon = cholesky(matrix, jitter=jitter)
    expected = jitter * matrix.diagonal(dim1=-1, dim2=-2).mean(-1)
    torch.testing.assert_close(epsilon, expected, rtol=1e-13, atol=0)
    close(factor @ factor.mT, matrix + epsilon[:, None, None] * torch.eye(size), 1e-14)


def test_each_of_a_batch_has_its_own_scale() -> None:
    scales = torch.tensor([1e-6, 1.0, 1e6], dtype=F64)
    _, epsilon = cholesky(scales[:, None, None] * torch.eye(4, dtype=F64), jitter=1e-3)
    torch.testing.assert_close(epsilon, 1e-3 * scales)


def test_default_jitter(dtype: torch.dtype) -> None:
    expected = 1e-10 if dtype == F64 else 1e-6
    assert default_jitter(dtype) == expected
    assert default_jitter(torch.bfloat16) == 1e-6
    _, epsilon = cholesky(2 * torch.eye(3, dtype=dtype))
    assert epsilon.item() == pytest.approx(2 * expected, rel=1e-6)


def test_the_argument_is_left_alone() -> None:
    matrix = covariance((2,), 4)
    before = matrix.clone()
    cholesky(matrix, jitter=0.1)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("asked", [None, 0.0, 1e-12])
def test_escalation_warns_and_is_reported(asked: float | None) -> None:
    # -1e-7 of the mean diagonal: 1e-7 may just do, 1e-6 does.
    matrix = with_eigenvalues([1.0, 1.0, 1.0, -3e-7])
    with pytest.warns(NumericalWarning, match=r"shape \(4, 4\).*relative jitter of 1e-06") as caught:
        factor, epsilon = cholesky(matrix, jitter=asked)
    assert len(caught) == 1
    wanted = 1e-10 if asked is None else asked
    assert f"{wanted:.0e} was asked for" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert epsilon.item() == pytest.approx(1e-6 * matrix.diagonal().mean().item(), rel=1e-9)
    close(factor @ factor.mT, matrix + epsilon * torch.eye(4), 1e-13)


def test_escalation_stops_at_the_maximum(dtype: torch.dtype) -> None:
    with pytest.warns(NumericalWarning, match="relative jitter of 1e-04"):
        _, epsilon = cholesky(with_eigenvalues([1.0, 1.0, 1.0, -6e-5]).to(dtype))
    assert epsilon.item() == pytest.approx(0.75 * MAX_JITTER, rel=1e-3)


def test_no_warning_when_what_was_asked_for_is_enough() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cholesky(with_eigenvalues([1.0, 1.0, 1e-11]))
        cholesky(with_eigenvalues([1.0, 1.0, -0.05]), jitter=0.2)  # more than the maximum, if the caller says so


@pytest.mark.parametrize("jitter", [None, 0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("values", [[1.0, -0.5], [1.0, 1.0, -1e-1], [-1.0, -1.0], [0.0, 0.0]])
def test_indefinite_is_refused(values: list[float], jitter: float | None) -> None:
    with pytest.raises(NotPSDError, match=rf"shape \({len(values)}, {len(values)}\) is not positive definite"):
        cholesky(with_eigenvalues(values), jitter=jitter)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("jitter", [None, 0.0])
def test_what_is_not_finite_is_refused(bad: float, place: tuple[int, int], jitter: float | None) -> None:
    matrix = covariance((2,), 3)
    row, column = place
    matrix[1, row, column] = matrix[1, column, row] = bad
    with pytest.raises(NanError, match=r"shape \(2, 3, 3\) has entries that are not finite"):
        cholesky(matrix, jitter=jitter)


def test_one_bad_element_of_a_batch() -> None:
    good = covariance((), 4)
    batch = torch.stack([good, with_eigenvalues([1.0, 1.0, 1.0, -3e-7])])
    with pytest.warns(NumericalWarning, match=r"shape \(2, 4, 4\)"):
        factor, epsilon = cholesky(batch)
    close(factor @ factor.mT, batch + epsilon[:, None, None] * torch.eye(4), 1e-13)
    with pytest.raises(NotPSDError):
        cholesky(torch.stack([good, -good]))


def test_gradients_of_the_factor() -> None:
    root = torch.randn(4, 4, dtype=F64).requires_grad_()
    for jitter in (0.0, 1e-3):
        assert torch.autograd.gradcheck(lambda r, j=jitter: cholesky(r @ r.mT + torch.eye(4), j)[0], (root,))


# KL


@given(
    size=st.integers(1, 10),
    batch=st.sampled_from(BATCHES),
    seed=st.integers(0, 10_000),
    spread=st.floats(1e-3, 1e3),
)
def test_kl_is_that_of_torch(size: int, batch: tuple[int, ...], seed: int, spread: float) -> None:
    scale_tril = torch.linalg.cholesky(spread * covariance(batch, size, seed=seed))
    mean = torch.randn(*batch, size, dtype=F64, generator=torch.Generator().manual_seed(seed))
    standard = MultivariateNormal(torch.zeros(size, dtype=F64), torch.eye(size, dtype=F64))
    expected = kl_divergence(MultivariateNormal(mean, scale_tril=scale_tril), standard)
    found = gaussian_kl(mean, scale_tril)
    assert found.shape == batch
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (found >= 0).all()


def test_kl_takes_any_sign_of_the_diagonal() -> None:
    """S S' does not change when a column of S changes its sign."""
    scale_tril = torch.linalg.cholesky(covariance((), 4))
    mean = torch.randn(4, dtype=F64)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=F64)
    expected = oracles.gaussian_kl(mean.numpy(), (scale_tril @ scale_tril.mT).numpy())
    assert gaussian_kl(mean, scale_tril * signs).item() == pytest.approx(expected, rel=1e-12)


def test_kl_broadcasts_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    mean, scale_tril = torch.randn(3, 1, 4).to(dtype), torch.linalg.cholesky(covariance((2,), 4, dtype))
    found = gaussian_kl(mean, scale_tril)
    assert found.shape == (3, 2) and found.dtype == dtype
    expected = gaussian_kl(mean.expand(3, 2, 4).double(), scale_tril.expand(3, 2, 4, 4).double())
    close(found, expected, 1e-6)


def test_kl_of_a_large_gaussian_is_exact() -> None:
    scale_tril = torch.linalg.cholesky(covariance((), 900))
    mean = torch.randn(900, dtype=F64)
    expected = oracles.gaussian_kl(mean.numpy(), (scale_tril @ scale_tril.mT).numpy())
    assert gaussian_kl(mean, scale_tril).item() == pytest.approx(expected, rel=1e-11)


def test_gradients_of_the_kl() -> None:
    scale_tril = torch.linalg.cholesky(covariance((2,), 3)).requires_grad_()
    mean = torch.randn(2, 3, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, s: gaussian_kl(m, s.tril()), (mean, scale_tril))


# Natural parameters


@given(size=st.integers(1, 10), batch=st.sampled_from(BATCHES), seed=st.integers(0, 10_000))
def test_natural_parameters_and_moments(size: int, batch: tuple[int, ...], seed: int) -> None:
    precision = covariance(batch, size, seed=seed)
    shift = torch.randn(*batch, size, dtype=F64, generator=torch.Generator().manual_seed(seed))
    mean, scale_tril = natural_to_moments(shift, precision)
    inverse = np.linalg.inv(precision.numpy())
    close(mean, torch.from_numpy((inverse @ shift.numpy()[..., None])[..., 0]), 1e-11)
    close(scale_tril @ scale_tril.mT, torch.from_numpy(inverse), 1e-11)
    assert torch.equal(scale_tril, scale_tril.tril())
    assert (scale_tril.diagonal(dim1=-1, dim2=-2) > 0).all()
    back = moments_to_natural(mean, scale_tril)
    close(back[0], shift, 1e-11)
    close(back[1], precision, 1e-11)


def test_natural_parameters_of_an_ill_conditioned_gaussian() -> None:
    """A stream's precision runs from 1, where nothing was learnt, to 1e12: neither end may be lost."""
    precision = with_eigenvalues([1.0, 1e4, 1e8, 1e12])
    shift = precision @ torch.ones(4, dtype=F64)
    mean, scale_tril = natural_to_moments(shift, precision)
    torch.testing.assert_close(mean, torch.ones(4, dtype=F64), rtol=0, atol=1e-3)
    eigenvalues = torch.linalg.svdvals(scale_tril).square()
    torch.testing.assert_close(eigenvalues, torch.tensor([1.0, 1e-4, 1e-8, 1e-12], dtype=F64), rtol=1e-3, atol=0)


def test_natural_parameters_keep_the_dtype(dtype: torch.dtype) -> None:
    outputs = natural_to_moments(torch.ones(3, dtype=dtype), covariance((2,), 3, dtype))
    assert {o.dtype for o in (*outputs, *moments_to_natural(*outputs))} == {dtype}
    assert [tuple(o.shape) for o in outputs] == [(2, 3), (2, 3, 3)]


def test_an_indefinite_precision_is_refused() -> None:
    for values in ([1.0, -1.0], [1.0, 0.0]):
        precision = torch.diag(torch.tensor(values, dtype=F64))
        with pytest.raises(NotPSDError, match=r"precision of shape \(2, 2\) is not positive definite"):
            natural_to_moments(torch.ones(2, dtype=F64), precision)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_an_indefinite_precision_is_repaired_where_a_bound_is_known(batch: tuple[int, ...]) -> None:
    """I + G is never below 1; when rounding of a G of size 1e17 says otherwise, 1 is the answer."""
    precision = with_eigenvalues([-3.0, 1.0, 40.0, 1e6]).expand(*batch, 4, 4).clone()
    shift = torch.randn(*batch, 4, dtype=F64)
    values, vectors = np.linalg.eigh(precision.numpy())
    inverse = (vectors / np.maximum(values, 1.0)[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    mean, scale_tril = natural_to_moments(shift, precision, smallest=1.0)
    close(scale_tril @ scale_tril.mT, inverse, 1e-9)
    close(mean, (inverse @ shift.numpy()[..., None])[..., 0], 1e-9)
    assert torch.equal(scale_tril, scale_tril.tril())
    assert (scale_tril.diagonal(dim1=-1, dim2=-2) > 0).all()


def test_a_known_bound_changes_nothing_about_a_good_precision() -> None:
    precision, shift = torch.eye(3, dtype=F64) + covariance((2,), 3), torch.randn(2, 3, dtype=F64)
    for plain, bounded in zip(
        natural_to_moments(shift, precision), natural_to_moments(shift, precision, smallest=1.0), strict=True
    ):
        assert torch.equal(plain, bounded)


@pytest.mark.parametrize("batch", BATCHES)
def test_covariance_root(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    K = covariance(batch, 4, dtype)
    for jitter in (None, 0.0, 1e-3):
        root = covariance_root(K, jitter)
        relative = default_jitter(F64) if jitter is None else jitter
        added = relative * K.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(4, dtype=dtype)
        assert root.dtype == dtype
        torch.testing.assert_close(root @ root.mT, K + added)


def test_covariance_root_of_singular_covariances() -> None:
    ones = torch.ones(3, 3, dtype=F64)
    for K in (ones, 0 * ones, ones - 1e-14 * torch.eye(3, dtype=F64)):
        for jitter in (None, 0.0):
            root = covariance_root(K, jitter)
            torch.testing.assert_close(root @ root.mT, K, rtol=0, atol=1e-9)
    (gradient,) = torch.autograd.grad(covariance_root(ones.requires_grad_()).square().sum(), ones)
    assert gradient.isfinite().all()

"""Exact marginal likelihood of a complete grid, and the hyperparameters that maximise it."""

from __future__ import annotations

import copy
import math
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.kernels import Kernel, LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from gpytorch.means import ConstantMean, LinearMean, ZeroMean
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpseq.features import HippoFeatures
from gpseq.models import SpaceTimeStreamingGP
from gpseq.models.grid_fit import fit_on_grid, log_marginal
from gpseq.variational.kronecker import SeparableKernel, grid_inputs
from tests.oracles_streaming import F64, assert_close, assert_identical, snapshot

# Small memories on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")


def dense_marginal(K_t: Tensor, K_s: Tensor, noise: Tensor, error: Tensor) -> Tensor:
    C = torch.kron(K_t, K_s) + noise * torch.eye(error.numel(), dtype=F64)
    factor, e = torch.linalg.cholesky(C), error.reshape(-1, 1)
    fit = (e * torch.cholesky_solve(e, factor)).sum()
    return -0.5 * (fit + 2 * factor.diagonal().log().sum() + len(e) * math.log(2 * math.pi))


def covariance(size: int, kind: str) -> Tensor:
    if kind == "identity":  # all eigenvalues coincide
        return torch.eye(size, dtype=F64)
    if kind == "ring":  # eigenvalues in pairs
        angle = torch.arange(size, dtype=F64) * 2 * math.pi / size
        return (angle.unsqueeze(-1) - angle).cos().exp()
    if kind == "low rank":
        root = torch.randn(size, 1, dtype=F64)
        return root @ root.mT
    root = torch.randn(size, size, dtype=F64)
    return root @ root.mT


KINDS = st.sampled_from(["identity", "ring", "low rank", "full"])


@given(n=st.integers(1, 5), s=st.integers(1, 4), kinds=st.tuples(KINDS, KINDS), seed=st.integers(0, 10**6))
def test_value_and_gradient_are_those_of_the_dense_matrix(n: int, s: int, kinds: tuple[str, str], seed: int) -> None:
    torch.manual_seed(seed)
    K_t, K_s = covariance(n, kinds[0]), covariance(s, kinds[1])
    arguments = (K_t, K_s, torch.rand((), dtype=F64) + 0.1, torch.randn(n, s, dtype=F64))
    results = []
    for function in (log_marginal, dense_marginal):
        leaves = [a.clone().contiguous().requires_grad_() for a in arguments]
        value = function(*leaves)
        gradients = list(torch.autograd.grad(value, leaves))
        # A covariance moves symmetrically.
        gradients[:2] = [0.5 * (g + g.mT) for g in gradients[:2]]
        results.append((value.detach(), *gradients))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-8)


def modules(scale: float = 1.0) -> tuple[Kernel, ScaleKernel, GaussianLikelihood]:
    time, space = RBFKernel(), ScaleKernel(RBFKernel())
    time.lengthscale, space.base_kernel.lengthscale = 0.5 * scale, 0.8 * scale
    space.outputscale = 1.0
    likelihood = GaussianLikelihood()
    likelihood.noise = 0.01
    return time, space, likelihood


def simulated(n: int = 30, s: int = 10, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A draw of ``modules()``."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.linspace(0, 8, n, dtype=F64).unsqueeze(-1)
    places = 3 * torch.rand(s, 2, dtype=F64, generator=generator)
    time, space, _ = modules()
    with torch.no_grad():
        K = SeparableKernel(time.double(), space.double())(*[grid_inputs(times, places)] * 2).to_dense()
    factor = torch.linalg.cholesky(K + 0.01 * torch.eye(n * s, dtype=F64))
    return times, places, (factor @ torch.randn(n * s, dtype=F64, generator=generator)).reshape(n, s)


def exact(kernels: tuple[Kernel, Kernel], likelihood: GaussianLikelihood, mean: Any, data: Any) -> float:
    times, places, y = data
    inputs = grid_inputs(times, places)
    kernel = copy.deepcopy(SeparableKernel(*kernels)).double()
    with torch.no_grad():
        C = kernel(inputs, inputs).to_dense() + likelihood.noise.double() * torch.eye(y.numel(), dtype=F64)
        error = y.reshape(-1) - copy.deepcopy(mean).double()(inputs)
    return torch.distributions.MultivariateNormal(torch.zeros(len(C), dtype=F64), C).log_prob(error).item()


def test_hyperparameters_are_found_again() -> None:
    data = simulated()
    time, space, likelihood = modules(2.5)
    likelihood.noise = 0.3
    mean = ConstantMean()
    before = exact((time, space), likelihood, mean, data)
    reached = fit_on_grid(*data, time, space, likelihood, mean, num_starts=1)
    after = exact((time, space), likelihood, mean, data)
    assert reached == pytest.approx(after, rel=1e-4, abs=1e-2)
    true_time, true_space, true_likelihood = modules()
    assert after > exact((true_time, true_space), true_likelihood, ConstantMean(), data) > before
    assert time.lengthscale.item() == pytest.approx(0.5, rel=0.25)
    assert space.base_kernel.lengthscale.item() == pytest.approx(0.8, rel=0.4)
    assert likelihood.noise.item() == pytest.approx(0.01, rel=0.4)
    assert {p.dtype for p in time.parameters()} == {torch.float32}


def test_priors_count_and_frozen_parameters_stay() -> None:
    data = simulated(12, 6)
    prior = gpytorch.priors.GammaPrior(3.0, 6.0)
    time, space, likelihood = modules()
    space.base_kernel.register_prior("lengthscale_prior", prior, "lengthscale")
    space.base_kernel.raw_lengthscale.requires_grad_(False)
    kept = space.base_kernel.lengthscale.clone()
    reached = fit_on_grid(*data, time, space, likelihood, ConstantMean(), max_iterations=3)
    assert torch.equal(space.base_kernel.lengthscale, kept)
    plain = modules()
    plain[1].base_kernel.raw_lengthscale.requires_grad_(False)
    without = fit_on_grid(*data, *plain, ConstantMean(), max_iterations=3)
    assert reached - without == pytest.approx(prior.log_prob(kept.double()).item(), abs=1e-6)


def test_nothing_to_learn_is_the_value_as_it_is() -> None:
    data = simulated(8, 4)
    time, space, likelihood = modules()
    mean = ConstantMean()
    for part in (time, space, likelihood, mean):
        part.requires_grad_(False)
    assert fit_on_grid(*data, time, space, likelihood, mean) == pytest.approx(
        exact((time, space), likelihood, mean, data), rel=1e-6
    )


def model_with(likelihood: Any = None, mean: Any = None, sensors: Tensor | None = None) -> SpaceTimeStreamingGP:
    time, space, noise = modules(2.0)
    places = simulated(4)[1] if sensors is None else sensors
    return SpaceTimeStreamingGP(HippoFeatures(8, 3.0), places[:3], places, time, space, likelihood or noise, mean)


def test_a_model_learns_from_a_window_with_gaps() -> None:
    """A sensor that is mostly silent and rows without a reading do not keep the others from being learnt from."""
    times, places, y = simulated()
    y = y.clone()
    y[::2, 4] = torch.nan
    y[3:9] = torch.nan
    y[20, 1] = torch.nan
    rows = [i for i in range(30) if not (3 <= i < 9 or i == 20)]
    columns = [j for j in range(10) if j != 4]
    model = model_with()
    state = snapshot(model.information)
    reached = model.fit_hyperparameters(times.squeeze(-1), y)
    reduced = modules(2.0)
    expected = fit_on_grid(times[rows], places[columns], y[rows][:, columns], *reduced, model.mean_module)
    assert reached == expected
    assert torch.equal(model.time_kernel.lengthscale, reduced[0].lengthscale)
    assert model.num_observations == 0
    assert_identical(model.information, state)


def test_a_subset_of_the_sensors_and_any_mode() -> None:
    times, _places, y = simulated(12, 10)
    results = []
    which = torch.tensor([7, 2, 4])
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        model = model_with(mean=LinearMean(3))
        with torch.no_grad():
            model.mean_module.weights.zero_()
            model.mean_module.bias.zero_()
        with context():
            t, values = times.squeeze(-1).clone(), y[:, which].clone()
            results.append(model.fit_hyperparameters(t, values, sensors=which, max_iterations=5))
        assert model.update(t, values, sensors=which).num_observations == 36
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_any_unit_of_the_readings(scale: float) -> None:
    """The best outputscale is in the unit of the data; with the other values held it is known."""
    times, places, y = simulated(10, 5)
    found = []
    for factor in (1.0, scale):
        time, space, likelihood = modules()
        likelihood = GaussianLikelihood(noise_constraint=gpytorch.constraints.GreaterThan(1e-30)).double()
        likelihood.noise, space = 0.01 * factor**2, space.double()
        space.outputscale = factor**2
        for part in (time, space.base_kernel):
            part.requires_grad_(False)
        fit_on_grid(times, places, factor * y, time.double(), space, likelihood, ZeroMean())
        found.append(space.outputscale.item() / factor**2)
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_failures_leave_the_modules_as_they_were() -> None:
    times, _, y = simulated(12, 10)
    model = model_with()
    before = snapshot(model)
    for bad, error, message in (
        ({"y": 1e160 * y}, RuntimeError, "not finite from any"),
        ({"y": torch.full_like(y, torch.nan)}, ValueError, "^y: no complete row"),
        ({"y": y[:, :3]}, ValueError, "^y: "),
        ({"y": y, "sensors": torch.tensor([99])}, ValueError, "^sensors: "),
        ({"y": y, "times": times[:3, 0]}, ValueError, "^y: "),
        ({"y": y / 0}, ValueError, "^y: "),
        ({"y": y, "depth": 3}, TypeError, "depth"),
    ):
        with pytest.raises(error, match=message):
            model.fit_hyperparameters(**{"times": times.squeeze(-1), **bad})
        assert_identical(model, before)


def test_fixed_noise_has_nothing_to_learn() -> None:
    model = model_with(FixedNoiseGaussianLikelihood(torch.ones(1)))
    with pytest.raises(ValueError, match=r"^likelihood: "):
        model.fit_hyperparameters(torch.zeros(2), torch.zeros(2, 10))


def test_random_starts_are_those_of_the_generator() -> None:
    data = simulated(8, 4)
    reached = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + 10)
        fit = modules(30.0)
        generator = torch.Generator().manual_seed(seed)
        reached.append(fit_on_grid(*data, *fit, ConstantMean(), 2, 4, generator))
    assert reached[0] == reached[1]
    first = fit_on_grid(*data, *modules(30.0), ConstantMean(), 1, 4)
    assert min(reached) >= first


@given(seed=st.integers(0, 10**6))
@settings(max_examples=4)
def test_other_kernels_of_space_and_time(seed: int) -> None:
    """Products of what GPyTorch has; repeated times and places are no difficulty."""
    torch.manual_seed(seed)
    time = MaternKernel(1.5) + ScaleKernel(LinearKernel())
    space = ScaleKernel(MaternKernel(2.5, ard_num_dims=2) * RBFKernel(active_dims=[1]))
    times, places = torch.rand(6, 1, dtype=F64)[[0, 0, 1, 2, 3, 4]], torch.rand(4, 2, dtype=F64)[[0, 0, 1, 2]]
    y = torch.randn(6, 4, dtype=F64)
    likelihood, mean = GaussianLikelihood(), LinearMean(3)
    with torch.no_grad():
        mean.weights.zero_()
        mean.bias.zero_()
    before = exact((time, space), likelihood, mean, (times, places, y))
    reached = fit_on_grid(times, places, y, time, space, likelihood, mean, max_iterations=5)
    assert reached >= before
    assert reached == pytest.approx(exact((time, space), likelihood, mean, (times, places, y)), abs=0.05)

"""fit_hyperparameters: values that were simulated come back, failures leave everything as it was."""

import copy
import math
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from torch import Tensor

from gpseq.models import fit_hyperparameters
from tests import oracles_streaming as oracle
from tests.oracles_streaming import F64, assert_identical, draw, gpytorch_kernel, snapshot, stream

# Small memories on purpose; tests/models/test_horizon.py is about capacity.
pytestmark = pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")


def simulate(n: int = 150, seed: int = 0, level: float = 0.0) -> tuple[Tensor, Tensor]:
    """A draw from RBF, lengthscale 0.7, outputscale 2, noise 0.05, on [0, 12]."""
    generator = torch.Generator().manual_seed(seed)
    x = 12 * torch.rand(n, dtype=F64, generator=generator)
    root = torch.linalg.cholesky(oracle.rbf(0.7, 2.0)(x, x) + 0.05 * torch.eye(n, dtype=F64))
    return x, level + root @ torch.randn(n, dtype=F64, generator=generator)


def modules(dtype: torch.dtype = F64) -> tuple[gpytorch.kernels.Kernel, GaussianLikelihood]:
    return gpytorch_kernel(dtype=dtype), GaussianLikelihood().to(dtype)


def evidence(kernel: Any, likelihood: Any, x: Tensor, y: Tensor, level: float = 0.0) -> float:
    """Exact log marginal likelihood at the modules' values, by the oracle."""
    function = oracle.rbf(kernel.base_kernel.lengthscale.item(), kernel.outputscale.item())
    noise = torch.full_like(x, likelihood.noise.item())
    return oracle.exact_evidence(function, lambda t: torch.full_like(t, level), x, y, noise).item()


def state_of(*parts: torch.nn.Module) -> list[dict[str, Tensor]]:
    return [snapshot(part) for part in parts]


@pytest.mark.parametrize("seed", [0, 1])
def test_simulated_values_come_back(seed: int, dtype: torch.dtype) -> None:
    """And the value returned is the exact log marginal likelihood there, at its maximum."""
    x, y = simulate(seed=seed)
    kernel, likelihood = modules(dtype)
    value = fit_hyperparameters(x.to(dtype), y.to(dtype), kernel, likelihood, num_starts=2)
    assert kernel.base_kernel.lengthscale.item() == pytest.approx(0.7, rel=0.2)
    assert kernel.outputscale.item() == pytest.approx(2.0, rel=0.7)
    assert likelihood.noise.item() == pytest.approx(0.05, rel=0.35)
    assert all(p.dtype == dtype for module in (kernel, likelihood) for p in module.parameters())
    assert value == pytest.approx(evidence(kernel, likelihood, x, y), abs=1e-2 if dtype == torch.float32 else 1e-6)
    for module, name in ((kernel, "outputscale"), (kernel.base_kernel, "lengthscale"), (likelihood, "noise")):
        kept = getattr(module, name).item()
        for factor in (0.9, 1.1):
            setattr(module, name, torch.tensor(factor * kept, dtype=dtype))
            assert evidence(kernel, likelihood, x, y) < value
        setattr(module, name, torch.tensor(kept, dtype=dtype))


def test_a_mean_is_learnt_too() -> None:
    x, y = simulate(level=30.0)
    kernel, likelihood = modules()
    mean = gpytorch.means.ConstantMean().double()
    value = fit_hyperparameters(x, y, kernel, likelihood, mean, num_starts=1)
    assert mean.constant.item() == pytest.approx(30.0, abs=2.5)
    assert value == pytest.approx(evidence(kernel, likelihood, x, y, mean.constant.item()), abs=1e-5)


def test_more_starts_are_never_worse_and_sometimes_better() -> None:
    """From a lengthscale of thirty the first start ends where everything is noise; a few times less is enough."""
    x, y = simulate(60)
    values = []
    for starts in (1, 8):
        kernel, likelihood = modules()
        kernel.base_kernel.lengthscale = 30.0
        torch.manual_seed(0)
        values.append(fit_hyperparameters(x, y, kernel, likelihood, num_starts=starts))
    assert values[1] > values[0] + 10
    assert kernel.base_kernel.lengthscale.item() == pytest.approx(0.7, rel=0.25)


@pytest.mark.parametrize("unit", [1e-3, 10.0, 100.0, 1e4])
def test_the_unit_of_time_does_not_matter(unit: float) -> None:
    """Hours or seconds: a start of the same quality ends in the same place, from one start and from several."""
    x, y = simulate(60)
    for starts in (1, 4):
        kernel, likelihood = modules()
        kernel.base_kernel.lengthscale = torch.tensor(2.0 * unit, dtype=F64)
        torch.manual_seed(0)
        value = fit_hyperparameters(x * unit, y, kernel, likelihood, num_starts=starts)
        assert value == pytest.approx(-28.5633, abs=0.01)
        assert kernel.base_kernel.lengthscale.item() == pytest.approx(0.69 * unit, rel=0.02)


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_the_unit_of_the_targets_does_not_matter(unit: float) -> None:
    x, y = simulate(60)
    kernel, likelihood = (
        gpytorch_kernel(),
        GaussianLikelihood(noise_constraint=gpytorch.constraints.Positive()).double(),
    )
    kernel.outputscale = torch.tensor(unit**2, dtype=F64)
    likelihood.noise = torch.tensor(0.5 * unit**2, dtype=F64)
    value = fit_hyperparameters(x, y * unit, kernel, likelihood, num_starts=2)
    assert value + 60 * math.log(unit) == pytest.approx(-28.5633, abs=0.05)


def test_a_start_that_breaks_down_keeps_what_it_had_reached() -> None:
    """A line search that steps where the covariance is not finite does not throw the way there away."""

    class Cliff(gpytorch.kernels.RBFKernel):
        def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
            covariance = super().forward(x1, x2, diag=diag, **params)
            return covariance if self.lengthscale.item() > 0.8 else covariance * math.nan

    x, y = simulate(60)
    kernel, likelihood = Cliff().double(), GaussianLikelihood().double()
    kernel.lengthscale = 1.5
    values = [fit_hyperparameters(x, y, kernel, likelihood, num_starts=1, max_iterations=n) for n in (1, 100)]
    assert values[1] > values[0] and kernel.lengthscale.item() > 0.8


@pytest.mark.parametrize("starts", [1, 2, 5])
def test_the_present_values_are_the_first_start(starts: int) -> None:
    x, y = simulate(60)
    kernel, likelihood = modules()
    first = fit_hyperparameters(x, y, kernel, likelihood, num_starts=1)
    again = fit_hyperparameters(x, y, kernel, likelihood, num_starts=starts)
    assert again >= first - 1e-6


def test_random_starts_come_from_the_generator() -> None:
    """Reproducible with one, and torch's own generator is then left alone; without one, it is torch's."""
    x, y = simulate(40)
    results = []
    for seed in (7, 7, 8):
        kernel, likelihood = modules()
        kernel.base_kernel.lengthscale = 300.0
        before = torch.get_rng_state()
        generator = torch.Generator().manual_seed(seed)
        value = fit_hyperparameters(x, y, kernel, likelihood, num_starts=3, max_iterations=3, generator=generator)
        assert torch.equal(torch.get_rng_state(), before)
        results.append((value, kernel.base_kernel.lengthscale.item()))
    assert results[0] == results[1] != results[2]
    kernel, likelihood = modules()
    before = torch.get_rng_state()
    fit_hyperparameters(x, y, kernel, likelihood, num_starts=2, max_iterations=1)
    assert not torch.equal(torch.get_rng_state(), before)


def test_known_noise_leaves_the_likelihood_alone() -> None:
    x, y = simulate(80)
    noise = torch.full_like(x, 0.05)
    for likelihood in (GaussianLikelihood().double(), FixedNoiseGaussianLikelihood(torch.ones(3, dtype=F64))):
        kernel, before = gpytorch_kernel(), snapshot(likelihood)
        value = fit_hyperparameters(x, y, kernel, likelihood, num_starts=1, noise=noise)
        assert_identical(likelihood, before)
        function = oracle.rbf(kernel.base_kernel.lengthscale.item(), kernel.outputscale.item())
        assert value == pytest.approx(oracle.exact_evidence(function, oracle.zero, x, y, noise).item(), abs=1e-6)
        assert kernel.base_kernel.lengthscale.item() == pytest.approx(0.7, rel=0.25)


def test_one_noise_for_all_targets() -> None:
    """A scalar broadcasts, as in an update."""
    x, y = simulate(40)
    values = []
    for noise in (torch.full_like(x, 0.05), torch.tensor(0.05, dtype=F64)):
        kernel, likelihood = modules()
        values.append(fit_hyperparameters(x, y, kernel, likelihood, num_starts=1, max_iterations=20, noise=noise))
    assert values[0] == pytest.approx(values[1])


def test_priors_count_and_frozen_parameters_stay() -> None:
    x, y = simulate(60)
    kernel, likelihood = modules()
    kernel.base_kernel.register_prior("tight", gpytorch.priors.NormalPrior(3.0, 0.01), "lengthscale")
    kernel.double()
    kernel.outputscale = torch.tensor(1.5, dtype=F64)
    kernel.raw_outputscale.requires_grad_(False)
    value = fit_hyperparameters(x, y, kernel, likelihood, num_starts=2)
    assert kernel.base_kernel.lengthscale.item() == pytest.approx(3.0, abs=0.2)
    assert kernel.outputscale.item() == pytest.approx(1.5, rel=1e-12)
    prior = torch.distributions.Normal(3.0, 0.01).log_prob(kernel.base_kernel.lengthscale).item()
    assert value == pytest.approx(evidence(kernel, likelihood, x, y) + prior, abs=1e-4)


def test_networks_and_intervals_are_learnt_too() -> None:
    """A mean with a torch network inside, a lengthscale between two bounds, and a likelihood that shares nothing."""

    class Network(gpytorch.means.Mean):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).squeeze(-1)

    x, y = simulate(60, level=5.0)
    kernel, likelihood, mean = gpytorch_kernel(), GaussianLikelihood(), Network()
    kernel.base_kernel.register_constraint("raw_lengthscale", gpytorch.constraints.Interval(1.0, 2.0))
    kernel.double()
    kernel.base_kernel.lengthscale = 1.5
    before = state_of(mean)[0]
    plain, other = modules()
    value = fit_hyperparameters(x, y, kernel, likelihood, mean, num_starts=3)
    assert value > fit_hyperparameters(x, y, plain, other, num_starts=1, max_iterations=1)
    assert 1.0 <= kernel.base_kernel.lengthscale.item() < 1.1  # 0.7 is out of bounds
    assert any(not torch.equal(mean.state_dict()[name], kept) for name, kept in before.items())
    assert mean(x[:, None].float()).mean().item() == pytest.approx(5.0, abs=2.0)


def test_nothing_to_learn_is_an_evaluation() -> None:
    x, y = simulate(40)
    kernel, likelihood = modules()
    for module in (kernel, likelihood):
        module.requires_grad_(False)
    before = state_of(kernel, likelihood)
    assert fit_hyperparameters(x, y, kernel, likelihood) == pytest.approx(evidence(kernel, likelihood, x, y), abs=1e-8)
    for module, kept in zip((kernel, likelihood), before, strict=True):
        assert_identical(module, kept)


def test_more_data_than_gpytorch_factors_exactly() -> None:
    """Above 800 points GPyTorch answers with a stochastic estimate; a line search must not see one."""
    x, y = simulate(850)
    values = []
    for _ in range(2):
        kernel, likelihood = modules()
        values.append(fit_hyperparameters(x, y, kernel, likelihood, num_starts=1, max_iterations=2))
    assert values[0] == values[1] == pytest.approx(evidence(kernel, likelihood, x, y), abs=1e-5)


def test_modules_and_modes_and_gradients_are_left_alone(dtype: torch.dtype) -> None:
    x, y = simulate(30)
    kernel, likelihood = modules(dtype)
    kernel.eval()
    likelihood.eval()
    with torch.no_grad():
        fit_hyperparameters(x, y, kernel, likelihood, num_starts=1, max_iterations=5)
    assert not kernel.training and not likelihood.training
    for module in (kernel, likelihood):
        for parameter in module.parameters():
            assert parameter.grad is None and parameter.requires_grad and parameter.dtype == dtype
    assert kernel.base_kernel.lengthscale.item() != 1.0


# Through the model


def test_the_method_of_the_model(dtype: torch.dtype) -> None:
    """Learn on a window, then stream: the belief is carried to the new values, the state stays complete."""
    x, y = (part.to(dtype) for part in simulate(80))
    model = stream(40, 12.0, dtype=dtype, mean_module=gpytorch.means.ConstantMean().to(dtype))
    value = model.fit_hyperparameters(x, y, num_starts=2)
    assert math.isfinite(value) and model.num_observations == 0
    kernel, likelihood = modules(dtype)
    likelihood.noise = torch.tensor(0.1, dtype=dtype)
    mean = gpytorch.means.ConstantMean().to(dtype)
    torch.manual_seed(0)
    assert fit_hyperparameters(x, y, kernel, likelihood, mean, num_starts=2) == pytest.approx(value, abs=1e-3)
    model.update(x, y)
    function = oracle.rbf(model.covar_module.base_kernel.lengthscale.item(), model.covar_module.outputscale.item())
    level, noise = model.mean_module.constant.item(), torch.full((80,), model.likelihood.noise.item(), dtype=F64)
    at = torch.linspace(0.5, 11.5, 23, dtype=F64)
    expected = oracle.exact_gp(function, lambda t: torch.full_like(t, level), x.double(), y.double(), noise, at)
    with torch.no_grad():
        assert (model(at.to(dtype)).mean.double() - expected.mean).abs().max() < 5e-3
    assert model.log_evidence.item() == pytest.approx(value, abs=0.05)


# Failures


class Broken(gpytorch.kernels.RBFKernel):
    """Fails from the third evaluation on, or gives nonsense at once."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        self.calls += 1
        covariance = super().forward(x1, x2, diag=diag, **params)
        if self.how == "raises" and self.calls > 2:
            raise ArithmeticError("no more")
        return covariance * math.nan if self.how == "nan" else covariance


@pytest.mark.parametrize(("how", "error"), [("raises", ArithmeticError), ("nan", RuntimeError)])
def test_a_failure_leaves_the_modules_as_they_were(how: str, error: type[Exception]) -> None:
    x, y = simulate(20)
    kernel, likelihood, mean = (
        Broken(how).double(),
        GaussianLikelihood().double(),
        gpytorch.means.ConstantMean().double(),
    )
    before = state_of(kernel, likelihood, mean)
    with pytest.raises(error, match=r"no more|not finite from any of 3 starts"):
        fit_hyperparameters(x, y, kernel, likelihood, mean, num_starts=3)
    for module, kept in zip((kernel, likelihood, mean), before, strict=True):
        assert_identical(module, kept)
        assert all(parameter.grad is None for parameter in module.parameters())


X, Y = draw(8)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": X.tolist()}, TypeError, r"^x: expected a floating-point tensor, got list"),
        ({"x": X.long()}, TypeError, r"^x: expected a floating-point tensor, got torch\.int64"),
        ({"y": Y > 0}, TypeError, r"^y: expected a floating-point tensor, got torch\.bool"),
        ({"y": Y + 0j}, TypeError, r"^y: expected a floating-point tensor, got torch\.complex128"),
        ({"y": None}, TypeError, r"^y: expected a floating-point tensor, got NoneType"),
        ({"y": Y[:3]}, ValueError, r"^y: expected .*got \(3,\) for x of shape \(8,\)"),
        ({"y": Y[:, None]}, ValueError, r"^y: expected .*got \(8, 1\)"),
        ({"x": X[:, None, None]}, ValueError, r"^y: expected .*for x of shape \(8, 1, 1\)"),
        ({"x": X[:0], "y": Y[:0]}, ValueError, r"^y: expected .*n >= 1"),
        ({"x": X[0]}, ValueError, r"^(x|y): expected"),
        ({"x": X * math.nan}, ValueError, r"^x: expected finite values"),
        ({"y": Y * math.inf}, ValueError, r"^y: expected finite values"),
        ({"num_starts": 0}, ValueError, r"^num_starts: expected at least 1, got 0"),
        ({"num_starts": 1.5}, (TypeError, ValueError), r"^num_starts: "),
        ({"noise": torch.ones(5)}, ValueError, r"^noise: .*\(5,\)"),
        ({"noise": -torch.ones(8)}, ValueError, r"^noise: .*positive"),
        ({"noise": torch.full((8,), math.nan)}, ValueError, r"^noise: "),
        ({"noise": torch.ones(8, dtype=torch.int64)}, TypeError, r"^noise: expected a floating-point tensor"),
        ({"noise": "small"}, TypeError, r"^noise: "),
        (
            {"likelihood": FixedNoiseGaussianLikelihood(torch.ones(8))},
            TypeError,
            r"^likelihood: expected GaussianLikelihood",
        ),
        ({"likelihood": None}, TypeError, r"^likelihood: "),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], kind: Any, message: str) -> None:
    kernel, likelihood = modules()
    before = state_of(kernel, likelihood)
    arguments = {"x": X, "y": Y, "covar_module": kernel, "likelihood": likelihood} | changes
    with pytest.raises(kind, match=message):
        fit_hyperparameters(**arguments)
    for module, kept in zip((kernel, likelihood), before, strict=True):
        assert_identical(module, kept)


def test_a_failed_fit_leaves_the_stream_as_it_was() -> None:
    model = stream(8).update(X, Y)
    before, twin = snapshot(model), copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"^y: "):
        model.fit_hyperparameters(X, Y * math.nan)
    assert_identical(model, before)
    assert torch.equal(model.update(X, Y).log_evidence, twin.update(X, Y).log_evidence)

"""StreamingGP: what it predicts, against dense oracles, in every dtype and batch shape, never from a stale cache."""

import itertools
import math
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gpseq
from gpseq.features import HippoFeatures, InducingPoints
from gpseq.models import StreamingGP
from tests import oracles_streaming as oracle
from tests.oracles_streaming import (
    F64,
    DenseStream,
    assert_close,
    assert_identical,
    assert_posterior,
    draw,
    functionals,
    gpytorch_kernel,
    snapshot,
    stream,
    variance_of,
)

# Small memories on purpose; tests/models/test_horizon.py is about capacity.
pytestmark = pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")

AT = torch.linspace(-1.0, 11.0, 13, dtype=F64)
TRANSFERS = ("vfe", "adf")


def noise_of(model: StreamingGP, x: Tensor) -> Tensor:
    return torch.full(x.shape, model.likelihood.noise.item(), dtype=F64)


# Against the oracles


@pytest.mark.parametrize("nu", [None, 1.5])
def test_first_update_and_prediction(nu: float | None, dtype: torch.dtype) -> None:
    """float32 inputs and a float32 model end within 1e-4 of the float64 oracle."""
    model = stream(12, lengthscale=1.2, outputscale=1.6, nu=nu, dtype=dtype)
    x, y = draw(40, dtype=dtype)
    model.update(x, y)
    kernel = oracle.rbf(1.2, 1.6) if nu is None else oracle.matern32(1.2, 1.6)
    basis, noise = functionals(model.features), torch.full((40,), 0.1, dtype=F64)
    q, bound = oracle.sparse_gp(kernel, oracle.zero, basis, *draw(40), noise)
    expected = oracle.conditional(kernel, oracle.zero, basis, q, oracle.at_points(AT))
    tolerance = 1e-7 if dtype == F64 else 1e-4
    assert_posterior(model, expected, AT.to(dtype), tolerance)
    assert_close(model.log_evidence, bound, tolerance)
    posterior = model(AT.to(dtype))
    assert posterior.mean.dtype == posterior.covariance_matrix.dtype == dtype
    assert model.log_evidence.dtype == F64
    observed = model.likelihood(posterior)
    assert_close(observed.variance.double(), expected.variance + 0.1, tolerance)


@pytest.mark.parametrize("model_dtype", [torch.float32, F64])
@pytest.mark.parametrize("transfer", TRANSFERS)
def test_mixed_precision_through_a_stretching(model_dtype: torch.dtype, transfer: str, dtype: torch.dtype) -> None:
    results = []
    for model_type, input_type in ((model_dtype, dtype), (F64, F64)):
        model = stream(24, 5.0, dtype=model_type, transfer=transfer)
        for x, y in zip(*(part.split(10) for part in draw(60, 9.0, seed=3)), strict=True):
            model.update(x.to(input_type), y.to(input_type))
        posterior = model(AT[1:-2].to(input_type))
        assert posterior.mean.dtype == input_type
        results.append((posterior.mean.double(), posterior.covariance_matrix.double(), model.log_evidence))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-4)


@given(
    num=st.integers(1, 40),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    nu=st.sampled_from([None, 1.5]),
    transfer=st.sampled_from(TRANSFERS),
    sort=st.booleans(),
)
def test_on_one_basis_streaming_is_batch(
    num: int, chunk: int, seed: int, nu: float | None, transfer: str, sort: bool
) -> None:
    """For any chunks, times in any order."""
    x, y = draw(num, seed=seed)
    y = y[x.argsort()] if sort else y
    x = x.sort().values if sort else x
    streamed, batch = (stream(14, nu=nu, transfer=transfer, horizon_growth="fixed") for _ in range(2))
    for part in range(0, num, chunk):
        streamed.update(x[part : part + chunk], y[part : part + chunk])
    batch.update(x, y)
    with torch.no_grad():
        assert_close(streamed(AT).mean, batch(AT).mean, 1e-9)
        assert_close(streamed(AT).covariance_matrix, batch(AT).covariance_matrix, 1e-9)
    assert_close(streamed.log_evidence, batch.log_evidence, 1e-9)
    assert streamed.num_observations == num


@pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")
def test_a_stream_with_everything_changing_is_the_four_term_objective() -> None:
    """Lengthscale, outputscale, noise and mean move between updates, the horizon within them."""
    mean = gpytorch.means.LinearMean(1).double()
    model = stream(9, 8.0, mean_module=mean, jitter=0.0)
    dense: DenseStream | None = None
    changes = [
        (1.0, 1.0, 0.1, 0.2, 7.9),
        (1.3, 2.0, 0.3, -0.1, 9.5),
        (0.8, 0.6, 0.05, 0.0, 9.9),
        (1.1, 1.0, 0.1, 0.5, 14.0),
    ]
    for index, (lengthscale, outputscale, noise, slope, last) in enumerate(changes):
        model.covar_module.load_state_dict(gpytorch_kernel(lengthscale, outputscale).state_dict())
        model.likelihood.noise = torch.tensor(noise, dtype=F64)
        mean.weights.data.fill_(slope)
        mean.bias.data.fill_(index)
        x, y = draw(12, last, seed=index)
        x[3] = last
        model.update(x, y)
        kernel, basis = oracle.rbf(lengthscale, outputscale), functionals(model.features)
        mean_function = lambda t, slope=slope, index=index: slope * t + index  # noqa: E731
        dense = dense or DenseStream(kernel, basis, mean_function)
        dense.update(x, y, torch.full_like(x, noise), kernel=kernel, basis=basis, mean=mean_function)
        assert_posterior(model, dense.predict(AT), AT, 1e-6)
        assert_close(model.log_evidence, dense.evidence, 1e-8)
    assert model.features.horizon == pytest.approx(8 * 1.25**3)


def test_large_memory_is_the_exact_gp() -> None:
    model = stream(60, 10.0, horizon_growth="fixed")
    x, y = draw(50)
    for part_x, part_y in zip(x.split(7), y.split(7), strict=True):
        model.update(part_x, part_y)
    kernel, noise = oracle.rbf(1.0), noise_of(model, x)
    inside = AT[1:-1]
    assert_posterior(model, oracle.exact_gp(kernel, oracle.zero, x, y, noise, inside), inside, 1e-5)
    exact = oracle.exact_evidence(kernel, oracle.zero, x, y, noise)
    assert model.log_evidence <= exact + 1e-8
    assert model.log_evidence.item() == pytest.approx(exact.item(), abs=1e-5)


def test_posterior_variance_is_below_the_prior_and_above_zero(dtype: torch.dtype) -> None:
    model = stream(20, 10.0, outputscale=2.0, noise=1e-4, dtype=dtype)
    x, y = draw(300, dtype=dtype)
    model.update(x, y)
    variance = variance_of(model(torch.linspace(-5, 20, 200, dtype=dtype)))
    assert (variance <= 2.0 * (1 + 1e-6)).all() and variance.min() > 0


@pytest.mark.parametrize("noise", [1e-4, 1e-6, 1e-9])
def test_small_variances_survive_hyperparameters_in_float32(noise: float) -> None:
    """Prior variance and explained variance nearly cancel, so both must come from the same float64 hyperparameters."""
    x = torch.linspace(0, 10, 2000, dtype=F64)
    variances = []
    for dtype in (torch.float32, F64):
        model = stream(30, 10.0, dtype=torch.float32).to(dtype)
        model.covar_module.outputscale = 1.7  # softplus of the raw value rounds differently in the two dtypes
        model.covar_module.raw_outputscale.data = model.covar_module.raw_outputscale.data.float().to(dtype)
        model.update(x, x.sin(), noise=noise)
        with torch.no_grad():
            variances.append(variance_of(model(x[::50])))
    assert variances[0].min() > 0
    torch.testing.assert_close(*variances, rtol=0.05, atol=1e-11)


# Noise, likelihoods, means


@pytest.mark.parametrize("kind", ["per point", "scalar tensor", "number", "float32"])
def test_noise_given_with_the_data(kind: str) -> None:
    """Heteroscedastic: it replaces the likelihood's."""
    x, y = draw(20)
    noise = 0.05 + torch.rand(20, dtype=F64)
    given: Any = {"per point": noise, "scalar tensor": torch.tensor(0.3), "number": 0.3, "float32": noise.float()}[kind]
    noise = noise if kind in ("per point", "float32") else torch.full_like(x, 0.3)
    model = stream(12, noise=5.0).update(x, y, noise=given)
    q, bound = oracle.sparse_gp(oracle.rbf(1.0), oracle.zero, functionals(model.features), x, y, noise)
    basis = functionals(model.features)
    expected = oracle.conditional(oracle.rbf(1.0), oracle.zero, basis, q, oracle.at_points(AT))
    assert_posterior(model, expected, AT, 1e-6)
    assert_close(model.log_evidence, bound, 1e-6)


@pytest.mark.parametrize("learn", [False, True])
def test_fixed_noise_likelihood_takes_noise_with_each_update(learn: bool) -> None:
    x, y = draw(20)
    noise = 0.05 + torch.rand(20, dtype=F64)
    likelihood = FixedNoiseGaussianLikelihood(torch.full((3,), 0.1, dtype=F64), learn_additional_noise=learn).double()
    if learn:
        likelihood.second_noise = torch.tensor(0.2, dtype=F64)
    model = StreamingGP(HippoFeatures(12, 10.0), gpytorch_kernel(), likelihood).eval()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="noise: a FixedNoiseGaussianLikelihood needs the noise variance of each target"
    ):
        model.update(x, y)
    assert_identical(model, before)
    model.update(x, y, noise=noise)
    total = noise + (0.2 if learn else 0.0)
    _, bound = oracle.sparse_gp(oracle.rbf(1.0), oracle.zero, functionals(model.features), x, y, total)
    assert_close(model.log_evidence, bound, 1e-6)
    if not learn:  # GPyTorch 1.15 counts the noise of a call twice where there is a learnt one beside it
        with torch.no_grad():
            f, observed = model(AT), model.likelihood(model(AT), noise=torch.full_like(AT, 0.7))
            assert_close(observed.variance - f.variance, torch.full_like(AT, 0.7), 1e-6)


class Wave(gpytorch.means.Mean):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


@pytest.mark.parametrize("kind", [gpytorch.means.ConstantMean, lambda: gpytorch.means.LinearMean(1), Wave])
def test_any_mean(kind: Any, dtype: torch.dtype) -> None:
    mean = kind().to(dtype)
    for parameter in mean.parameters():
        parameter.data.normal_()
    exact = kind().double()
    exact.load_state_dict(mean.state_dict())
    model = stream(12, mean_module=mean)
    x, y = draw(20, dtype=dtype)
    model.update(x, y)

    def mean_function(t: Tensor) -> Tensor:
        with torch.no_grad():
            return exact(t[:, None])

    basis = functionals(model.features)
    q, bound = oracle.sparse_gp(oracle.rbf(1.0), mean_function, basis, x.double(), y.double(), noise_of(model, x))
    expected = oracle.conditional(oracle.rbf(1.0), mean_function, basis, q, oracle.at_points(AT))
    assert_posterior(model, expected, AT, 1e-6)
    assert_close(model.log_evidence, bound, 1e-6)


def test_inducing_points_go_through_the_same_update() -> None:
    """Streaming sparse GP with points, laid anew in mid-stream."""
    first, second = AT[1:8], AT[2::2]
    model = stream(InducingPoints(first))
    dense = DenseStream(oracle.rbf(1.0), oracle.at_points(first))
    for seed in range(2):
        x, y = draw(15, seed=seed)
        model.update(x, y)
        dense.update(x, y, noise_of(model, x))
        assert_posterior(model, dense.predict(AT), AT, 1e-6)
        assert_close(model.log_evidence, dense.evidence, 1e-6)
        if seed == 0:
            empty = x[:0]
            model.rebase(InducingPoints(second))
            dense.update(empty, empty, empty, basis=oracle.at_points(second))
            assert_posterior(model, dense.predict(AT), AT, 1e-6)
    assert model.features.num_features == len(second) and model.num_observations == 30


def test_rebase_to_other_features_and_back() -> None:
    """Nothing is lost on the way through features that hold all there is."""
    model = stream(12, lengthscale=2.0)
    model.update(*draw(30))
    with torch.no_grad():
        before = model(AT)
        model.rebase(InducingPoints(torch.linspace(-1, 11, 30, dtype=F64))).rebase(HippoFeatures(25, 10.0))
        after = model(AT)
    assert model.features.num_features == 25
    assert_close(after.mean[1:-1], before.mean[1:-1], 2e-3)
    assert_close(after.covariance_matrix[1:-1, 1:-1], before.covariance_matrix[1:-1, 1:-1], 2e-3)


def test_two_columns() -> None:
    """Time in the second column; the first is followed at one value and may take others in the data."""
    kernel = gpytorch.kernels.RBFKernel(ard_num_dims=2).double()
    kernel.lengthscale = torch.tensor([2.0, 1.0])
    features = HippoFeatures(40, 10.0, time_dim=1, other_inputs=torch.tensor([0.5]))
    model = StreamingGP(features, kernel, gpytorch.likelihoods.GaussianLikelihood().double()).eval()
    model.likelihood.noise = torch.tensor(0.1, dtype=F64)
    time, y = draw(40, 11.0)
    x = torch.stack([torch.full_like(time, 0.5), time], -1)
    model.update(x, y)
    assert model.features.horizon == 12.5
    at = torch.stack([torch.full_like(AT, 0.5), AT], -1)[1:]
    expected = oracle.exact_gp(oracle.rbf(1.0), oracle.zero, time, y, noise_of(model, time), AT[1:])
    assert_posterior(model, expected, at, 1e-3)
    beside = model(at + torch.tensor([1.0, 0.0]))
    assert (variance_of(beside) > variance_of(model(at))).all()


# Times


@pytest.mark.parametrize("shift", [-50.0, 7.5, 1e5])
@pytest.mark.parametrize("transfer", TRANSFERS)
def test_times_may_start_anywhere(shift: float, transfer: str) -> None:
    """A stationary kernel does not know the date; the basis moves along."""
    here, there = stream(20, 6.0, transfer=transfer), stream(20, shift + 6.0, start=shift, transfer=transfer)
    for seed, last in enumerate((5.0, 8.0, 9.0)):
        x, y = draw(20, last, seed=seed)
        here.update(x, y)
        there.update(x + shift, y)
    assert there.features.horizon - shift == pytest.approx(here.features.horizon, abs=1e-9)
    with torch.no_grad():
        assert_close(there(AT + shift).mean, here(AT).mean, 1e-6)
        assert_close(there(AT + shift).covariance_matrix, here(AT).covariance_matrix, 1e-6)
    assert_close(there.log_evidence, here.log_evidence, 1e-6)


def test_repeated_and_unsorted_times() -> None:
    x, y = draw(12)
    model = stream(12, noise=0.3).update(torch.cat([x, x.flip(0), x]), torch.cat([y, y.flip(0), y]))
    once = stream(12, noise=0.1).update(x, y)
    with torch.no_grad():
        assert_close(model(AT).mean, once(AT).mean, 1e-10)
        assert_close(model(AT).covariance_matrix, once(AT).covariance_matrix, 1e-10)


# Missing targets


@given(holes=st.lists(st.booleans(), min_size=12, max_size=12), last=st.floats(9.0, 12.0))
@pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")
def test_skipping_missing_targets_is_dropping_the_rows(holes: list[bool], last: float) -> None:
    """The horizon included: a row that is dropped does not stretch it."""
    x, y = draw(12)
    x[-1] = last
    missing = torch.tensor(holes)
    skipped = stream(12).update(x, y.masked_fill(missing, math.nan), missing="skip")
    dropped = stream(12).update(x[~missing], y[~missing])
    assert skipped.features.horizon == dropped.features.horizon
    for name, value in dropped.state.items():
        torch.testing.assert_close(getattr(skipped.state, name), value, rtol=1e-12, atol=1e-12)


def test_every_model_of_a_batch_has_its_own_gaps() -> None:
    lengthscales = torch.tensor([0.8, 1.0, 1.5])
    model = stream(12, lengthscale=lengthscales, batch_shape=(3,))
    x, _ = draw(12)
    y = torch.randn(3, 12, dtype=F64)
    missing = torch.rand(3, 12) < 0.4
    noise = (0.1 + torch.rand(3, 12, dtype=F64)).masked_fill(missing, math.nan)
    model.update(x, y.masked_fill(missing, math.nan), noise=noise, missing="skip")
    for index, lengthscale in enumerate(lengthscales.tolist()):
        kept = ~missing[index]
        alone = stream(12, lengthscale=lengthscale).update(x[kept], y[index, kept], noise=noise[index, kept])
        assert_close(model.state.G[index], alone.state.G, 1e-9)
        assert_close(model.state.r[index], alone.state.r, 1e-9)
        assert_close(model.log_evidence[index], alone.log_evidence, 1e-9)
    assert model.num_observations == (~missing).sum()


# Batches


@pytest.mark.parametrize("batch", [(3,), (2, 3), (2, 1)])
@pytest.mark.parametrize("inputs", ["shared", "own"])
@pytest.mark.parametrize("transfer", TRANSFERS)
@pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")
def test_a_batch_of_models_is_a_loop(batch: tuple[int, ...], inputs: str, transfer: str, dtype: torch.dtype) -> None:
    """A batch of kernels, with shared or own inputs, over a change of basis; means, covariances and samples."""
    lengthscales = 0.6 + 0.4 * torch.rand(batch)
    model = stream(16, 8.0, lengthscale=lengthscales, batch_shape=batch, transfer=transfer, dtype=dtype)
    x = 9.9 * torch.rand(2, *(batch if inputs == "own" else ()), 12, 1, dtype=dtype)
    x[0] *= 0.8  # the second chunk stretches the horizon, which all of a batch have in common
    x[1].select(-2, 0).fill_(9.9)
    y = torch.randn(2, *batch, 12, dtype=dtype)
    for part in range(2):
        model.update(x[part], y[part])
    assert model.features.horizon == 10.0 and model.num_observations == y.numel()
    at = AT.to(dtype)
    with torch.no_grad():
        posterior = model(at)
        assert posterior.mean.shape == (*batch, 13) and posterior.covariance_matrix.shape == (*batch, 13, 13)
        assert variance_of(posterior).shape == (*batch, 13)
        assert model.log_evidence.shape == model.residual_variance().shape == batch
        assert model.residual_variance(at).shape == (*batch, 13)
        assert model.reconstruct(at[1:-2]).shape == (*batch, 10)
    for index in itertools.product(*map(range, batch)):
        alone = stream(16, 8.0, lengthscale=lengthscales[index].item(), transfer=transfer, dtype=dtype)
        for part in range(2):
            alone.update(x[part][index] if inputs == "own" else x[part], y[part][index])
        with torch.no_grad():
            single = alone(at)
        tolerance = 1e-7 if dtype == F64 else 1e-4
        assert_close(posterior.mean[index], single.mean, tolerance)
        assert_close(posterior.covariance_matrix[index], single.covariance_matrix, tolerance)
        assert_close(model.log_evidence[index], alone.log_evidence, tolerance)
        assert_close(model.residual_variance()[index], alone.residual_variance(), tolerance)
        assert_close(model.reconstruct(at[1:-2])[index], alone.reconstruct(at[1:-2]), tolerance)


def test_observations_of_a_batch_are_counted_over_the_batch() -> None:
    """However the chunk is broadcast, and whether targets are skipped or not."""
    x, y = draw(10)
    gap = y.clone()
    gap[3] = math.nan
    counts = []
    for inputs in (x, x.expand(3, 10).unsqueeze(-1)):
        for targets, missing in ((y, "error"), (y.expand(3, 10), "error"), (gap, "skip"), (gap.expand(3, 10), "skip")):
            model = stream(8, batch_shape=(3,), lengthscale=torch.ones(3)).update(inputs, targets, missing=missing)
            counts.append(model.num_observations - 3 * int(targets.isfinite().all()))
    assert counts == [27] * 8


def test_a_batch_of_likelihoods_has_its_own_noise() -> None:
    likelihood = gpytorch.likelihoods.GaussianLikelihood(batch_shape=torch.Size([3])).double()
    likelihood.noise = torch.tensor([[0.1], [0.2], [0.7]])
    kernel = gpytorch_kernel(torch.ones(3), batch_shape=(3,))
    model = StreamingGP(HippoFeatures(12, 10.0), kernel, likelihood).eval()
    x, y = draw(15)
    model.update(x, y)
    for index, noise in enumerate((0.1, 0.2, 0.7)):
        assert_close(model.log_evidence[index], stream(12, noise=noise).update(x, y).log_evidence, 1e-6)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_samples_and_their_moments(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    model = stream(12, lengthscale=torch.ones(batch), batch_shape=batch, dtype=dtype)
    model.update(*draw(20, dtype=dtype))
    at = AT[::3].to(dtype)
    posterior = model(at)
    samples = posterior.rsample(torch.Size([4000]))
    assert samples.shape == (4000, *batch, 5) and samples.dtype == dtype
    assert posterior.rsample().shape == (*batch, 5)
    expected = model(at)
    assert (samples.mean(0) - expected.mean).abs().max() < 0.1
    assert (samples.var(0) - expected.variance).abs().max() < 0.1


# Caches and gradients


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_no_stale_cache_when_the_stream_moves_on(transfer: str) -> None:
    """Predict in eval, extend the horizon by an update, predict again: no train() or eval() in between."""
    model, control = (stream(20, 5.0, transfer=transfer) for _ in range(2))
    for seed, last in enumerate((4.0, 6.0, 6.2, 9.5)):
        x, y = draw(15, last, seed=seed)
        x[0] = last
        model.update(x, y)
        control.update(x, y)
        model(AT), model.likelihood(model(AT)).variance, model.log_evidence, model.residual_variance()  # fill any cache
    control.train()
    control.eval()
    with torch.no_grad():
        assert torch.equal(model(AT).mean, control(AT).mean)
        assert torch.equal(model(AT).covariance_matrix, control(AT).covariance_matrix)
    assert torch.equal(model.log_evidence, control.log_evidence)


@pytest.mark.parametrize("how", ["setter", "initialize", "data", "load", "module"])
def test_hyperparameters_changed_in_eval_take_effect_at_once(how: str) -> None:
    """Prediction and the next update both see the new value; the belief is carried over to it."""
    model = stream(12, jitter=0.0)
    x, y = draw(20)
    model.update(x, y)
    stale = model(AT).mean.detach()
    base = model.covar_module.base_kernel
    if how == "setter":
        base.lengthscale = torch.tensor(1.5, dtype=F64)
    elif how == "initialize":
        model.initialize(**{"covar_module.base_kernel.lengthscale": torch.tensor(1.5, dtype=F64)})
    elif how == "data":
        base.raw_lengthscale.data.copy_(base.raw_lengthscale_constraint.inverse_transform(torch.tensor(1.5, dtype=F64)))
    elif how == "load":
        model.covar_module.load_state_dict(gpytorch_kernel(1.5).state_dict())
    else:
        model.covar_module = gpytorch_kernel(1.5)
    basis, empty = functionals(model.features), x[:0]
    dense = DenseStream(oracle.rbf(1.0), basis).update(x, y, noise_of(model, x))
    dense.update(empty, empty, empty, kernel=oracle.rbf(1.5))
    before = snapshot(model)
    assert_posterior(model, dense.predict(AT), AT, 1e-6)
    assert (model(AT).mean - stale).abs().max() > 1e-3
    assert_identical(model, before)  # predicting replaces nothing
    x, y = draw(10, seed=1)
    model.update(x, y)
    dense.update(x, y, noise_of(model, x))
    assert_posterior(model, dense.predict(AT), AT, 1e-6)


@pytest.mark.parametrize("part", ["kernel", "base kernel"])
def test_another_kernel_with_the_same_numbers_takes_effect(part: str) -> None:
    """A Matern in place of an RBF, with the very same lengthscale: values alone do not tell them apart."""
    model = stream(12, jitter=0.0)
    x, y = draw(20)
    model.update(x, y)
    if part == "kernel":
        model.covar_module = gpytorch_kernel(1.0, nu=1.5)
    else:
        model.covar_module.base_kernel = gpytorch_kernel(1.0, nu=1.5).base_kernel
    empty = x[:0]
    dense = DenseStream(oracle.rbf(1.0), functionals(model.features)).update(x, y, noise_of(model, x))
    dense.update(empty, empty, empty, kernel=oracle.matern32(1.0))
    assert_posterior(model, dense.predict(AT), AT, 1e-6)


def test_a_mean_that_is_a_buffer_takes_effect() -> None:
    class Level(gpytorch.means.Mean):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("level", torch.zeros((), dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return self.level.expand(x.shape[:-1])

    model = stream(12, mean_module=Level(), jitter=0.0)
    x, y = draw(20)
    model.update(x, y)
    model.mean_module.level.fill_(3.0)
    empty = x[:0]
    dense = DenseStream(oracle.rbf(1.0), functionals(model.features)).update(x, y, noise_of(model, x))
    dense.update(empty, empty, empty, mean=lambda t: torch.full_like(t, 3.0))
    assert_posterior(model, dense.predict(AT), AT, 1e-6)


@pytest.mark.parametrize("quantity", ["mean", "variance"])
def test_gradients_of_predictions_reach_the_inputs(quantity: str) -> None:
    """Against finite differences of the dense oracle; backward works again and again."""
    model = stream(12)
    x, y = draw(20)
    model.update(x, y)
    basis = functionals(model.features)
    q, _ = oracle.sparse_gp(oracle.rbf(1.0), oracle.zero, basis, x, y, noise_of(model, x))

    def reference(at: Tensor) -> Tensor:
        return getattr(oracle.conditional(oracle.rbf(1.0), oracle.zero, basis, q, oracle.at_points(at)), quantity)

    h = 1e-5
    expected = (reference(AT + h) - reference(AT - h)) / (2 * h)
    at = AT.clone().requires_grad_()
    value = getattr(model(at), quantity).sum()
    value.backward(retain_graph=True)
    first = at.grad.clone()
    assert_close(first, expected, 1e-6)
    value.backward()
    assert_close(at.grad, 2 * first, 1e-12)
    getattr(model(at), quantity).sum().backward()
    assert_close(at.grad, 3 * first, 1e-12)


@pytest.mark.parametrize("quantity", ["mean", "variance", "covariance_matrix"])
def test_hyperparameters_are_constants_of_a_prediction(quantity: str, dtype: torch.dtype) -> None:
    model = stream(12, mean_module=gpytorch.means.LinearMean(1).to(dtype), dtype=dtype)
    model.update(*draw(20, dtype=dtype))
    at = AT.clone().to(dtype).requires_grad_()
    getattr(model(at), quantity).sum().backward()
    assert at.grad is not None and at.grad.isfinite().all()
    assert {name: p.grad for name, p in model.named_parameters() if p.grad is not None} == {}


def test_a_prediction_under_no_grad_does_not_spoil_the_next() -> None:
    model = stream(12).update(*draw(20))
    with torch.no_grad():
        model(AT)
    with torch.inference_mode():
        model(AT)
    at = AT.clone().requires_grad_()
    model(at).mean.sum().backward()
    assert at.grad.abs().max() > 0


# Modes, dtypes, calls


def test_training_mode_predicts_the_same() -> None:
    """A stream has nothing to train: covariances are full in either mode."""
    model = stream(12).update(*draw(20))
    with torch.no_grad():
        evaluated = model(AT)
        trained = model.train()(AT)
    assert torch.equal(trained.mean, evaluated.mean)
    assert torch.equal(trained.covariance_matrix, evaluated.covariance_matrix)


def test_the_prior_on_demand() -> None:
    model = stream(12, outputscale=1.5).update(*draw(20))
    prior = model(AT, prior=True)
    assert_close(prior.mean, torch.zeros_like(AT), 1e-12)
    assert_close(prior.covariance_matrix, oracle.rbf(1.0, 1.5)(AT, AT), 1e-7)


@pytest.mark.parametrize("cast", ["float", "double", "half", "bfloat16", "to float32"])
def test_casts_keep_the_state_in_float64(cast: str) -> None:
    model = stream(12, lengthscale=1.0, dtype=F64)
    model.update(*draw(20))
    before = {name: value.clone() for name, value in model.state.items()}
    moved = model.to(torch.float32) if cast == "to float32" else getattr(model, cast)()
    assert moved is model
    for name, value in model.state.items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    assert model.features.nodes().dtype == model.features.weights().dtype == F64
    assert model.covar_module.outputscale.dtype != F64 or cast == "double"
    posterior = model(AT)  # the rounded hyperparameters are other hyperparameters; the belief is carried over
    assert posterior.mean.isfinite().all() and (variance_of(posterior) > 0).all()


def test_a_model_cast_there_and_back_predicts_the_same() -> None:
    """With hyperparameters that float32 holds exactly, nothing at all may change."""
    model = stream(12, dtype=torch.float32)
    model.update(*draw(20))
    with torch.no_grad():
        before = model(AT).mean
        model.double().float().to(torch.float64)
        assert_close(model(AT).mean, before, 1e-7)


def test_autocast_around_everything() -> None:
    x, y = draw(20, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = stream(12, dtype=torch.float32).update(x, y)
        with torch.no_grad():
            mean, variance = model(x).mean, variance_of(model(x))
    control = stream(12, dtype=torch.float32).update(x, y)
    with torch.no_grad():
        assert_close(mean.float(), control(x).mean, 1e-6)
        assert_close(variance.float(), variance_of(control(x)), 1e-6)


@pytest.mark.parametrize("chunk", ["row", "column", "empty"])
def test_shapes_of_a_chunk(chunk: str) -> None:
    model = stream(12)
    x, y = draw(6)
    if chunk == "empty":
        before = snapshot(model.update(x, y))
        for nothing in (x[:0], x[:0].reshape(0, 1)):
            assert model.update(nothing, y[:0]) is model
        assert_identical(model, before)
        return
    for i in range(6):
        model.update(x[i : i + 1] if chunk == "row" else x[i : i + 1, None], y[i : i + 1])
    assert_close(model.log_evidence, stream(12).update(x, y).log_evidence, 1e-9)


def test_update_returns_the_model_and_counts() -> None:
    model = stream(12)
    assert model.update(*draw(5)) is model and model.num_observations == 5
    assert model.update(*draw(7)).num_observations == 12
    assert isinstance(model.state, gpseq.variational.OnlineState)
    assert model.log_evidence.shape == () and not model.log_evidence.requires_grad


def test_kl_and_q_come_from_the_state() -> None:
    """The strategy's q(v) and KL are those of the dense q(u)."""
    model = stream(9, jitter=0.0)
    x, y = draw(20)
    model.update(x, y)
    basis = functionals(model.features)
    prior = basis.prior(oracle.rbf(1.0), oracle.zero)
    q, _ = oracle.sparse_gp(oracle.rbf(1.0), oracle.zero, basis, x, y, noise_of(model, x))
    strategy = model.variational_strategy
    assert_close(strategy.kl_divergence(), oracle.kl(q, prior), 1e-7)
    lower = torch.linalg.cholesky(prior.covariance)
    v = strategy.variational_distribution
    assert_close(lower @ v.mean, q.mean, 1e-7)
    assert_close(lower @ v.covariance_matrix @ lower.mT, q.covariance, 1e-7)
    assert_close(strategy.prior_distribution.covariance_matrix, torch.eye(9, dtype=F64), 1e-12)


def test_the_stock_elbo_of_all_data_is_the_evidence() -> None:
    """On one basis, GPyTorch's ELBO at the belief of the stream is its running bound, in training mode as well."""
    model = stream(9, jitter=0.0)
    x, y = draw(30)
    for part_x, part_y in zip(x.split(7), y.split(7), strict=True):
        model.update(part_x, part_y)
    elbo = gpytorch.mlls.VariationalELBO(model.likelihood, model, num_data=30)
    for mode in (model.eval, model.train):
        mode()
        with torch.no_grad():
            assert_close(30 * elbo(model(x), y), model.log_evidence, 1e-8)


@pytest.mark.parametrize("value", [torch.arange(4), torch.zeros(4, 2, dtype=F64)])
def test_inputs_that_cannot_be_predicted_at_are_refused(value: Tensor) -> None:
    """An integer tensor would round the posterior to integers; a second column would broadcast."""
    kernel = gpytorch.kernels.PeriodicKernel().double()
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = StreamingGP(HippoFeatures(12, 10.0), kernel, likelihood).eval().update(*draw(20))
    with pytest.raises((TypeError, ValueError), match=r"^x: "):
        model(value)


@given(noise=st.floats(-300, 3), scale=st.floats(-3, 160), num=st.integers(1, 30), order=st.integers(1, 20))
@settings(max_examples=60)
def test_an_update_is_refused_or_leaves_a_model_that_predicts(noise: float, scale: float, num: int, order: int) -> None:
    """Noise variances from 1e-300 and targets up to 1e160."""
    model = stream(order)
    x, y = draw(num)
    before = snapshot(model)
    try:
        model.update(x, y * 10**scale, noise=10**noise)
    except ValueError as error:
        assert str(error).startswith(("y: ", "noise: "))
        assert_identical(model, before)
        return
    with torch.no_grad():
        posterior = model(AT)
        assert posterior.mean.isfinite().all() and variance_of(posterior).isfinite().all()
    assert model.log_evidence.isfinite()

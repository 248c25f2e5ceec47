"""Streams over several inputs: paths in both modes and selected points, against dense oracles."""

import copy
import io
import math
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood
from torch import Tensor

from gpseq.features import HippoFeatures, InducingPoints
from gpseq.features.path import PathFeatures
from gpseq.features.selected import SelectedPoints
from gpseq.models import StreamingGP
from tests import oracles_streaming as oracle
from tests.oracles_streaming import F64, assert_close, assert_identical, snapshot, variance_of

NOISE = 0.1


def kernel_of(d: int = 2, lengthscale: float = 1.2, nu: float | None = None) -> Kernel:
    """With a lengthscale for each column."""
    base = RBFKernel(ard_num_dims=d) if nu is None else MaternKernel(nu, ard_num_dims=d)
    kernel = ScaleKernel(base).double()
    kernel.outputscale = torch.tensor(1.6, dtype=F64)
    kernel.base_kernel.lengthscale = lengthscale * torch.linspace(0.8, 1.5, d, dtype=F64)
    return kernel


def dense_kernel(d: int = 2, lengthscale: float = 1.2) -> oracle.Kernel:
    scale = lengthscale * torch.linspace(0.8, 1.5, d, dtype=F64)
    return lambda a, b: 1.6 * torch.exp(-0.5 * ((a[:, None] - b) / scale).square().sum(-1))


def level(value: float) -> oracle.Mean:
    return lambda t: torch.full((len(t),), value, dtype=F64)


def data(n: int, d: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, d, generator=generator, dtype=F64) * 3 - 1.5
    return x, (1.5 * x).sin().sum(-1) + 0.3 * torch.randn(n, generator=generator, dtype=F64)


def gaussian() -> GaussianLikelihood:
    likelihood = GaussianLikelihood().double()
    likelihood.noise = torch.tensor(NOISE, dtype=F64)
    return likelihood


def model_of(features: Any, kernel: Kernel | None = None, **options: Any) -> StreamingGP:
    likelihood = options.pop("likelihood", None) or gaussian()
    kernel = kernel_of(features.num_dims) if kernel is None else kernel
    return StreamingGP(features, kernel, likelihood, **options).eval()


def random_path(
    M: int = 6, d: int = 2, R: int = 30, seed: int = 0, kernel: Kernel | None = None, **options: Any
) -> PathFeatures:
    generator = torch.Generator().manual_seed(seed)
    kernel = kernel_of(d) if kernel is None else kernel
    return PathFeatures(M, d, mode="rff", kernel=kernel, num_frequencies=R, generator=generator, **options)


def functionals(features: PathFeatures) -> oracle.Functionals:
    return oracle.Functionals(features.nodes(), features.weights())


def noise_like(y: Tensor) -> Tensor:
    return torch.full_like(y, NOISE)


def assert_posterior(model: StreamingGP, expected: oracle.Gaussian, at: Tensor, tolerance: float) -> None:
    with torch.no_grad():
        posterior = model(at)
        assert_close(posterior.mean, expected.mean, tolerance)
        assert_close(posterior.covariance_matrix, expected.covariance, tolerance)


AT = {d: data(9, d, seed=99)[0] * 1.3 for d in (2, 3, 4)}
ORDERINGS: list[dict[str, Any]] = [
    {"ordering": "given"},
    {"ordering": "kernel"},
    {"ordering": "oracle", "key": 1},
    {"ordering": "oracle", "key": lambda x: x.norm(dim=-1)},
    {"ordering": "random"},
]
NAMES = ["given", "kernel", "column", "norm", "random"]


# Paths that are kept


@pytest.mark.parametrize("d", [2, 3, 4])
def test_on_one_path_streaming_is_batch(d: int) -> None:
    """No point joins the path while every is beyond the last of the stream's points."""
    x, y = data(60, d)
    features = PathFeatures(8, d, every=1000)
    walk = data(1000, d, seed=5)[0]
    features = features.following(walk, kernel_of(d))
    assert features.num_points == 1
    features = PathFeatures(8, d).following(walk[:80], kernel_of(d))
    features = copy.copy(features)
    features.every = 10**6  # the path is fixed from here on
    features._num_seen = 80 * 10**6
    model = model_of(features, jitter=1e-13)
    for a, b in zip(x.split(20), y.split(20), strict=True):
        model.update(a, b)
    assert model.features.num_points == 80
    basis = oracle.Functionals(walk[:80], features.weights())
    q, bound = oracle.sparse_gp(dense_kernel(d), level(0.0), basis, x, y, noise_like(y))
    expected = oracle.conditional(dense_kernel(d), level(0.0), basis, q, oracle.at_points(AT[d]))
    assert_posterior(model, expected, AT[d], 1e-6)
    assert_close(model.log_evidence, bound, 1e-6)


@pytest.mark.parametrize("d", [2, 3, 4])
@pytest.mark.parametrize("options", ORDERINGS, ids=NAMES)
@pytest.mark.parametrize("every", [1, 3])
def test_a_kept_path_is_the_dense_stream(d: int, options: dict[str, Any], every: int) -> None:
    """Four terms with u = weights f(nodes), whatever the order, and with points that are passed over."""
    x, y = data(66, d)
    mean = gpytorch.means.ConstantMean().double()
    mean.constant.data.fill_(0.7)
    model = model_of(PathFeatures(6, d, every=every, **options), mean_module=mean, jitter=1e-13)
    dense: oracle.DenseStream | None = None
    for a, b in zip(x.split([30, 1, 20, 15]), y.split([30, 1, 20, 15]), strict=True):
        model.update(a, b)
        basis = functionals(model.features)
        dense = dense or oracle.DenseStream(dense_kernel(d), basis, level(0.7))
        dense.update(a, b, noise_like(b), basis=basis)
    assert dense is not None
    assert model.features.num_points == 66 // every
    on_path = {tuple(row) for row in model.features.nodes().tolist()}
    assert on_path <= {tuple(row) for row in x.tolist()} and len(on_path) == 66 // every
    assert_posterior(model, dense.predict(AT[d]), AT[d], 1e-6)
    assert_close(model.log_evidence, dense.evidence, 1e-5)


@pytest.mark.parametrize("d", [2, 3])
def test_variances_stay_between_zero_and_the_prior(d: int) -> None:
    x, y = data(120, d)
    model = model_of(PathFeatures(20, d, ordering="kernel"))
    for a, b in zip(x.split(30), y.split(30), strict=True):
        model.update(a, b)
        with torch.no_grad():
            posterior = model(torch.cat([x, 50 * AT[d]]))
            variance = variance_of(posterior)
        assert bool(posterior.mean.isfinite().all())
        assert bool((variance > 0).all()) and bool((variance <= 1.6 + 1e-9).all())
        assert_close(posterior.mean[-9:], torch.zeros(9, dtype=F64), 1e-6)


def test_more_features_than_points_are_the_exact_gp() -> None:
    """In one chunk: the weights of a short path can be inverted."""
    x, y = data(12)
    model = model_of(PathFeatures(12, 2, ordering="kernel"), jitter=1e-14).update(x, y)
    expected = oracle.exact_gp(dense_kernel(), level(0.0), x, y, noise_like(y), AT[2])
    assert_posterior(model, expected, AT[2], 1e-4)
    exact = oracle.exact_evidence(dense_kernel(), level(0.0), x, y, noise_like(y))
    assert model.log_evidence.item() == pytest.approx(exact.item(), abs=1e-3)


@pytest.mark.parametrize("mode", ["keep", "rff"])
def test_before_any_data_there_is_the_prior(mode: str) -> None:
    model = model_of(PathFeatures(6, 2) if mode == "keep" else random_path(R=2000))
    with torch.no_grad():
        posterior = model(AT[2])
        tolerance = 1e-6 if mode == "keep" else 0.15
        assert_close(posterior.mean, torch.zeros(9, dtype=F64), 1e-12)
        assert_close(posterior.covariance_matrix, dense_kernel()(AT[2], AT[2]), tolerance)
        assert_close(variance_of(posterior), torch.full((9,), 1.6, dtype=F64), 1e-6)


def test_a_path_learns_what_lies_near_it() -> None:
    x, y = data(200, seed=3)
    for features in (PathFeatures(40, 2, ordering="kernel"), random_path(40, R=400, ordering="kernel")):
        model = model_of(features)
        for a, b in zip(x.split(100), y.split(100), strict=True):
            model.update(a, b)
        with torch.no_grad():
            at = data(50, seed=4)[0]
            error = (model(at).mean - (1.5 * at).sin().sum(-1)).square().mean().sqrt()
        assert error < 0.35


# Random features


def dense_psi(features: PathFeatures) -> oracle.Kernel:
    psi = features.embedding
    assert psi is not None
    return lambda a, b: psi(a) @ psi(b).mT


@pytest.mark.parametrize("d", [2, 3, 4])
@pytest.mark.parametrize("nu", [None, 1.5])
def test_a_summarised_path_is_the_dense_stream_of_the_finite_model(d: int, nu: float | None) -> None:
    x, y = data(66, d)
    features, kept = random_path(6, d, kernel=kernel_of(d, nu=nu)), PathFeatures(6, d)
    model = model_of(features, kernel_of(d, nu=nu), jitter=1e-13)
    dense: oracle.DenseStream | None = None
    for a, b in zip(x.split([30, 1, 20, 15]), y.split([30, 1, 20, 15]), strict=True):
        model.update(a, b)
        kept = kept.following(a, kernel_of(d))
        basis = functionals(kept)
        dense = dense or oracle.DenseStream(dense_psi(features), basis, level(0.0))
        dense.update(a, b, noise_like(b), basis=basis)
    assert dense is not None
    assert_posterior(model, dense.predict(AT[d]), AT[d], 1e-6)
    assert_close(model.log_evidence, dense.evidence, 1e-5)


def test_enough_features_are_bayesian_linear_regression() -> None:
    """M above the number of weights of f: nothing is lost at any change of basis."""
    features = random_path(24, 2, R=5)
    x, y = data(120)
    mean = gpytorch.means.ConstantMean().double()
    mean.constant.data.fill_(-0.4)
    model = model_of(features, mean_module=mean, jitter=1e-13)
    for a, b in zip(x.split(40), y.split(40), strict=True):
        model.update(a, b)
    psi = features.embedding
    assert psi is not None
    precision = torch.eye(10, dtype=F64) + psi(x).mT @ psi(x) / NOISE
    weights = torch.linalg.solve(precision, psi(x).mT @ (y + 0.4) / NOISE)
    at = psi(AT[2])
    expected = oracle.Gaussian(at @ weights - 0.4, at @ torch.linalg.solve(precision, at.mT))
    assert_posterior(model, expected, AT[2], 1e-4)
    evidence = oracle.exact_evidence(dense_psi(features), level(-0.4), x, y, noise_like(y))
    assert model.log_evidence.item() == pytest.approx(evidence.item(), abs=1e-2)


def test_covariances_of_a_summarised_path_are_positive() -> None:
    model = model_of(random_path(12, R=40, ordering="random"))
    for seed in range(5):
        model.update(*data(20, seed=seed))
        at = data(60, seed=77)[0]
        with torch.no_grad():
            covariance = model(at).covariance_matrix
        assert torch.linalg.eigvalsh(covariance).min() > -1e-9
        assert bool((covariance.diagonal() <= 1.6 + 1e-9).all())


def test_the_memory_of_a_summarised_path_does_not_grow() -> None:
    model = model_of(random_path(10, R=30))
    sizes = set()
    for seed in range(60):
        model.update(*data(5, seed=seed))
        sizes.add(sum(value.numel() for value in model.state_dict().values()))
    assert len(sizes) == 1
    assert model.features.num_points == model.num_observations == 300
    with torch.no_grad():
        assert bool(model(AT[2]).mean.isfinite().all())


@pytest.mark.parametrize("how", ["lengthscale", "outputscale", "before data"])
def test_hyperparameters_that_change_under_random_features_are_refused(how: str) -> None:
    x, y = data(30)
    model = model_of(random_path())
    if how != "before data":
        model.update(x, y)
    before = {name: value for name, value in snapshot(model).items() if "raw_" not in name}
    with torch.no_grad():
        reference = model(AT[2]).mean
    kept = snapshot(model.covar_module)
    if how == "outputscale":
        model.covar_module.outputscale = 3.0
    else:
        model.covar_module.base_kernel.lengthscale = 3.0
    for call in (
        lambda: model.update(x, y),
        lambda: model(AT[2]),
        lambda: model.condition_on_observations(x, y),
        lambda: model.residual_variance(x),
    ):
        with pytest.raises(ValueError, match=r"^covar_module: kernel or mean have changed"):
            call()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
    model.covar_module.load_state_dict(kept)
    with torch.no_grad():
        assert torch.equal(model(AT[2]).mean, reference)
    model.update(x, y)


def test_features_drawn_for_another_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^(features|covar_module): "):
        model_of(random_path(kernel=kernel_of(lengthscale=0.1)), kernel_of(lengthscale=5.0))


def test_fitting_hyperparameters_under_random_features_is_refused_or_harmless() -> None:
    x, y = data(30)
    model = model_of(random_path()).update(x, y)
    try:
        model.fit_hyperparameters(x, y, num_starts=1, max_iterations=3)
    except ValueError:
        pass
    model.update(x, y)


def test_a_cast_is_no_change_of_the_kernel() -> None:
    x, y = data(30)
    model = model_of(random_path()).update(x, y).float()
    model.update(x.float(), y.float())


def test_only_the_noise_may_move_under_random_features() -> None:
    x, y = data(30)
    model = model_of(random_path()).update(x, y)
    model.likelihood.noise = 0.5
    model.update(x, y)
    assert model.num_observations == 60


# Physical times


def timed(times: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    x, y = data(len(times), seed=seed)
    x[:, 0] = torch.tensor(times, dtype=F64)
    return x, y


@pytest.mark.parametrize("times", [[2.5, 5.0], [6.0, 5.0], [3.0, 4.0], [-1.0, 4.0], [4.0, 4.0]])
def test_times_out_of_order_are_refused_where_the_past_is_gone(times: list[float]) -> None:
    model = model_of(random_path(4, time_dim=0)).update(*timed([1.0, 2.0, 3.0]))
    before, features = snapshot(model), model.features
    with pytest.raises(ValueError, match=r"^x: "):
        model.update(*timed(times))
    assert_identical(model, before)
    assert model.features is features
    model.update(*timed([3.5, 4.0]))
    assert model.num_observations == 5


def test_late_times_are_sorted_into_a_kept_path() -> None:
    x, y = timed([1.0, 2.0, 4.0, 5.0, 3.0, 6.0])
    model = model_of(PathFeatures(4, 2, time_dim=0), jitter=1e-13)
    dense: oracle.DenseStream | None = None
    for a, b in zip(x.split([4, 2]), y.split([4, 2]), strict=True):
        model.update(a, b)
        basis = functionals(model.features)
        dense = dense or oracle.DenseStream(dense_kernel(), basis, level(0.0))
        dense.update(a, b, noise_like(b), basis=basis)
    assert dense is not None
    assert model.features.nodes()[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert_posterior(model, dense.predict(AT[2]), AT[2], 1e-6)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^x: expected times in column 0 that differ"):
        model.update(*timed([2.0]))
    assert_identical(model, before)


# Other bases


def test_random_features_and_others_do_not_mix() -> None:
    x, y = data(30)
    for first, second in (
        (random_path(), PathFeatures(6, 2)),
        (random_path(), InducingPoints(x[:5])),
        (PathFeatures(6, 2), random_path()),
        (InducingPoints(x[:5]), random_path()),
    ):
        model = model_of(first).update(x, y)
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"^features: "):
            model.rebase(second)
        assert_identical(model, before)


def test_other_random_features_are_refused() -> None:
    x, y = data(30)
    model = model_of(random_path()).update(x, y)
    with pytest.raises(ValueError, match=r"^features: "):
        model.rebase(random_path(seed=1).following(x, kernel_of()))


def test_a_kept_path_may_become_points_and_back() -> None:
    x, y = data(30)
    model = model_of(PathFeatures(30, 2, ordering="kernel")).update(x, y)
    with torch.no_grad():
        before = model(x).mean
        model.rebase(InducingPoints(x))
        assert (model(x).mean - before).abs().max() < 0.05
    model.rebase(PathFeatures(30, 2, ordering="kernel").following(x, kernel_of()))
    with torch.no_grad():
        assert (model(x).mean - before).abs().max() < 0.05


@pytest.mark.parametrize("d", [2, 3, 4])
def test_selected_points_are_the_dense_stream(d: int) -> None:
    x, y = data(60, d)
    model = model_of(SelectedPoints(8, d), jitter=1e-13, transfer="vfe")
    dense: oracle.DenseStream | None = None
    seen = torch.zeros(0, d, dtype=F64)
    for a, b in zip(x.split(20), y.split(20), strict=True):
        model.update(a, b)
        seen = torch.cat([seen, a])
        points = model.features.nodes()
        assert len(points) == 8
        assert all(any(torch.equal(p, s) for s in seen) for p in points)
        basis = oracle.at_points(points)
        dense = dense or oracle.DenseStream(dense_kernel(d), basis, level(0.0))
        dense.update(a, b, noise_like(b), basis=basis)
    assert dense is not None
    assert_posterior(model, dense.predict(AT[d]), AT[d], 1e-6)
    assert_close(model.log_evidence, dense.evidence, 1e-5)


def test_selected_points_that_hold_everything_are_the_exact_gp() -> None:
    x, y = data(30)
    model = model_of(SelectedPoints(30, 2, tolerance=1e-14), jitter=1e-12)
    for a, b in zip(x.split(10), y.split(10), strict=True):
        model.update(a, b)
    expected = oracle.exact_gp(dense_kernel(), level(0.0), x, y, noise_like(y), AT[2])
    assert_posterior(model, expected, AT[2], 1e-4)


# Other likelihoods and other methods


def moons(n: int = 120, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    angle = math.pi * torch.rand(n, generator=generator, dtype=F64)
    labels = (torch.rand(n, generator=generator, dtype=F64) > 0.5).double()
    upper = torch.stack([angle.cos(), angle.sin()], dim=-1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=-1)
    x = torch.where(labels[:, None] > 0, lower, upper)
    return x + 0.08 * torch.randn(n, 2, generator=generator, dtype=F64), labels


@pytest.mark.parametrize("mode", ["keep", "rff"])
@pytest.mark.parametrize("ordering", ["kernel", "random"])
def test_two_moons_that_arrive_one_part_after_another(mode: str, ordering: str) -> None:
    x, labels = moons()
    by_column = x[:, 0].argsort()
    x, labels = x[by_column], labels[by_column]
    kernel = ScaleKernel(RBFKernel()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 0.6, 4.0
    features = PathFeatures(25, 2, ordering=ordering)
    if mode == "rff":
        features = PathFeatures(25, 2, mode="rff", kernel=kernel, num_frequencies=300, ordering=ordering)
    model = model_of(features, kernel, likelihood=BernoulliLikelihood())
    for a, b in zip(x.split(40), labels.split(40), strict=True):
        model.update(a, b)
    test, truth = moons(seed=1)
    with torch.no_grad():
        predicted = (model(test).mean > 0).double()
    assert (predicted == truth).double().mean() > 0.93


@pytest.mark.parametrize("mode", ["keep", "rff"])
def test_residual_variance(mode: str) -> None:
    x, y = data(60)
    model = model_of(PathFeatures(20, 2) if mode == "keep" else random_path(20, R=100))
    model.update(x, y)
    residual = model.residual_variance(torch.cat([x, 100 + x]))
    assert residual.shape == (120,) and bool((residual >= 0).all()) and bool((residual <= 1).all())
    assert residual[:60].mean() < 0.9
    if mode == "keep":
        assert residual[60:].min() > 0.999
        assert model.residual_variance().item() == pytest.approx(residual[:60].mean().item(), abs=1e-9)
    else:
        with pytest.raises(ValueError, match=r"^x: PathFeatures have no horizon"):
            model.residual_variance()


@pytest.mark.parametrize("mode", ["keep", "rff"])
@pytest.mark.parametrize("extend", [False, True])
def test_conditioning_on_a_path(mode: str, extend: bool) -> None:
    x, y = data(60)
    model = model_of(PathFeatures(8, 2) if mode == "keep" else random_path(8)).update(x[:30], y[:30])
    before, features = snapshot(model), model.features
    new = model.condition_on_observations(x[30:], y[30:], extend_horizon=extend)
    assert_identical(model, before)
    assert model.features is features
    assert new.features.num_points == (60 if extend else 30) and new.num_observations == 60
    if extend:
        assert_identical(model.update(x[30:], y[30:]), snapshot(new))
    else:
        twice = model.condition_on_observations(x[30:45], y[30:45]).condition_on_observations(x[45:], y[45:])
        with torch.no_grad():
            assert_close(twice(AT[2]).mean, new(AT[2]).mean, 1e-8)


@pytest.mark.parametrize("mode", ["keep", "rff"])
@pytest.mark.parametrize("how", ["saved", "copied"])
def test_a_path_goes_on_identically(mode: str, how: str) -> None:
    x, y = data(90)

    def fresh(seed: int = 0) -> StreamingGP:
        if mode == "keep":
            return model_of(PathFeatures(8, 2, ordering="kernel", every=2))
        return model_of(random_path(8, seed=seed, ordering="kernel", every=2))

    model = fresh()
    for a, b in zip(x[:60].split(15), y[:60].split(15), strict=True):
        model.update(a, b)
    if how == "saved":
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other = fresh(seed=5)  # other frequencies until the saved ones are loaded
        other.load_state_dict(torch.load(buffer))
    else:
        other = copy.deepcopy(model)
    before = snapshot(other)
    assert_identical(model, before)
    model.update(x[60:], y[60:])
    assert_identical(other, before)
    other.update(x[60:], y[60:])
    for name, value in snapshot(model).items():
        assert_close(other.state_dict()[name], value, 1e-12)
    with torch.no_grad():
        assert_close(other(AT[2]).mean, model(AT[2]).mean, 1e-10)


@pytest.mark.parametrize("mode", ["keep", "rff"])
def test_a_failing_update_leaves_a_path_alone(mode: str) -> None:
    x, y = data(30)
    model = model_of(PathFeatures(8, 2) if mode == "keep" else random_path(8)).update(x, y)
    before, features = snapshot(model), model.features
    for bad in ((x, y * math.nan), (x * math.inf, y), (x, y * 1e200), (x[:, :1], y)):
        with pytest.raises(ValueError, match=r"^(x|y): "):
            model.update(*bad)
        assert_identical(model, before)
        assert model.features is features


def test_skipped_targets_do_not_join_the_path() -> None:
    x, y = data(40)
    gaps = y.clone()
    gaps[::4] = math.nan
    model = model_of(PathFeatures(8, 2)).update(x, gaps, missing="skip")
    other = model_of(PathFeatures(8, 2)).update(x[~gaps.isnan()], y[~gaps.isnan()])
    assert torch.equal(model.features.nodes(), other.features.nodes())
    with torch.no_grad():
        assert_close(model(AT[2]).mean, other(AT[2]).mean, 1e-9)


def test_a_batch_of_kernels_shares_a_path() -> None:
    x, y = data(40)
    kernel = ScaleKernel(RBFKernel(batch_shape=torch.Size([2])), batch_shape=torch.Size([2])).double()
    kernel.base_kernel.lengthscale = torch.tensor([0.8, 2.0], dtype=F64)[:, None, None]
    model = model_of(PathFeatures(8, 2), kernel)
    for a, b in zip(x.split(20), y.split(20), strict=True):
        model.update(a, torch.stack([b, -b]))
    for i, (lengthscale, sign) in enumerate(((0.8, 1), (2.0, -1))):
        alone = ScaleKernel(RBFKernel()).double()
        alone.base_kernel.lengthscale = torch.tensor(lengthscale, dtype=F64)
        single = model_of(PathFeatures(8, 2), alone)
        for a, b in zip(x.split(20), y.split(20), strict=True):
            single.update(a, sign * b)
        with torch.no_grad():
            assert_close(model(AT[2]).mean[i], single(AT[2]).mean, 1e-8)


def test_what_only_time_can_do_is_refused() -> None:
    x, y = data(20)
    model = model_of(PathFeatures(8, 2)).update(x, y)
    with pytest.raises(ValueError, match=r"^features: only HippoFeatures"):
        model.reconstruct(x)
    with pytest.raises(ValueError, match=r"^max_features: only HippoFeatures"):
        model_of(PathFeatures(8, 2), max_features=20)
    assert not isinstance(model.features, HippoFeatures)


@pytest.mark.parametrize(
    "kernel",
    [
        gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=1.5)),
        gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(active_dims=[1])),
    ],
)
def test_random_features_of_another_kind_of_kernel_are_refused(kernel: gpytorch.kernels.Kernel) -> None:
    drawn_for = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
    features = PathFeatures(8, 2, mode="rff", kernel=drawn_for, num_frequencies=20)
    with pytest.raises(ValueError, match=r"^covar_module: expected the kernel that the random features"):
        StreamingGP(features, kernel, gpytorch.likelihoods.GaussianLikelihood())


def test_the_first_fantasies_of_a_path_lie_on_it() -> None:
    x, y = data(30)
    fresh = model_of(PathFeatures(12, 2))
    child = fresh.condition_on_observations(x, y)
    assert_close(child(x).mean, model_of(PathFeatures(12, 2)).update(x, y)(x).mean, 1e-9)
    assert fresh.features.num_points == 0

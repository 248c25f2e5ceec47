"""SelectedPoints against a search by brute force, and in streams."""

import io

import gpytorch
import pytest
import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from torch import Tensor

from gpseq.features import InducingPoints, SelectedPoints
from gpseq.features.base import evaluate
from gpseq.features.selected import select_points
from gpseq.models import StreamingGP
from tests import oracles_streaming as oracle
from tests.oracles_streaming import F64, assert_close, draw, gpytorch_kernel, stream


def scattered(n: int, d: int = 1, seed: int = 0, scale: float = 5.0) -> Tensor:
    return scale * torch.rand(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed))


def greedy(kernel: Kernel, candidates: Tensor, num_points: int) -> list[int]:
    """The same choice by conditioning anew each time."""
    with torch.no_grad():
        K = evaluate(kernel, candidates, candidates)
    chosen: list[int] = []
    while len(chosen) < num_points:
        rest = K.diagonal().clone()
        if chosen:
            rest -= (K[:, chosen] * torch.linalg.solve(K[chosen][:, chosen], K[:, chosen].mT).mT).sum(-1)
            rest[chosen] = -1.0
        chosen.append(int(rest.argmax()))
    return chosen


KERNELS = {
    "rbf": lambda: gpytorch_kernel(0.7, 2.0),
    "matern": lambda: gpytorch_kernel(1.0, nu=0.5),
    "not stationary": lambda: (ScaleKernel(RBFKernel()) * gpytorch.kernels.LinearKernel()).double(),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force(kernel: str, d: int, seed: int) -> None:
    candidates = scattered(40, d, seed)
    candidates[0] *= 0.999  # stationary kernels leave the first choice open: the first of all equal ones
    made = KERNELS[kernel]()
    assert select_points(made, candidates, 7).tolist() == greedy(made, candidates, 7)


def test_each_choice_matters() -> None:
    """The variance that is left falls with every point, and one more is always the largest that is left."""
    kernel, candidates = MaternKernel(1.5).double(), scattered(60)
    with torch.no_grad():
        K = evaluate(kernel, candidates, candidates)
    order = select_points(kernel, candidates, 20)
    assert len(order.unique()) == 20
    left = K.diagonal()
    for m in range(1, 20):
        z = order[:m]
        left_now = K.diagonal() - (K[:, z] * torch.linalg.solve(K[z][:, z], K[:, z].mT).mT).sum(-1)
        assert (left_now <= left + 1e-12).all()
        assert left_now[order[m]] >= left_now.max() - 1e-10
        left = left_now


def test_duplicates_are_chosen_once() -> None:
    x = torch.tensor([1.0, 1.0, 3.0, 1.0, 3.0, 7.0, 7.0], dtype=F64)[:, None]
    features = SelectedPoints(6).following(x, RBFKernel().double())
    assert features.points[:, 0].sort().values.tolist() == [1.0, 3.0, 7.0]
    assert features.num_points == 6
    assert features.following(x, RBFKernel().double()) is features
    more = features.following(torch.tensor([[0.0], [12.0]], dtype=F64), RBFKernel().double())
    assert more.points[:, 0].sort().values.tolist() == [0.0, 1.0, 3.0, 7.0, 12.0]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_inputs_than_points(n: int) -> None:
    x = scattered(n)
    for size in (n, n + 4):
        features = SelectedPoints(size).following(x, RBFKernel().double())
        assert features.num_features == n
        assert features.points.sort(0).values.tolist() == x.sort(0).values.tolist()


def test_nearly_equal_inputs_do_not_break_the_factorisation() -> None:
    x = torch.cat([scattered(5), scattered(5) + 1e-9, scattered(5)])
    features = SelectedPoints(15).following(x, RBFKernel().double())
    assert features.num_features == 5
    factor = torch.linalg.cholesky(features.kuu(RBFKernel().double()).to_dense())
    assert factor.isfinite().all()


def test_arguments() -> None:
    assert SelectedPoints(3, 2).nodes().shape == (1, 2)
    given = SelectedPoints(3, points=torch.tensor([1.0, 2.0]))
    assert given.nodes().dtype == F64 and given.num_features == 2
    # Given points are candidates; a placeholder is none.
    far = torch.tensor([[50.0]], dtype=F64)
    assert given.following(far, RBFKernel()).num_features == 3
    assert SelectedPoints(3).following(far, RBFKernel()).points.tolist() == [[50.0]]
    assert given.following(torch.zeros(0, 1, dtype=F64), RBFKernel()) is given
    for arguments, error, name in (
        ({"num_points": 0}, ValueError, "num_points"),
        ({"num_points": 2.5}, TypeError, "num_points"),
        ({"num_points": 3, "num_dims": 0}, ValueError, "num_dims"),
        ({"num_points": 3, "points": torch.zeros(4, 1)}, ValueError, r"points: .*at most 3 .*got \(4, 1\)"),
        ({"num_points": 3, "points": torch.zeros(2, 2)}, ValueError, r"points: .*\(m, 1\), got \(2, 2\)"),
        ({"num_points": 3, "points": torch.zeros(2, 2, 1)}, ValueError, "points: "),
        ({"num_points": 3, "points": torch.zeros(2, dtype=torch.long)}, TypeError, "points: "),
        ({"num_points": 3, "points": torch.tensor([0.0, float("nan")])}, ValueError, "points: "),
        ({"num_points": 3, "tolerance": 0.0}, ValueError, "tolerance: "),
        ({"num_points": 3, "tolerance": float("nan")}, ValueError, "tolerance: "),
    ):
        with pytest.raises(error, match=name):
            SelectedPoints(**arguments)


def test_float32_inputs(dtype: torch.dtype) -> None:
    x, y = draw(60)
    model = stream(SelectedPoints(12), dtype=dtype)
    for a, b in zip(x.to(dtype).split(20), y.to(dtype).split(20), strict=True):
        model.update(a, b)
    assert model.features.points.dtype == F64 and model.features.num_features == 12
    assert model(x.to(dtype)).mean.dtype == dtype
    # Each point is one of the inputs, to the last bit.
    assert torch.isin(model.features.points[:, 0], x.to(dtype).double()).all()


@pytest.mark.parametrize("d", [1, 2])
def test_a_stream_is_a_rebase_by_hand(d: int) -> None:
    kernel = gpytorch_kernel(1.0)
    model, by_hand = stream(SelectedPoints(10, d)), stream(InducingPoints(torch.zeros(1, d, dtype=F64)), transfer="adf")
    candidates = torch.zeros(0, d, dtype=F64)
    for seed in range(4):
        x = scattered(8, d, seed)
        y = x.sum(-1).sin()
        candidates = torch.cat([candidates, x])
        candidates = candidates[greedy(kernel, candidates, min(10, len(candidates)))]
        by_hand.rebase(InducingPoints(candidates)).update(x, y)
        model.update(x, y)
        assert torch.equal(model.features.points, candidates)
        assert_close(model.log_evidence, by_hand.log_evidence, 1e-9)
    at = scattered(9, d, 99)
    assert_close(model(at).mean, by_hand(at).mean, 1e-9)
    assert_close(model(at).covariance_matrix, by_hand(at).covariance_matrix, 1e-9)


def test_the_number_of_points_grows_to_its_limit() -> None:
    model, sizes = stream(SelectedPoints(12), lengthscale=0.1), []
    for i in range(10):
        x, y = draw(3, i + 1.0, float(i), seed=i)
        model.update(x, y)
        sizes.append(model.features.num_features)
    assert sizes[:4] == [3, 6, 9, 12] and set(sizes[3:]) == {12}
    assert model.state.num_features == 12


def test_enough_points_are_the_exact_gp() -> None:
    x, y = draw(30)
    model = stream(SelectedPoints(30), jitter=1e-12)
    for a, b in zip(x.split(6), y.split(6), strict=True):
        model.update(a, b)
    at = torch.linspace(-1, 11, 25, dtype=F64)
    expected = oracle.exact_gp(oracle.rbf(), oracle.zero, x, y, torch.full_like(x, 0.1), at)
    oracle.assert_posterior(model, expected, at, 1e-4)


def test_an_update_that_raises_leaves_the_points() -> None:
    model = stream(SelectedPoints(5))
    model.update(*draw(10))
    before = oracle.snapshot(model)
    with pytest.raises(ValueError, match="y: "):
        model.update(torch.tensor([3.0], dtype=F64), torch.tensor([1e200], dtype=F64))
    oracle.assert_identical(model, before)


def test_missing_targets_choose_too() -> None:
    """A point without a target at any output is no candidate problem: the posterior is that of the others."""
    x, y = draw(12)
    y[3] = torch.nan
    model = stream(SelectedPoints(12))
    model.update(x, y, missing="skip")
    assert model.num_observations == 11
    at = torch.linspace(0, 10, 7, dtype=F64)
    keep = ~y.isnan()
    expected = oracle.exact_gp(oracle.rbf(), oracle.zero, x[keep], y[keep], torch.full_like(x[keep], 0.1), at)
    oracle.assert_posterior(model, expected, at, 1e-4)


@pytest.mark.parametrize("other", [SelectedPoints(8), SelectedPoints(8, points=torch.linspace(0, 1, 5, dtype=F64))])
def test_save_and_load_into_a_model_with_another_number_of_points(other: SelectedPoints) -> None:
    model = stream(SelectedPoints(8))
    for i in range(2):
        model.update(*draw(3, i + 1.0, float(i), seed=i))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = stream(other)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    oracle.assert_identical(fresh, oracle.snapshot(model))
    x, y = draw(6, 4.0, 2.0, seed=5)
    for m in (model, fresh):
        m.update(x, y)
    assert model.features.num_features == 8
    assert torch.equal(fresh.features.points, model.features.points)
    assert_close(fresh(x).mean, model(x).mean, 1e-12)
    assert_close(fresh(x).covariance_matrix, model(x).covariance_matrix, 1e-12)
    # Back to a state that has seen nothing: its placeholder is one again.
    model.load_state_dict(stream(SelectedPoints(8)).state_dict())
    model.update(torch.tensor([30.0, 32.0], dtype=F64), torch.zeros(2, dtype=F64))
    assert model.features.points[:, 0].sort().values.tolist() == [30.0, 32.0]


def test_fantasies_may_choose() -> None:
    model = stream(SelectedPoints(6))
    model.update(*draw(4, 3.0))
    before = oracle.snapshot(model)
    x, y = draw(3, 9.0, 6.0)
    new = model.condition_on_observations(x, y, extend_horizon=True)
    assert isinstance(new, StreamingGP) and new.features.num_features == 6
    assert model.condition_on_observations(x, y).features.num_features == 4
    oracle.assert_identical(model, before)


def test_a_batch_of_kernels_is_refused_by_name() -> None:
    model = stream(SelectedPoints(4), batch_shape=(2,))
    with pytest.raises(ValueError, match=r"kernel|covar_module|batch"):
        model.update(*draw(9))

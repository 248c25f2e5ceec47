"""Features along a path: weights against numpy, both modes against each other, and everything that goes wrong."""

import io
import math
import warnings
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from gpytorch.kernels import Kernel, MaternKernel, PeriodicKernel, RBFKernel, ScaleKernel
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import legendre
from torch import Tensor

from gpseq.features import HippoFeatures, InducingPoints, orderings
from gpseq.features.path import MODES, SCHEMES, PathFeatures, path_step
from gpseq.features.random_features import RandomFeatures

F64 = torch.float64

gaps = st.lists(st.floats(0.05, 3.0), min_size=1, max_size=25)


# Oracles, which share nothing with the package


def cell_weights(order: int, times: np.ndarray) -> np.ndarray:
    """The integrals of the orthonormal polynomials over the cells that end at these times, by numpy."""
    edges = 2 * np.concatenate([[0.0], times]) / times[-1] - 1
    rows = []
    for m in range(order):
        integral = legendre.legint(np.eye(order)[m])
        rows.append(math.sqrt(2 * m + 1) / 2 * np.diff(legendre.legval(edges, integral)))
    return np.stack(rows)


def recurrence(order: int, times: np.ndarray, scheme: str) -> np.ndarray:
    """The published recurrences as they are printed, for signals that are one at one point and zero elsewhere."""
    n = np.arange(order)
    root = np.sqrt(2 * n + 1)
    a = np.where(n[:, None] > n, -np.outer(root, root), 0.0) - np.diag(n + 1.0)
    share = {"midpoint": 0.5, "bilinear": 0.5, "backward": 1.0, "euler": 0.0}[scheme]
    c, before = np.zeros((order, len(times))), 0.0  # a column for each of the signals
    if scheme == "midpoint":
        c[0, 0] = 1.0
    for signals, time in zip(np.eye(len(times)), times, strict=True):
        rate = (time - before) / ((time + before) / 2 if scheme == "midpoint" else time)
        right = c + (1 - share) * rate * a @ c + rate * np.outer(root, signals)
        c, before = np.linalg.solve(np.eye(order) - share * rate * a, right), time
    return c


def oracle_weights(order: int, times: Any, scheme: str) -> Tensor:
    times = np.asarray(times, dtype=float)
    return torch.from_numpy(
        cell_weights(order, times) if scheme in ("exact", "zoh") else recurrence(order, times, scheme)
    )


# Helpers


def make(num_features: int = 5, num_dims: int = 2, **options: Any) -> PathFeatures:
    """Features in any mode; the warning of the Euler scheme is known."""
    if options.get("mode") == "rff":
        options = {"kernel": kernel_of(), "num_frequencies": 30} | options
    options["paper"] = options.get("scheme") == "euler"
    with warnings.catch_warnings():
        if options["paper"]:
            warnings.simplefilter("ignore")
        return PathFeatures(num_features, num_dims, **options)


def kernel_of(lengthscale: float = 0.6) -> Kernel:
    kernel = ScaleKernel(RBFKernel()).double()
    kernel.outputscale, kernel.base_kernel.lengthscale = 1.7, lengthscale
    return kernel


def points(n: int, seed: int = 0, d: int = 2) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


def timed(times: Any, d: int = 2) -> Tensor:
    """Points with times in column 0."""
    times = torch.as_tensor(times, dtype=F64)
    return torch.cat([times[:, None], points(len(times), 1, d - 1)], dim=-1)


def psi(features: PathFeatures) -> RandomFeatures:
    assert features.embedding is not None
    return features.embedding


def fed(features: PathFeatures, *chunks: Tensor) -> PathFeatures:
    for chunk in chunks:
        features = features.following(chunk, KERNEL)
    return features


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


KERNEL = kernel_of()
both_modes = pytest.mark.parametrize("mode", MODES)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


# Weights


@every_scheme
@given(gaps=gaps, order=st.integers(1, 6), cut=st.integers(0, 25))
def test_weights_for_irregular_times_are_those_of_the_oracle(
    scheme: str, gaps: list[float], order: int, cut: int
) -> None:
    times = np.cumsum(gaps)
    x = timed(times)
    expected = oracle_weights(order, times, scheme)
    features = make(order, scheme=scheme, time_dim=0)
    near(fed(features, x).weights(), expected)
    near(fed(features, x[:cut], x[cut:]).weights(), expected)
    assert torch.equal(fed(features, x[:cut], x[cut:]).nodes(), x)


@every_scheme
@pytest.mark.parametrize("order", [1, 8])
def test_weights_for_pseudo_time_know_neither_the_step_nor_the_chunks(scheme: str, order: int) -> None:
    x = points(150)  # more than a block of a recurrence
    expected = oracle_weights(order, np.arange(1, 151), scheme)
    for step in (1.0, 0.01, 7.3):
        near(fed(make(order, scheme=scheme, step=step), x).weights(), expected)
    chunks = fed(make(order, scheme=scheme), *x.split([1, 2, 40, 0, 107]))
    near(chunks.weights(), expected)
    assert torch.equal(chunks.nodes(), x)
    assert chunks.num_points == 150 and chunks.elapsed == 150.0


def test_weights_over_many_blocks_are_still_the_integrals() -> None:
    near(fed(make(6), points(5000)).weights(), oracle_weights(6, np.arange(1, 5001), "exact"))


@every_scheme
@both_modes
def test_the_first_points_weigh_what_they_must(scheme: str, mode: str) -> None:
    features = make(3, scheme=scheme, mode=mode)
    one = fed(features, points(1))
    weights = oracle_weights(3, [1.0], scheme)
    expected = weights if mode == "keep" else weights @ psi(features)(points(1))
    near(one.weights(), expected)
    if scheme in ("exact", "zoh", "midpoint"):  # these know that a single point is a constant function
        near(weights, torch.tensor([[1.0], [0.0], [0.0]], dtype=F64))


@every_scheme
@pytest.mark.parametrize("every", [1, 3, 7])
@given(sizes=st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_every_so_many_points_one_joins(scheme: str, every: int, sizes: list[int]) -> None:
    x = points(sum(sizes))
    for mode in MODES:
        features = fed(make(4, scheme=scheme, every=every, mode=mode, step=0.5), *x.split(sizes))
        kept = x[every - 1 :: every]
        assert features.num_points == len(kept)
        assert features.elapsed == 0.5 * every * len(kept)
        sparse = fed(make(4, scheme=scheme), kept)
        if mode == "keep":
            near(features.weights(), sparse.weights())
            assert torch.equal(features.nodes(), sparse.nodes())
        elif len(kept):
            near(features.weights(), sparse.weights() @ psi(features)(kept))


@pytest.mark.parametrize(
    ("scheme", "off"),
    [
        ("exact", 3.8e-2),
        ("midpoint", 9.8e-3),
        ("bilinear", 9.2e-2),
        ("backward", 0.65),
        ("euler", 1.56),
        ("zoh", 3.8e-2),
    ],
)
def test_weights_are_nearly_orthonormal(scheme: str, off: float) -> None:
    def gram(n: int) -> Tensor:
        weights = fed(make(8, scheme=scheme), points(n)).weights()
        return n * weights @ weights.mT

    difference = (gram(60) - torch.eye(8, dtype=F64)).abs().max()
    assert 0.97 * off < difference <= off
    assert (gram(960) - torch.eye(8, dtype=F64)).abs().max() < 0.25 * difference
    if scheme in ("exact", "zoh"):
        for n in (1, 3, 60, 500):
            assert torch.linalg.eigvalsh(gram(n)).max() <= 1 + 1e-13


@given(st.permutations(range(8)), st.integers(0, 8))
def test_points_that_come_late_are_sorted_in(order: list[int], cut: int) -> None:
    x = timed(np.cumsum(np.linspace(0.1, 1.0, 8)))
    for scheme in SCHEMES:
        features = make(4, scheme=scheme, time_dim=0)
        late = fed(features, x[order][:cut], x[order][cut:])
        whole = fed(features, x)
        assert torch.equal(late.nodes(), x)
        near(late.weights(), whole.weights())
        assert late.num_points == 8 and late.elapsed == whole.elapsed


def test_path_step_continues_where_the_path_is() -> None:
    edges = torch.tensor([0.0, 0.3, 1.0, 1.4, 2.5], dtype=F64)
    for scheme in SCHEMES:
        _, first = path_step(4, edges[:3], scheme)
        before, second = path_step(4, edges[2:], scheme)
        _, whole = path_step(4, edges, scheme)
        near(torch.cat([before @ first, second], dim=-1), whole, 1e-14)
    with pytest.raises(ValueError, match=r"scheme: expected one of .*, got 'trapezoid'"):
        path_step(4, edges, "trapezoid")
    for scheme in SCHEMES:
        with pytest.raises(ValueError, match="t1"):
            path_step(4, edges.flip(0), scheme)


# Covariances


@every_scheme
@given(sizes=st.lists(st.integers(1, 70), min_size=1, max_size=2), seed=st.integers(0, 99))
def test_the_state_of_mode_rff_is_the_weighted_sum_over_the_path(scheme: str, sizes: list[int], seed: int) -> None:
    x = points(sum(sizes), seed)
    small = fed(make(5, mode="rff", scheme=scheme), *x.split(sizes))
    expected = oracle_weights(5, np.arange(1, len(x) + 1), scheme) @ psi(small)(x)
    near(small.weights(), expected)
    assert small.weights().shape == (5, 60) and small.nodes().shape == (60, 0)


@both_modes
@every_scheme
@given(n=st.integers(0, 40), seed=st.integers(0, 99))
def test_all_covariances_are_those_of_one_gaussian(mode: str, scheme: str, n: int, seed: int) -> None:
    old = fed(make(6, mode=mode, scheme=scheme), points(n, seed))
    new = fed(old, points(7, seed + 1))
    x = points(10, seed + 2)
    kff = KERNEL(x).to_dense() if mode == "keep" else psi(old)(x) @ psi(old)(x).mT
    blocks = [
        [old.kuu(KERNEL).to_dense(), old.cross(KERNEL, new), old.kuf(KERNEL, x)],
        [new.cross(KERNEL, old), new.kuu(KERNEL).to_dense(), new.kuf(KERNEL, x)],
        [old.kuf(KERNEL, x).mT, new.kuf(KERNEL, x).mT, kff],
    ]
    joint = torch.cat([torch.cat(row, dim=-1) for row in blocks], dim=-2).detach()
    assert joint.shape == (22, 22) and joint.dtype == F64
    scale = joint.diagonal().max()
    assert (joint - joint.mT).abs().max() < 1e-12 * scale
    assert torch.linalg.eigvalsh(joint).min() > -1e-12 * scale


def test_both_modes_tell_the_same_as_far_as_the_frequencies_reach() -> None:
    x, at = points(80), points(9, 4)
    kept = fed(make(6), x)
    errors = []
    for number in (250, 4000, 64000):
        frozen = fed(make(6, mode="rff", num_frequencies=number), x)
        kuu = (frozen.kuu(KERNEL).to_dense() - kept.kuu(KERNEL).to_dense()).abs().max()
        errors.append(max(kuu.item(), (frozen.kuf(KERNEL, at) - kept.kuf(KERNEL, at)).abs().max().item()))
    assert errors[0] < 0.2 and errors[2] < 0.02


@every_scheme
def test_a_path_through_time_alone_becomes_hippo_features(scheme: str) -> None:
    kernel = kernel_of(0.3)
    start, horizon, order = 0.5, 1.5, 6
    line = HippoFeatures(order, horizon, start)
    at = torch.tensor([[0.6], [1.1], [1.8]], dtype=F64)
    errors = []
    for n in (50, 200, 800):
        times = torch.linspace(start, horizon, n + 1, dtype=F64)[1:, None]
        path = make(order, 1, scheme=scheme, time_dim=0, start=start).following(times, kernel)
        kuu = (path.kuu(kernel).to_dense() - line.kuu(kernel).to_dense()).abs().max().item()
        kuf = (path.kuf(kernel, at) - line.kuf(kernel, at)).abs().max().item()
        errors.append(max(kuu, kuf))
    # First order: a point is at the end of the cell that it stands for.
    assert errors[0] / errors[1] > 2.8 and errors[1] / errors[2] > 3.4
    assert errors[2] < (0.01 if scheme in ("backward", "euler") else 5e-3)


@both_modes
def test_kernels_of_any_dtype_give_float64(mode: str) -> None:
    kernel = kernel_of().float()
    options: dict[str, Any] = {"mode": mode, "num_frequencies": 30} | ({"kernel": kernel} if mode == "rff" else {})
    source = torch.Generator().manual_seed(0)
    features = PathFeatures(5, 2, ordering="kernel", generator=source, **options)
    features = features.following(points(30).float(), kernel)
    exact = kernel.double()
    for value, expected in (
        (features.kuu(kernel).to_dense(), features.kuu(exact).to_dense()),
        (features.kuf(kernel, points(4).float()), features.kuf(exact, points(4).float().double())),
    ):
        assert value.dtype == F64
        torch.testing.assert_close(value, expected)
    assert features.weights().dtype == features.nodes().dtype == F64


def test_kernels_of_any_kind_and_batch_serve_mode_keep() -> None:
    features = fed(make(4), points(20))
    batch = RBFKernel(batch_shape=torch.Size([3]))
    assert features.kuu(batch).shape == (3, 4, 4)
    assert features.kuf(PeriodicKernel() + MaternKernel(0.5), points(6)).shape == (4, 6)
    near(features.cross(KERNEL, InducingPoints(points(6))).detach(), features.kuf(KERNEL, points(6)).detach())


def test_hyperparameters_count_in_mode_keep_and_not_in_mode_rff() -> None:
    other = kernel_of(0.2)
    kept, frozen = (fed(make(4, mode=mode), points(20)) for mode in MODES)
    assert (kept.kuu(KERNEL) - kept.kuu(other)).to_dense().abs().max() > 0.01
    assert torch.equal(frozen.kuu(KERNEL).to_dense(), frozen.kuu(other).to_dense())
    assert torch.equal(frozen.kuf(KERNEL, points(3)), frozen.kuf(other, points(3)))
    kept.kuu(other).to_dense().sum().backward()
    assert other.base_kernel.raw_lengthscale.grad is not None


@both_modes
def test_an_empty_path_is_a_valid_placeholder(mode: str) -> None:
    features = make(4, mode=mode, every=2)
    for empty in (features, features.following(points(1), KERNEL)):  # one point is passed over
        assert empty.num_points == 0 and empty.elapsed == 0.0 and empty.probes(5) is None
        assert empty.nodes().shape == ((1, 2) if mode == "keep" else (60, 0))
        assert not empty.nodes().any()
        weights = empty.weights()
        assert weights.shape == (4, len(empty.nodes()))
        assert weights[0, 0] == 1 and weights.sum() == 1
        assert torch.linalg.matrix_rank(empty.kuu(KERNEL).to_dense()) == 1
        assert empty.kuf(KERNEL, points(3)).isfinite().all()
        assert empty.cross(KERNEL, features.following(points(9), KERNEL)).shape == (4, 4)


# The order of the points


def test_points_join_in_the_order_that_was_asked_for() -> None:
    x, more = points(20, 1), points(15, 2)
    kept = fed(make(ordering="oracle", key=1), x, more).nodes()
    assert torch.equal(kept, torch.cat([x[x[:, 1].argsort()], more[more[:, 1].argsort()]]))
    kept = fed(make(ordering="oracle", key=lambda x: x.norm(dim=-1)), x).nodes()
    assert torch.equal(kept, x[x.norm(dim=-1).argsort()])

    first = x[orderings.kernel_greedy(x, KERNEL)]
    second = more[orderings.kernel_greedy(more, KERNEL, first[-1])]
    assert torch.equal(fed(make(ordering="kernel"), x, more).nodes(), torch.cat([first, second]))

    source = torch.Generator().manual_seed(4)
    expected = x[torch.randperm(20, generator=torch.Generator().manual_seed(4))]
    assert torch.equal(fed(make(ordering="random", generator=source), x).nodes(), expected)


def test_the_kernel_of_mode_rff_orders_as_it_was_at_construction() -> None:
    kernel = ScaleKernel(MaternKernel(1.5, ard_num_dims=2)).double()
    kernel.base_kernel.lengthscale = torch.tensor([0.2, 5.0])
    x, more = points(20, 1), points(15, 2)
    first = x[orderings.kernel_greedy(x, kernel)]
    second = more[orderings.kernel_greedy(more, kernel, first[-1])]
    features = make(mode="rff", ordering="kernel", kernel=kernel)
    kernel.base_kernel.lengthscale = torch.tensor([5.0, 0.2])
    features = features.following(x, kernel).following(more, kernel)
    path = torch.cat([first, second])
    near(features.weights(), oracle_weights(5, np.arange(1, 36), "exact") @ psi(features)(path))
    assert not [p for p in features.parameters() if p.requires_grad]


# State


@both_modes
def test_updates_leave_the_old_features_as_they_were(mode: str) -> None:
    old = fed(make(mode=mode), points(20))
    before = {name: value.clone() for name, value in old.state_dict().items()}
    x = points(10, 3)
    new = old.following(x, KERNEL, growth="fixed")
    assert old.following(x[:0], KERNEL) is old
    assert new is not old and new.num_points == 30 and old.num_points == 20
    assert new.embedding is old.embedding  # the large part is shared
    grown = old.following(x, KERNEL, growth=2.0)
    assert torch.equal(grown.weights(), new.weights())
    weights = new.weights().clone()
    x.zero_()
    assert torch.equal(new.weights(), weights) and (mode == "rff" or new.nodes()[-1].any())
    for name, value in old.state_dict().items():
        assert torch.equal(value, before[name])
    assert not fed(old, points(3).requires_grad_()).weights().requires_grad


def test_the_state_of_mode_rff_has_a_constant_size() -> None:
    features = make(20, mode="rff")
    sizes = set()
    for seed in range(10):
        features = features.following(points(10_000, seed), KERNEL)
        sizes.add(sum(value.numel() for value in features.state_dict().values()))
    assert features.num_points == 100_000
    assert len(sizes) == 1 and sizes.pop() < 20 * 60 + 30 * 2 + 20
    assert features.weights().isfinite().all()
    # A mean over so many points is that of the distribution, which has zero mean.
    expected = math.sqrt(1.7 / 30) * torch.exp(-0.5 * psi(features).frequencies.square().sum(-1))
    assert (features.weights()[0, :30] - expected).abs().max() < 0.01


@both_modes
@every_scheme
@pytest.mark.parametrize("time_dim", [None, 0])
def test_a_saved_path_goes_on_exactly(mode: str, scheme: str, time_dim: int | None) -> None:
    x = timed(torch.arange(1.0, 36.0) / 3)
    options: dict[str, Any] = {"mode": mode, "time_dim": time_dim, "every": 2, "scheme": scheme}
    if time_dim is None:
        options["step"] = 0.25
    features = fed(make(**options), x[:21])
    file = io.BytesIO()
    torch.save(features.state_dict(), file)
    file.seek(0)

    fresh = make(3, mode=mode, num_frequencies=8)  # other numbers: those that were saved decide
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for loaded in (fresh, deepcopy(features)):
        assert (loaded.num_points, loaded.elapsed) == (features.num_points, features.elapsed)
        one, two = fed(features, x[21:]), fed(loaded, x[21:])
        assert torch.equal(one.weights(), two.weights()) and torch.equal(one.nodes(), two.nodes())
        assert (one.num_points, one.elapsed, one.scheme) == (two.num_points, two.elapsed, two.scheme)
        assert torch.equal(one.kuu(KERNEL).to_dense(), two.kuu(KERNEL).to_dense())


def test_loading_reaches_no_other_features() -> None:
    options: dict[str, Any] = {"mode": "rff", "ordering": "kernel"}
    old = fed(make(**options), points(9))
    new = fed(old, points(5, 1))
    before = old.kuf(KERNEL, points(3))
    other = fed(make(kernel=kernel_of(2.0), **options), points(30))
    new.load_state_dict(other.state_dict())
    assert torch.equal(old.kuf(KERNEL, points(3)), before)
    assert torch.equal(new.kuf(KERNEL, points(3)), other.kuf(KERNEL, points(3)))
    assert torch.equal(fed(new, points(8)).weights(), fed(other, points(8)).weights())


@both_modes
def test_copies_share_the_generator_and_nothing_else(mode: str) -> None:
    source = torch.Generator().manual_seed(1)
    features = fed(make(mode=mode, ordering="random", generator=source), points(9))
    twin = deepcopy(features)
    assert twin._generator is source
    twin._weights.zero_()
    assert features.weights().any()
    memo = [features, features]
    first, second = deepcopy(memo)
    assert first is second


@both_modes
def test_casts_leave_the_state_alone(mode: str) -> None:
    features = fed(make(mode=mode), points(9))
    weights, nodes = features.weights().clone(), features.nodes().clone()
    for cast in (features.float(), features.half(), features.to(torch.bfloat16)):
        assert torch.equal(cast.weights(), weights) and torch.equal(cast.nodes(), nodes)
        assert cast.kuu(KERNEL).dtype == F64


def test_probes_are_points_of_the_path() -> None:
    x = points(50)
    features = fed(make(), x)

    def probed(*number: int) -> Tensor:
        probes = features.probes(*number)
        assert probes is not None
        return probes

    assert torch.equal(probed(5), x[[5, 15, 25, 35, 45]])
    assert torch.equal(probed(), x) and torch.equal(probed(1000), x)
    assert len(probed(49)) == len(probed(49).unique(dim=0)) == 49
    assert fed(make(mode="rff"), x).probes(5) is None
    with pytest.raises(ValueError, match="num_probes: expected at least 1, got 0"):
        features.probes(0)


def test_it_says_what_it_is() -> None:
    features = fed(make(3), points(4))
    expected = "PathFeatures(num_features=3, num_dims=2, num_points=4, mode='keep', scheme='exact', ordering='given')"
    assert repr(features) == expected


# What goes wrong


def test_the_published_recurrence_is_there_and_warns() -> None:
    with pytest.raises(ValueError, match=r"scheme: 'euler' is not stable .* needs paper=True"):
        PathFeatures(4, 2, scheme="euler")
    for scheme in ("euler", "bilinear"):
        with pytest.warns(UserWarning, match=r"paper=True: .* is not stable"):
            features = PathFeatures(30, 2, scheme=scheme, paper=True)
        fed(features, points(10), points(10, 1))  # and is silent from there on
    weights = {scheme: fed(make(30, scheme=scheme), points(15)).weights().abs().max() for scheme in SCHEMES}
    assert weights.pop("euler") > 1e6
    assert max(weights.values()) < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "num_features: expected at least 1, got 0"),
        ({"num_dims": 0}, "num_dims: expected at least 1, got 0"),
        ({"mode": "forget"}, r"mode: expected one of \('keep', 'rff'\), got 'forget'"),
        ({"scheme": "rk4"}, "scheme: expected one of .*, got 'rk4'"),
        ({"ordering": "time"}, "ordering: expected one of .*, got 'time'"),
        ({"step": 0.0}, "step: expected a positive number, got 0.0"),
        ({"step": math.inf}, "step: expected a positive number, got inf"),
        ({"every": 0}, "every: expected at least 1, got 0"),
        ({"time_dim": 2}, "time_dim: expected one of 2 input columns, got 2"),
        ({"start": 1.0}, "start: pseudo-time begins at 0"),
        ({"start": math.nan, "time_dim": 0}, "start: expected a finite number, got nan"),
        ({"time_dim": 0, "ordering": "random"}, "ordering: with time_dim .* expected 'given', got 'random'"),
        ({"ordering": "oracle"}, "key: ordering 'oracle' needs one"),
        ({"key": 0}, "key: ordering 'oracle' needs one and no other takes one; got 'given' and 0"),
        ({"ordering": "oracle", "key": 2}, "key: expected one of 2 input columns, got 2"),
        ({"mode": "rff"}, "kernel: mode 'rff' draws .* got None"),
        ({"kernel": RBFKernel()}, "kernel: mode 'keep' is handed one with every call"),
        ({"mode": "rff", "kernel": RBFKernel(), "num_frequencies": 0}, "num_frequencies: expected at least 1"),
        ({"mode": "rff", "kernel": RBFKernel(ard_num_dims=3)}, "kernel: expected one for 2 input columns"),
    ],
    ids=str,
)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PathFeatures(**({"num_features": 4, "num_dims": 2} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 4.0}, "num_features: expected an integer, got 4.0"),
        ({"every": 1.5}, "every: expected an integer, got 1.5"),
        ({"time_dim": 0.0}, "time_dim: expected the number of a column, got 0.0"),
        ({"time_dim": True}, "time_dim: expected the number of a column, got True"),
        ({"ordering": "oracle", "key": "norm"}, "key: expected the number of a column, got 'norm'"),
        ({"generator": 3}, "generator: expected a torch.Generator or None, got int"),
        ({"mode": "rff", "kernel": PeriodicKernel()}, "kernel: expected RBFKernel or MaternKernel"),
    ],
    ids=str,
)
def test_bad_types_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PathFeatures(**({"num_features": 4, "num_dims": 2} | options))


@both_modes
def test_bad_inputs_change_nothing(mode: str) -> None:
    features = fed(make(mode=mode), points(9))
    before = {name: value.clone() for name, value in features.state_dict().items()}
    for bad, message in (
        (torch.zeros(3, 3), r"x: expected 2 input columns, .* got shape \(3, 3\)"),
        (torch.zeros(3), r"x: expected 2 input columns, .* got shape \(3,\)"),
        (torch.zeros(4, 3, 2), r"x: expected shape \(n, 2\), one stream, got \(4, 3, 2\)"),
        (torch.tensor([[0.0, math.nan]]), "x: expected finite values"),
        (torch.tensor([[0.0, math.inf]]), "x: expected finite values"),
    ):
        with pytest.raises(ValueError, match=message):
            features.following(bad, KERNEL)
    not_floating: list[Any] = [torch.zeros(3, 2, dtype=torch.int64), [[0.0, 1.0]]]
    for wrong in not_floating:
        with pytest.raises(TypeError, match="x: expected a floating-point tensor"):
            features.following(wrong, KERNEL)
    for name, value in features.state_dict().items():
        assert torch.equal(value, before[name])
    line = make(num_dims=1, mode=mode)
    assert torch.equal(fed(line, torch.ones(3)).weights(), fed(line, torch.ones(3, 1)).weights())


@both_modes
@pytest.mark.parametrize("time_dim", [0, -2])
def test_times_that_cannot_be_are_refused(mode: str, time_dim: int) -> None:
    features = fed(make(mode=mode, time_dim=time_dim, start=1.0), timed([2.0, 3.0]))
    assert features.elapsed == 2.0
    with pytest.raises(ValueError, match="x: expected times after start=1 in column 0, got 1"):
        fed(features, timed([4.0, 1.0]))
    expected = "x: expected times .* differ" if mode == "keep" else "x: mode 'rff' .* increase from after 3, the end"
    for equal in ([4.0, 4.0], [5.0, 3.0], [2.0]):
        with pytest.raises(ValueError, match=expected + r".* got \["):
            fed(features, timed(equal))
    late = timed([2.5, 6.0, 5.0])
    if mode == "keep":
        assert fed(features, late).nodes()[:, 0].tolist() == [2.0, 2.5, 3.0, 5.0, 6.0]
    else:
        for refused in (late, timed([6.0, 5.0]), timed([2.5])):
            with pytest.raises(ValueError, match=expected):
                fed(features, refused)
        with pytest.raises(ValueError, match=r"got \[9, 8, 7, 6, 5, 4, ...\]"):
            fed(features, timed([9.0, 8, 7, 6, 5, 4, 3.5]))


def test_covariances_of_different_random_features_are_refused() -> None:
    frozen, other = (fed(make(mode="rff"), points(9)) for _ in range(2))
    kept = fed(make(), points(9))
    for left, right in ((frozen, other), (frozen, kept), (kept, frozen), (frozen, InducingPoints(points(3)))):
        with pytest.raises(ValueError, match="other: expected features that share their random features"):
            left.cross(KERNEL, right)
    assert frozen.cross(KERNEL, deepcopy(frozen)).shape == (5, 5)

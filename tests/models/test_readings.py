"""Readings, checked and spread over the declared sensors. What an update refuses: tests/models/test_space_time.py."""

import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from hypothesis import given
from hypothesis import strategies as st

from gpseq.models.readings import check_places, check_readings, check_times
from tests.oracles_streaming import F64

LIKELIHOOD = GaussianLikelihood().double()
LIKELIHOOD.noise = 0.25
PLACES = torch.rand(4, 2, dtype=F64)


@given(which=st.permutations(range(4)), size=st.integers(0, 4), gaps=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_readings_go_where_their_sensor_is(which: list[int], size: int, gaps: float, seed: int) -> None:
    torch.manual_seed(seed)
    sensors = torch.tensor(which[:size], dtype=torch.int64)
    y = torch.randn(3, size)
    y[torch.rand(3, size) < gaps] = torch.nan
    noise = torch.rand(3, size) + 0.1
    data = check_readings(PLACES, LIKELIHOOD, torch.arange(3.0), y, sensors, noise, "skip")
    assert data.times.shape == (3, 1) and data.y.shape == data.weights.shape == (3, 4)
    assert data.times.dtype == data.y.dtype == data.weights.dtype == F64
    for sensor in range(4):
        for row in range(3):
            value = y[row, which.index(sensor)] if sensor in which[:size] else torch.tensor(torch.nan)
            if value.isnan():
                assert data.y[row, sensor] == 0 and data.weights[row, sensor] == 0
            else:
                assert data.y[row, sensor] == value.double()
                assert data.weights[row, sensor] == 1 / noise[row, which.index(sensor)].double()
    assert data.heard.shape == (int((~y.isnan()).any(-1).sum()), 1)


@pytest.mark.parametrize("index", [torch.int64, torch.int32, torch.uint8])
def test_any_type_of_index(index: torch.dtype) -> None:
    sensors = torch.tensor([2, 0], dtype=index)
    data = check_readings(PLACES, LIKELIHOOD, torch.zeros(1), torch.tensor([[1.0, 2.0]]), sensors, None, "error")
    assert data.y.tolist() == [[2.0, 0.0, 1.0, 0.0]]
    assert data.weights.squeeze().tolist() == pytest.approx([4.0, 0.0, 4.0, 0.0])


@pytest.mark.parametrize(
    "noise", [0.5, 1, torch.tensor(0.5), torch.rand(4) + 1, torch.rand(3, 1) + 1, torch.rand(3, 4) + 1, torch.ones(1)]
)
def test_any_form_of_noise(noise: float | torch.Tensor) -> None:
    data = check_readings(PLACES, LIKELIHOOD, torch.zeros(3), torch.zeros(3, 4), None, noise, "error")
    expected = torch.as_tensor(noise).double().expand(3, 4).reciprocal()
    assert torch.equal(data.weights, expected)


def test_second_noise_of_a_fixed_noise_likelihood_counts() -> None:
    likelihood = FixedNoiseGaussianLikelihood(torch.ones(1, dtype=F64), learn_additional_noise=True).double()
    likelihood.second_noise = 0.5
    data = check_readings(PLACES, likelihood, torch.zeros(1), torch.zeros(1, 4), None, 0.5, "error")
    assert torch.equal(data.weights, torch.ones(1, 4, dtype=F64))


def test_nothing_of_a_graph_remains() -> None:
    times, y, noise = (torch.ones(shape, requires_grad=True) for shape in ((2,), (2, 4), (4,)))
    data = check_readings(PLACES, LIKELIHOOD, times, y, None, noise, "error")
    assert not any(part.requires_grad for part in (data.times, data.y, data.weights))


def test_nan_is_missing_only_where_it_is_skipped() -> None:
    y = torch.tensor([[1.0, torch.nan, 2.0, 3.0]])
    noise = torch.tensor([[1.0, -1.0, 1.0, 1.0]])  # that of a reading that does not exist may be anything
    data = check_readings(PLACES, LIKELIHOOD, torch.zeros(1), y, None, noise, "skip")
    assert data.weights.tolist() == [[1.0, 0.0, 1.0, 1.0]]
    with pytest.raises(ValueError, match=r"^y: .*missing='skip'"):
        check_readings(PLACES, LIKELIHOOD, torch.zeros(1), y, None, noise.abs(), "error")
    with pytest.raises(ValueError, match=r"^y: expected finite readings, got NaN or infinity in shape \(1, 4\)\.$"):
        check_readings(PLACES, LIKELIHOOD, torch.zeros(1), y / 0, None, noise, "skip")


def test_times_are_a_vector_or_a_column() -> None:
    assert check_times(torch.zeros(3)).shape == check_times(torch.zeros(3, 1)).shape == (3, 1)
    assert check_times(torch.zeros(0)).shape == (0, 1)
    for bad in (torch.tensor(0.0), torch.zeros(3, 2), torch.zeros(3, 0), torch.zeros(2, 3, 1)):
        with pytest.raises(ValueError, match=r"^times: expected shape \(n,\)"):
            check_times(bad)


def test_places_keep_their_graph() -> None:
    """Locations of predictions may be optimised."""
    places = torch.zeros(2, 3, requires_grad=True)
    assert check_places("locations", places, 3, places.device).requires_grad
    with pytest.raises(ValueError, match=r"^locations: expected shape \(s, 2\), got \(2, 3\)"):
        check_places("locations", places, 2, places.device)

"""The algebra of diffusion against joint Gaussians, and its laws at every step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpseq.generative.noise_schedule import NoiseSchedule


@pytest.mark.parametrize("num_steps", [2, 3, 17, 1000, 4000])
def test_noise_only_grows_and_variances_lie_between_their_bounds(num_steps: int) -> None:
    schedule = NoiseSchedule.cosine(num_steps)
    left, beta = schedule.alpha_bar, schedule.beta
    assert (left.diff() < 0).all() and 0 < left[-1] and left[0] < 1
    assert (beta > 0).all() and (beta <= 0.999).all()
    assert schedule.posterior_variance[0] == 0 and (schedule.posterior_variance[1:] > 0).all()
    assert (schedule.posterior_variance <= beta).all()
    k = torch.arange(1, num_steps + 1)
    low, middle, high = (schedule.log_variance(torch.full((num_steps,), s).double(), k) for s in (0.0, 0.4, 1.0))
    assert (low[1:] <= middle[1:]).all() and (middle[1:] <= high[1:]).all()
    torch.testing.assert_close(high, beta.log())
    torch.testing.assert_close(low[1:], schedule.posterior_variance[1:].log())
    assert low[0] == low[1]


def test_the_cosine() -> None:
    """As published, up to the step where beta reaches its bound."""
    left = NoiseSchedule.cosine(1000).alpha_bar
    for k in (1, 250, 500, 990):
        curve = [math.cos((j / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for j in (k, 0)]
        assert left[k - 1].item() == pytest.approx(curve[0] / curve[1], rel=1e-10)


@pytest.mark.parametrize("num_steps", [2, 50, 1000])
def test_the_right_noise_gives_the_video_back_at_every_step(num_steps: int, dtype: torch.dtype) -> None:
    schedule, k = NoiseSchedule.cosine(num_steps), torch.arange(1, num_steps + 1)
    clean, noise = torch.randn(2, num_steps, 2, 1, 2, 2, dtype=dtype)
    found = schedule.clean(schedule.diffuse(clean, noise, k), noise, k)
    assert found.dtype == dtype
    # What is left of the video in float32 at the last steps is a few parts in ten thousand of the noise.
    digits = torch.finfo(dtype).eps * 20 * schedule.alpha_bar.rsqrt().view(-1, 1, 1, 1, 1)
    assert ((found - clean).abs() <= digits).all()


@pytest.mark.parametrize("stride", [None, 7])
def test_posterior_by_conditioning_a_joint_gaussian(stride: int | None) -> None:
    """Of v_{k-1} and v_k given v, for full and for strided schedules."""
    schedule = NoiseSchedule.cosine(30)
    schedule = schedule if stride is None else schedule.strided(stride)
    left, k = schedule.alpha_bar, torch.arange(1, len(schedule.beta) + 1)
    clean, noisy = torch.randn(2, len(k), dtype=torch.float64)
    mean, variance = schedule.posterior_mean(clean, noisy, k), schedule.posterior_variance
    assert mean[0].item() == pytest.approx(clean[0].item(), abs=1e-12)
    for i in range(1, len(k)):
        before = left[i - 1]
        covariance, total = (1 - schedule.beta[i]).sqrt() * (1 - before), 1 - left[i]
        gain = covariance / total
        expected = before.sqrt() * clean[i] + gain * (noisy[i] - left[i].sqrt() * clean[i])
        assert mean[i].item() == pytest.approx(expected.item(), abs=1e-10)
        assert variance[i].item() == pytest.approx((1 - before - gain * covariance).item(), abs=1e-12)


@given(st.integers(2, 60), st.data())
def test_strides_keep_the_noise_of_their_steps(num_steps: int, data: st.DataObject) -> None:
    full = NoiseSchedule.cosine(num_steps)
    number = data.draw(st.integers(1, num_steps))
    schedule = full.strided(number)
    assert schedule.steps[-1] == num_steps and (schedule.steps.diff() > 0).all() and len(schedule.steps) == number
    torch.testing.assert_close(schedule.alpha_bar, full.alpha_bar[schedule.steps - 1], atol=1e-14, rtol=1e-9)
    assert ((schedule.beta > 0) & (schedule.beta < 1)).all()
    assert schedule.log_variance(torch.rand(number), torch.arange(1, number + 1)).isfinite().all()


def test_as_many_strides_as_steps_change_nothing() -> None:
    full = NoiseSchedule.cosine(40)
    same = full.strided(40)
    assert torch.equal(same.steps, full.steps)
    torch.testing.assert_close(same.beta, full.beta)


def test_bad_numbers_of_steps() -> None:
    with pytest.raises(ValueError, match="num_steps: expected at least 2, got 1"):
        NoiseSchedule.cosine(1)
    with pytest.raises(TypeError, match="num_steps: expected an integer"):
        NoiseSchedule.cosine(10.0)
    for number in (0, 11):
        with pytest.raises(ValueError, match="num_steps: expected at"):
            NoiseSchedule.cosine(10).strided(number)

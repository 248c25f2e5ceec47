"""examples/generative/air.py: holes are those of elsewhere, nothing hidden leaks, lengths of holes are right."""

import pytest
import torch

from examples.generative import air


def made(hours: int = 40 * air.DAY, channels: int = 3) -> torch.Tensor:
    """Two stations with holes of several lengths, the second channel's from midnight on in one block."""
    generator = torch.Generator().manual_seed(0)
    values = 5 + torch.rand(2, hours, channels, generator=generator, dtype=torch.float64)
    values[0, 20:22, 0] = torch.nan
    values[0, 200:240, 1] = torch.nan
    values[1, 400:420, :2] = torch.nan
    values[1, 30 * air.DAY : 30 * air.DAY + 50, 2] = torch.nan
    return values


def record() -> air.Record:
    return air.split(made(), ("PM2.5", "O3", "TEMP"), ("a", "b"), 40 * air.DAY, 0)[0]


def test_lengths_of_holes_by_hand() -> None:
    missing = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 0, 0, 0]], dtype=torch.bool).T
    expected = torch.tensor([[2, 2, 0, 1, 0, 3, 3, 3], [0, 0, 0, 0, 1, 0, 0, 0]]).T
    assert torch.equal(air.hole_lengths(missing), expected)
    assert torch.equal(air.hole_lengths(missing.expand(4, 8, 2)), expected.expand(4, 8, 2))


def test_split_is_one_after_another_in_the_scale_of_training() -> None:
    values = made()
    train, val, test = air.split(values, ("PM2.5", "O3", "TEMP"), ("a", "b"), 400, 200)
    assert [part.values.shape[1] for part in (train, val, test)] == [400, 200, 360]
    first = train.values.flatten(0, 1)
    assert torch.allclose(first.nanmean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose((first - first.nanmean(0)).square().nanmean(0), torch.ones(3), atol=1e-4)
    later = values.clone()
    later[:, 400:] += 100  # what comes later does not change the scale
    assert torch.equal(
        air.split(later, ("PM2.5", "O3", "TEMP"), ("a", "b"), 400, 200)[0].values.nan_to_num(),
        train.values.nan_to_num(),
    )


def test_patterns_occur_and_leave_margins() -> None:
    series = record()
    patterns, origin = air.hole_patterns(series)
    assert len(patterns) > 3
    assert not patterns[:, : air.MARGIN].any() and not patterns[:, -air.MARGIN :].any()
    inner = slice(air.MARGIN, -air.MARGIN)
    for pattern, (station, day) in zip(patterns, origin.tolist(), strict=True):
        window = series.missing[station, day * air.DAY : day * air.DAY + air.WINDOW]
        assert torch.equal(pattern[inner], window[inner])
        assert pattern.sum() >= air.LEAST


def test_what_is_hidden_was_measured_and_is_missing() -> None:
    windows = air.lay_holes(record(), 12, torch.Generator().manual_seed(1))
    assert windows.hidden.flatten(1).any(1).all()
    assert (windows.missing | ~windows.hidden).all()  # hidden is missing
    assert (windows.y[windows.hidden] != 0).all()  # and known: only what was never measured is zero
    assert torch.equal(windows.y == 0, windows.missing & ~windows.hidden)
    assert (windows.length[windows.hidden] > 0).all()


@pytest.mark.parametrize("name", [air.PLAIN, air.MARKOV, air.HIPPO, air.LINEAR, air.EXACT])
def test_what_is_hidden_does_not_leak(name: str) -> None:
    series = record()
    windows = air.lay_holes(series, 2, torch.Generator().manual_seed(1))
    other = air.Windows(torch.where(windows.hidden, 9.0, windows.y), windows.missing, windows.hidden, windows.length)
    torch.manual_seed(0)
    settings = air.Settings(latents=3, width=8, features=8)
    gps = [air.ChannelGP(air.MarkovPrior("matern32", 1, 6.0), torch.zeros(()), torch.tensor(-3.0)) for _ in range(3)]

    def impute(given: air.Windows) -> torch.Tensor:
        if name == air.LINEAR:
            return air.impute_linear(given, windows).mean
        if name == air.EXACT:
            return air.impute_gps(gps, given).mean
        torch.manual_seed(0)
        vae = air.make_vae(name, 3, air.hole_patterns(series)[0], settings).eval()
        return air.impute_vae(vae, given, draws=4).mean

    assert torch.equal(impute(windows), impute(other))


def test_lines_and_scores_by_hand() -> None:
    y = torch.zeros(1, air.WINDOW, 1)
    y[0, :, 0] = torch.arange(1.0, air.WINDOW + 1)
    hidden = torch.zeros_like(y, dtype=torch.bool)
    hidden[0, 20:22], hidden[0, 40:60] = True, True
    windows = air.Windows(y, hidden, hidden, air.hole_lengths(hidden))
    assert torch.allclose(air.interpolate(windows), y.double())
    mean = y[hidden].unsqueeze(-1) + torch.tensor([3.0] * 2 + [1.0] * 20).unsqueeze(-1)
    found = air.score(air.gpseq.Predictive.from_moments(mean, variance=torch.ones_like(mean)), windows)
    assert found["rmse, 1-2 h"] == pytest.approx(3.0) and found["rmse, 13 h and more"] == pytest.approx(1.0)
    assert found["rmse"] == pytest.approx((38 / 22) ** 0.5) and found["coverage"] == pytest.approx(20 / 22)


def test_the_encoder_sees_less_in_training_and_hides_nothing_else() -> None:
    patterns = torch.zeros(1, 6, 2, dtype=torch.bool)
    patterns[0, 2:4, 1] = True
    dropout = air.HoleDropout(patterns)
    y = torch.ones(3, 6, 2)
    assert torch.equal(dropout(y), (~patterns).float().expand(3, 6, 2))
    assert torch.equal(dropout.eval()(y), y)
    assert not dropout.state_dict()

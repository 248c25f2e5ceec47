"""Fields: shapes, units, gaps, and what is known of the places."""

import dataclasses
import math

import pytest
import torch

from gpseq import datasets

AIR = {
    "PM2.5": ("µg/m³", 0, 1000, 0.0208),
    "O3": ("µg/m³", 0, 1100, 0.0316),
    "TEMP": ("°C", -20, 42, 0.0009),
    "DEWP": ("°C", -45, 30, 0.0010),
    "WSPM": ("m/s", 0, 14, 0.0008),
}


@pytest.mark.parametrize(
    ("load", "times", "places", "unit"),
    [(datasets.load_era5_temperature, 744, 1617, "K"), (datasets.load_beijing_air, 35_064, 12, "µg/m³")],
)
def test_a_field_is_hourly_and_float64(load, times, places, unit):
    field = load()
    assert isinstance(field, datasets.Field) and len(field) == times
    assert field.time.shape == (times,) and field.locations.shape == (places, 2)
    assert field.values.shape == (times, places)
    assert field.time.dtype == field.locations.dtype == field.values.dtype == torch.float64
    assert field.values.is_contiguous()
    assert field.time.equal(torch.arange(times, dtype=torch.float64)) and field.time_unit.startswith("hours since 20")
    assert field.value_unit == unit and field.name and field.source
    assert len(set(map(tuple, field.locations.tolist()))) == places
    with pytest.raises(dataclasses.FrozenInstanceError):
        field.name = "other"


def test_the_grid_is_row_by_row_from_the_north_west():
    field = datasets.load_era5_temperature()
    assert field.shape == (33, 49) and field.names == ()
    grid = field.locations.view(*field.shape, 2)
    assert grid[:, 0, 0].equal(torch.linspace(58, 50, 33, dtype=torch.float64))
    assert grid[0, :, 1].equal(torch.linspace(-10, 2, 49, dtype=torch.float64))
    assert (grid[..., 0] == grid[:, :1, 0]).all() and (grid[..., 1] == grid[:1, :, 1]).all()


def test_temperature_is_that_of_a_british_march():
    field = datasets.load_era5_temperature()
    assert field.values.isfinite().all()
    assert 260 < field.values.min() and field.values.max() < 295
    assert 279 < field.values.mean() < 283
    maps = field.values.view(-1, *field.shape)
    assert maps[:, -4:].mean() > maps[:, :4].mean() + 1  # the south is warmer
    # The day shows over land (Wales to the Midlands) and not over the Celtic Sea, which fixes the order of the axes.
    day = (field.values[14::24].mean(0) - field.values[4::24].mean(0)).view(field.shape)
    assert day[20:26, 30:40].mean() > 3 and day[29:, :10].abs().mean() < 1


def test_temperature_is_smooth_in_time_and_space():
    """An hour or a cell changes it by little: nothing is out of place."""
    maps = datasets.load_era5_temperature().values.view(744, 33, 49)
    assert maps.diff(dim=0).abs().mean() < 0.4
    assert maps.diff(dim=1).abs().mean() < 0.5 and maps.diff(dim=2).abs().mean() < 0.5


def test_temperature_carries_its_attribution():
    text = "Contains modified Copernicus Climate Change Service information [2019]"
    assert text in datasets.load_era5_temperature().source
    assert text in " ".join(datasets.load_era5_temperature.__doc__.split())
    assert text in datasets.path("LICENSES.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("variable", AIR)
def test_each_variable_has_its_unit_its_range_and_its_gaps(variable):
    unit, low, high, gaps = AIR[variable]
    field = datasets.load_beijing_air(variable)
    assert field.value_unit == unit and variable in field.name
    assert field.values.isnan().double().mean().item() == pytest.approx(gaps, abs=1e-4)
    measured = field.values[~field.values.isnan()]
    assert measured.isfinite().all() and low <= measured.min() and measured.max() <= high
    # No gap is hidden by a number, and no number is cut off: the range is used.
    assert measured.max() > 0.9 * high


def test_values_are_the_decimal_numbers_that_were_written():
    values = datasets.load_beijing_air("TEMP").values
    assert values[0, 0] == -0.7 and values[1, 0] == -1.1
    assert all(round(value, 4) == value for value in values[:500].flatten().tolist() if not math.isnan(value))


def test_seasons_and_hours_are_where_they_belong():
    field = datasets.load_beijing_air("TEMP")
    assert field.time_unit == "hours since 2013-03-01T00 local time"
    month = field.values[: 365 * 24].nanmean(1)
    july, january = month[122 * 24 : 153 * 24].nanmean(), month[306 * 24 : 337 * 24].nanmean()
    assert 24 < july < 30 and -6 < january < 2
    days = field.values.view(-1, 24, 12)
    assert days.nanmean((0, 2)).argmax() in (14, 15, 16) and days.nanmean((0, 2)).argmin() in (4, 5, 6)


def test_stations_lie_in_beijing_each_at_its_own_place():
    field = datasets.load_beijing_air()
    assert field.shape is None and len(field.names) == len(set(field.names)) == 12
    place = dict(zip(field.names, field.locations.tolist(), strict=True))
    assert place["Aotizhongxin"] == [39.982, 116.397] and place["Wanshouxigong"] == [39.878, 116.352]
    assert all(39.8 < latitude < 40.4 and 116.1 < longitude < 116.7 for latitude, longitude in place.values())
    assert max(place, key=lambda name: place[name][0]) == "Huairou"  # the north-eastern one
    assert min(place, key=lambda name: place[name][1]) == "Gucheng"  # the western one


def test_near_stations_agree_more_than_far_ones():
    """Positions belong to their columns: correlation falls with distance."""
    field = datasets.load_beijing_air("PM2.5")
    values = field.values[~field.values.isnan().any(1)]
    away = torch.pdist(field.locations * torch.tensor([111.0, 85.0], dtype=torch.float64))  # km
    above = torch.triu_indices(12, 12, 1)
    correlation = torch.corrcoef(values.T)[above[0], above[1]]
    assert torch.corrcoef(torch.stack([away, correlation]))[0, 1] < -0.8


@pytest.mark.parametrize("variable", ["PM10", "pm2.5", "", "stations", "decimals"])
def test_an_unknown_variable_is_refused(variable):
    with pytest.raises(ValueError, match=rf"variable: got '{variable}', expected one of PM2.5, O3, TEMP, DEWP, WSPM"):
        datasets.load_beijing_air(variable)


def test_loaders_hand_out_fresh_tensors():
    datasets.load_beijing_air().values.zero_()
    datasets.load_beijing_air().locations.zero_()
    assert datasets.load_beijing_air().values.nanmean() > 50
    assert datasets.load_beijing_air().locations.min() > 39

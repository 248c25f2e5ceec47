"""The shipped data: shapes, units, and what their sources say of them."""

import dataclasses

import pytest
import torch

from gpseq import datasets

SERIES = {
    "solar": (datasets.load_solar, 391, "year"),
    "covid": (datasets.load_covid_deaths, 456, "days since 2020-03-01"),
    "co2": (datasets.load_co2, 2225, "year"),
    "speech": (datasets.load_speech_envelope, 2000, "s"),
}


@pytest.mark.parametrize(("load", "length", "time_unit"), SERIES.values(), ids=SERIES)
def test_a_series_is_finite_increasing_and_float64(load, length, time_unit):
    series = load()
    assert len(series) == length
    assert series.time.shape == series.target.shape == (length,)
    assert series.time.dtype == series.target.dtype == torch.float64
    assert series.time.isfinite().all() and series.target.isfinite().all()
    assert (series.time.diff() > 0).all()
    assert series.time_unit == time_unit
    assert series.target_unit and series.name and series.source


def test_loaders_hand_out_fresh_tensors():
    datasets.load_solar().target.zero_()
    assert datasets.load_solar().target.min() > 1000


def test_a_series_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        datasets.load_solar().name = "other"


def test_solar_columns_differ_by_the_background():
    cycle, both = datasets.load_solar("tsi_11yr"), datasets.load_solar("tsi_11yr_bkgrnd")
    assert torch.equal(cycle.time, both.time)
    assert cycle.time[[0, -1]].tolist() == [1610.5, 2000.5]
    assert cycle.target[0].item() == 1365.8477
    assert both.target[0].item() == 1364.7338


def test_solar_refuses_an_unknown_column():
    with pytest.raises(ValueError, match=r"column: got 'tsi', expected one of tsi_11yr, tsi_11yr_bkgrnd"):
        datasets.load_solar("tsi")


def test_covid_counts_every_day():
    series = datasets.load_covid_deaths()
    assert torch.equal(series.time, torch.arange(456, dtype=torch.float64))
    assert torch.equal(series.target, series.target.round())
    assert series.target.min() >= 0


def test_co2_has_a_yearly_cycle_in_decimal_years():
    series = datasets.load_co2()
    assert series.time[0].item() == pytest.approx(1958 + 87 / 365)  # 29 March is day 88 of the year
    assert series.time[-1].item() == pytest.approx(2001 + 362 / 365)
    # Spring is above autumn once the trend is gone: a test of the unit of time, not of the climate.
    design = torch.stack([torch.ones_like(series.time), series.time - 1980, (series.time - 1980) ** 2], dim=-1)
    residual = series.target - design @ torch.linalg.lstsq(design, series.target[:, None]).solution[:, 0]
    phase = series.time % 1
    assert residual[(phase - 0.37).abs() < 0.05].mean() > residual[(phase - 0.75).abs() < 0.05].mean() + 4


def test_speech_envelope_is_an_envelope():
    series = datasets.load_speech_envelope()
    assert series.target.min() > 0
    assert series.time.diff().sub(0.002).abs().max() < 1e-12


def test_powerplant_is_a_table_in_raw_units():
    table = datasets.load_powerplant()
    assert len(table) == 9568
    assert table.X.shape == (9568, 4) and table.y.shape == (9568,)
    assert table.X.dtype == table.y.dtype == torch.float64
    assert len(table.columns) == 4
    assert 420 < table.y.min() and table.y.max() < 500
    assert 990 < table.X[:, 2].min() and table.X[:, 2].max() < 1040


def test_path_finds_every_file_and_names_those_it_has():
    assert datasets.path("LICENSES.md").is_file()
    with pytest.raises(ValueError, match=r"name: got 'nile.csv', expected one of LICENSES.md, .*uci_powerplant.npz"):
        datasets.path("nile.csv")


def test_every_file_states_its_licence():
    licences = datasets.path("LICENSES.md").read_text(encoding="utf-8")
    for file in datasets.path("LICENSES.md").parent.iterdir():
        assert file.name == "LICENSES.md" or f"`{file.name}`" in licences

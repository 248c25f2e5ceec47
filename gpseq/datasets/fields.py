"""Sensors in space that are read over and over: hourly temperature on a grid, hourly air quality at stations."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpseq.datasets.bundled import path

ERA5 = "era5_uk_t2m_2019_03.npz"
BEIJING = "beijing_air.npz"

# (latitude, longitude) in degrees, as publicly listed. The table of measurements has none: these are approximate.
STATIONS = {
    "Aotizhongxin": (39.982, 116.397),
    "Changping": (40.217, 116.230),
    "Dingling": (40.292, 116.220),
    "Dongsi": (39.929, 116.417),
    "Guanyuan": (39.929, 116.339),
    "Gucheng": (39.914, 116.184),
    "Huairou": (40.328, 116.628),
    "Nongzhanguan": (39.937, 116.461),
    "Shunyi": (40.127, 116.655),
    "Tiantan": (39.886, 116.407),
    "Wanliu": (39.987, 116.287),
    "Wanshouxigong": (39.878, 116.352),
}
UNITS = {"PM2.5": "µg/m³", "O3": "µg/m³", "TEMP": "°C", "DEWP": "°C", "WSPM": "m/s"}


@dataclass(frozen=True, eq=False)
class Field:
    """One quantity measured at fixed places, all at the same times.

    Attributes:
        time: ``(T,)`` float64, strictly increasing, in ``time_unit``.
        locations: ``(S, 2)`` float64, latitude and longitude in degrees (north and east are positive).
        values: ``(T, S)`` float64, as measured, in ``value_unit``; NaN where a measurement is missing.
        time_unit: what one unit of ``time`` is, and where its zero lies.
        value_unit: what one unit of ``values`` is.
        name: a title for a figure.
        source: who measured it, with the attribution that its licence asks for.
        shape: numbers of rows and columns if the places are a grid, row by row, otherwise ``None``.
        names: the name of each place, ``S`` of them; empty where places have none.
    """

    time: Tensor  # (T,)
    locations: Tensor  # (S, 2)
    values: Tensor  # (T, S)
    time_unit: str
    value_unit: str
    name: str
    source: str
    shape: tuple[int, int] | None = None
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.time)


def load_era5_temperature() -> Field:
    """Hourly air temperature 2 m above ground over the British Isles, March 2019.

    The grid has 33 latitudes, 58 to 50 degrees from north to south, and 49 longitudes, -10 to 2 degrees from west to
    east, both in steps of 0.25 degrees. Places are ordered row by row, so ``field.values.view(-1, *field.shape)`` is
    the map of each hour. Values are rounded to steps of 0.002 K; none is missing.

    Returns:
        744 hours at 1617 places; ``time`` in hours since 2019-03-01T00 UTC (0, 1, ...), ``values`` in kelvin.

    Source:
        Hersbach et al. (2020), ERA5. Contains modified Copernicus Climate Change Service information [2019].

    Example:
        >>> field = load_era5_temperature()
        >>> len(field), field.values.shape, field.shape
        (744, torch.Size([744, 1617]), (33, 49))
        >>> field.locations[0].tolist(), field.locations[-1].tolist()
        ([58.0, -10.0], [50.0, 2.0])
    """
    with np.load(path(ERA5), allow_pickle=False) as archive:
        steps, scale, offset = archive["t2m_q"], archive["scale"].item(), archive["offset"].item()
        latitude, longitude = archive["lat"], archive["lon"]
    hours, rows, columns = steps.shape
    grid = np.stack(np.meshgrid(latitude, longitude, indexing="ij"), axis=-1)
    return Field(
        time=torch.arange(hours, dtype=torch.float64),
        locations=torch.from_numpy(grid.reshape(-1, 2)),
        values=torch.from_numpy(steps.reshape(hours, -1) * np.float64(scale) + offset),
        time_unit="hours since 2019-03-01T00 UTC",
        value_unit="K",
        name="2 m temperature, British Isles",
        source=(
            "ERA5 (Hersbach et al. 2020). Contains modified Copernicus Climate Change Service information [2019]. "
            "Neither the European Commission nor ECMWF is responsible for any use of it."
        ),
        shape=(rows, columns),
    )


def load_beijing_air(variable: str = "PM2.5") -> Field:
    """Hourly air quality and weather at twelve stations in Beijing, 2013-2017.

    Gaps are kept as NaN: 2 % of ``PM2.5``, 3 % of ``O3``, 0.1 % of ``TEMP``, ``DEWP`` and ``WSPM``. The weather at a
    site is that of the nearest weather station, so that sites share it: Changping and Dingling; Aotizhongxin and
    Guanyuan; Dongsi, Nongzhanguan and Tiantan. Positions are approximate: the measurements come with names only, and
    these are the publicly listed positions of the sites.

    Args:
        variable: ``"PM2.5"`` (fine particles, µg/m³), ``"O3"`` (ozone, µg/m³), ``"TEMP"`` (temperature, °C),
            ``"DEWP"`` (dew point, °C) or ``"WSPM"`` (wind speed, m/s).

    Returns:
        35,064 hours at 12 stations; ``time`` in hours since 2013-03-01T00 local time (0, 1, ...), ``names`` those of
        the stations.

    Raises:
        ValueError: if there is no such variable.

    Source:
        Zhang et al. (2017), Beijing Multi-Site Air-Quality, UCI Machine Learning Repository 501.

    Example:
        >>> field = load_beijing_air("TEMP")
        >>> field.values.shape, field.value_unit, field.names[2]
        (torch.Size([35064, 12]), '°C', 'Dingling')
    """
    if variable not in UNITS:
        raise ValueError(f"variable: got {variable!r}, expected one of {', '.join(UNITS)}")
    with np.load(path(BEIJING), allow_pickle=False) as archive:
        steps, decimals, missing = archive[variable], archive["decimals"].item(), archive["missing"].item()
        names = tuple(archive["stations"].tolist())
    # Dividing gives the float64 nearest to the decimal number; multiplying by 0.0001 would not.
    values = np.where(steps == missing, np.nan, steps / 10.0**decimals)
    return Field(
        time=torch.arange(len(values), dtype=torch.float64),
        locations=torch.tensor([STATIONS[name] for name in names], dtype=torch.float64),
        values=torch.from_numpy(values),
        time_unit="hours since 2013-03-01T00 local time",
        value_unit=UNITS[variable],
        name=f"{variable} in Beijing",
        source="Beijing Multi-Site Air-Quality (Zhang et al. 2017), UCI Machine Learning Repository 501",
        names=names,
    )

"""The data files in ``gpseq/datasets/data`` as float64 tensors."""

import csv
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SOLAR = "solar_lean2004.csv"
COVID = "covid_brazil_deaths_daily.csv"
CO2 = "mauna_loa_co2_weekly.csv"
SPEECH = "speech_envelope_500hz.npz"
POWERPLANT = "uci_powerplant.npz"


@dataclass(frozen=True, eq=False)
class Series:
    """One real series over time.

    Attributes:
        time: ``(n,)`` float64, strictly increasing, in ``time_unit``.
        target: ``(n,)`` float64, as measured, in ``target_unit``.
        time_unit: what one unit of ``time`` is, and where its zero lies.
        target_unit: what one unit of ``target`` is.
        name: a title for a figure.
        source: who measured it.
    """

    time: Tensor  # (n,)
    target: Tensor  # (n,)
    time_unit: str
    target_unit: str
    name: str
    source: str

    def __len__(self) -> int:
        return len(self.time)


@dataclass(frozen=True, eq=False)
class Table:
    """A regression table.

    Attributes:
        X: ``(n, d)`` float64 inputs, one column for each of ``columns``.
        y: ``(n,)`` float64 targets, in ``target_unit``.
        columns: name and unit of each column of ``X``.
        target_unit: what one unit of ``y`` is.
        name: a title for a figure.
        source: who measured it.
    """

    X: Tensor  # (n, d)
    y: Tensor  # (n,)
    columns: tuple[str, ...]
    target_unit: str
    name: str
    source: str

    def __len__(self) -> int:
        return len(self.y)


def path(name: str) -> Path:
    """Where a shipped file lies on disk.

    Args:
        name: file name, such as ``"solar_lean2004.csv"``.

    Returns:
        Its path; open it for reading only.

    Raises:
        ValueError: if no file of that name is shipped.

    Example:
        >>> path("solar_lean2004.csv").suffix
        '.csv'
    """
    folder = Path(str(files("gpseq.datasets"))) / "data"
    shipped = sorted(file.name for file in folder.iterdir())
    if name not in shipped:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(shipped)}")
    return folder / name


def load_solar(column: str = "tsi_11yr_bkgrnd") -> Series:
    """Yearly total solar irradiance, 1610-2000, reconstructed by Lean (2004).

    Args:
        column: ``"tsi_11yr_bkgrnd"``, the 11-year cycle and the slow background, or ``"tsi_11yr"``, the cycle alone.

    Returns:
        391 years; ``time`` in decimal years, the middle of each (1610.5 is the first), ``target`` in W/m².

    Raises:
        ValueError: if there is no such column.

    Source:
        Lean (2004), Solar Irradiance Reconstruction, NOAA/NGDC Paleoclimatology 2004-035.

    Example:
        >>> series = load_solar()
        >>> len(series), series.time[0].item(), series.target[0].item()
        (391, 1610.5, 1364.7338)
    """
    columns = ("tsi_11yr", "tsi_11yr_bkgrnd")
    if column not in columns:
        raise ValueError(f"column: got {column!r}, expected one of {', '.join(columns)}")
    rows = _rows(SOLAR)
    return Series(
        time=_tensor([float(row["year"]) for row in rows]),
        target=_tensor([float(row[column]) for row in rows]),
        time_unit="year",
        target_unit="W/m²",
        name="total solar irradiance",
        source="Lean (2004), NOAA/NGDC Paleoclimatology 2004-035",
    )


def load_covid_deaths() -> Series:
    """Daily deaths from COVID-19 and severe acute respiratory infection in Brazil, by date of death.

    Counts of the last ten weeks or so are too low: deaths are reported with a delay, and this is the release of
    2021-05-31.

    Returns:
        456 days from 2020-03-01; ``time`` in days since that day (0, 1, ...), ``target`` in deaths a day.

    Source:
        SIVEP-Gripe, Brazilian Ministry of Health, release of 2021-05-31.

    Example:
        >>> series = load_covid_deaths()
        >>> len(series), series.time[-1].item(), series.target.max().item()
        (456, 455.0, 3265.0)
    """
    rows = _rows(COVID)
    days = [date.fromisoformat(row["date"]) for row in rows]
    return Series(
        time=_tensor([float((day - days[0]).days) for day in days]),
        target=_tensor([float(row["deaths"]) for row in rows]),
        time_unit="days since 2020-03-01",
        target_unit="deaths per day",
        name="COVID-19 deaths in Brazil",
        source="SIVEP-Gripe, Brazilian Ministry of Health, release of 2021-05-31",
    )


def load_co2() -> Series:
    """Weekly CO2 concentration at Mauna Loa, 1958-2001.

    The 59 weeks without a measurement are left out, so the series is irregularly sampled.

    Returns:
        2225 weeks; ``time`` in decimal years (the date's fraction of its calendar year, so that a yearly period is 1),
        ``target`` in ppm.

    Source:
        Keeling and Whorf, Scripps Institution of Oceanography.

    Example:
        >>> series = load_co2()
        >>> len(series), series.target[0].item()
        (2225, 316.1)
        >>> print(f"{series.time[0].item():.3f}")
        1958.238
    """
    rows = [row for row in _rows(CO2) if row["co2"]]
    return Series(
        time=_tensor([_decimal_year(date.fromisoformat(row["date"])) for row in rows]),
        target=_tensor([float(row["co2"]) for row in rows]),
        time_unit="year",
        target_unit="ppm",
        name="CO2 at Mauna Loa",
        source="Keeling and Whorf, Scripps Institution of Oceanography",
    )


def load_speech_envelope() -> Series:
    """Amplitude envelope of the 900-1100 Hz band of four seconds of read speech.

    The envelope at 16 kHz is averaged over blocks of 32 samples (2 ms), which leaves a rate of 500 Hz.

    Returns:
        2000 blocks; ``time`` in seconds, the middle of each block (0.001 is the first), ``target`` as a fraction of
        full scale, positive.

    Source:
        Panayotov et al. (2015), LibriSpeech, utterance 198-209-0000.

    Example:
        >>> series = load_speech_envelope()
        >>> len(series), series.time[0].item()
        (2000, 0.001)
    """
    with np.load(path(SPEECH), allow_pickle=False) as archive:
        envelope, rate = archive["envelope"], archive["rate"].item()
    return Series(
        time=(torch.arange(len(envelope), dtype=torch.float64) + 0.5) / rate,
        target=_tensor(envelope),
        time_unit="s",
        target_unit="fraction of full scale",
        name="speech envelope, 900-1100 Hz",
        source="LibriSpeech (Panayotov et al. 2015), utterance 198-209-0000",
    )


def load_powerplant() -> Table:
    """Hourly output of a combined-cycle power plant and the weather around it.

    Returns:
        9568 hours in no order; ``X`` is ``(9568, 4)``: ambient temperature (°C), exhaust vacuum (cm Hg), ambient
        pressure (mbar), relative humidity (%); ``y`` in MW.

    Source:
        Tüfekci and Kaya (2014), Combined Cycle Power Plant, UCI Machine Learning Repository 294.

    Example:
        >>> table = load_powerplant()
        >>> table.X.shape, table.y.shape
        (torch.Size([9568, 4]), torch.Size([9568]))
    """
    with np.load(path(POWERPLANT), allow_pickle=False) as archive:
        X, y = _tensor(archive["X"]), _tensor(archive["y"])
    return Table(
        X=X,
        y=y,
        columns=("temperature (°C)", "vacuum (cm Hg)", "pressure (mbar)", "humidity (%)"),
        target_unit="MW",
        name="combined-cycle power plant",
        source="Tüfekci and Kaya (2014), UCI Machine Learning Repository 294",
    )


def _rows(name: str) -> list[dict[str, str]]:
    with path(name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _tensor(values: list[float] | np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _decimal_year(day: date) -> float:
    first, following = date(day.year, 1, 1), date(day.year + 1, 1, 1)
    return day.year + (day - first).days / (following - first).days

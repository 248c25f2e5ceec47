"""Small real data sets that ship with the package: nothing is downloaded.

Sources and licences are in ``data/LICENSES.md`` beside the files.
"""

from gpseq.datasets.bundled import (
    Series,
    Table,
    load_co2,
    load_covid_deaths,
    load_powerplant,
    load_solar,
    load_speech_envelope,
    path,
)

__all__ = [
    "Series",
    "Table",
    "load_co2",
    "load_covid_deaths",
    "load_powerplant",
    "load_solar",
    "load_speech_envelope",
    "path",
]

"""Real data sets that ship with the package: nothing is downloaded.

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
from gpseq.datasets.fields import Field, load_beijing_air, load_era5_temperature
from gpseq.datasets.images import Images, load_images
from gpseq.datasets.skillcraft import load_skillcraft

__all__ = [
    "Field",
    "Images",
    "Series",
    "Table",
    "load_beijing_air",
    "load_co2",
    "load_covid_deaths",
    "load_era5_temperature",
    "load_images",
    "load_powerplant",
    "load_skillcraft",
    "load_solar",
    "load_speech_envelope",
    "path",
]

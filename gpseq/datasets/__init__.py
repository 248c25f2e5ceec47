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
from gpseq.datasets.corruptions import CORRUPTIONS, corrupt
from gpseq.datasets.fields import Field, load_beijing_air, load_era5_temperature
from gpseq.datasets.images import Images, load_images
from gpseq.datasets.skillcraft import load_skillcraft
from gpseq.datasets.text import (
    Sentences,
    Texts,
    Vocabulary,
    load_blimp,
    load_clinc150,
    load_sentiment,
    split_words,
)

__all__ = [
    "CORRUPTIONS",
    "Field",
    "Images",
    "Sentences",
    "Series",
    "Table",
    "Texts",
    "Vocabulary",
    "corrupt",
    "load_beijing_air",
    "load_blimp",
    "load_clinc150",
    "load_co2",
    "load_covid_deaths",
    "load_era5_temperature",
    "load_images",
    "load_powerplant",
    "load_sentiment",
    "load_skillcraft",
    "load_solar",
    "load_speech_envelope",
    "path",
    "split_words",
]

"""SkillCraft: the table, what its columns are, and the size of all that ships."""

import math

import torch

from gpseq import datasets


def test_the_table_is_centred_and_not_scaled():
    table = datasets.load_skillcraft()
    assert isinstance(table, datasets.Table) and len(table) == 3338
    assert table.X.shape == (3338, 19) and table.y.shape == (3338,)
    assert table.X.dtype == table.y.dtype == torch.float64
    assert table.X.isfinite().all() and table.y.isfinite().all()
    scale = table.X.std(0)
    assert (table.X.mean(0).abs() < 1e-3 * scale).all() and table.y.mean().abs() < 1e-6
    assert scale.max() / scale.min() > 1e8


def test_columns_are_those_of_uci():
    """The first player of UCI's file, as it stands there, without its target: centring is undone by the second."""
    table = datasets.load_skillcraft()
    assert len(table.columns) == len(set(table.columns)) == 19
    order = table.X[:, 0].argsort()
    first, second = order[0], order[1]
    known = {
        "GameID": (52, 55),
        "LeagueIndex": (5, 5),
        "Age (year)": (27, 23),
        "HoursPerWeek (h)": (10, 10),
        "TotalHours (h)": (3000, 5000),
        "APM (1/min)": (143.718, 129.2322),
        "UniqueHotkeys": (7, 4),
        "ActionLatency (ms)": (40.8673, 42.3454),
        "ActionsInPAC": (4.7508, 4.8434),
        "TotalMapExplored": (28, 22),
        "UniqueUnitsMade": (6, 5),
    }
    for column, (a, b) in known.items():
        values = table.X[:, table.columns.index(column)]
        assert math.isclose(values[first] - values[second], a - b, rel_tol=1e-3, abs_tol=1e-4), column
    # GapBetweenPACs of the same two players
    assert math.isclose(table.y[first] - table.y[second], math.log(32.6677 / 32.9194), abs_tol=1e-5)


def test_the_league_is_an_input_of_seven_values():
    table = datasets.load_skillcraft()
    leagues = table.X[:, table.columns.index("LeagueIndex")].unique()
    assert len(leagues) == 7 and torch.allclose(leagues.diff(), torch.ones(6, dtype=torch.float64), atol=1e-4)


def test_all_that_ships_stays_small():
    folder = datasets.path("LICENSES.md").parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 25e6

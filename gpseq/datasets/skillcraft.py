"""A table of many inputs on very different scales: players of a computer game."""

import numpy as np
import torch

from gpseq.datasets.bundled import Table, path

SKILLCRAFT = "uci_skillcraft.npz"
COLUMNS = (
    "GameID",
    "LeagueIndex",
    "Age (year)",
    "HoursPerWeek (h)",
    "TotalHours (h)",
    "APM (1/min)",
    "SelectByHotkeys",
    "AssignToHotkeys",
    "UniqueHotkeys",
    "MinimapAttacks",
    "MinimapRightClicks",
    "NumberOfPACs",
    "ActionLatency (ms)",
    "ActionsInPAC",
    "TotalMapExplored",
    "WorkersMade",
    "UniqueUnitsMade",
    "ComplexUnitsMade",
    "ComplexAbilitiesUsed",
)


def load_skillcraft() -> Table:
    """Players of StarCraft II and what they do in a game.

    Inputs are mean-centred and not scaled: their standard deviations differ by eight orders of magnitude, so scale
    them before use. The first column is a player's number. The target is the logarithm of the mean gap between a
    player's bursts of actions (UCI's column ``GapBetweenPACs``, in ms), mean-centred; the league is among the inputs.

    Returns:
        3338 players in no order; ``X`` is ``(3338, 19)``, ``y`` the centred logarithm of a time.

    Source:
        Blair, Thompson, Henrey and Chen (2013), SkillCraft1 Master Table, UCI Machine Learning Repository 272.

    Example:
        >>> table = load_skillcraft()
        >>> table.X.shape, table.y.shape, table.columns[1]
        (torch.Size([3338, 19]), torch.Size([3338]), 'LeagueIndex')
    """
    with np.load(path(SKILLCRAFT), allow_pickle=False) as archive:
        X, y = torch.from_numpy(archive["X"]), torch.from_numpy(archive["y"])
    return Table(
        X=X,
        y=y,
        columns=COLUMNS,
        target_unit="log ms, mean-centred",
        name="SkillCraft",
        source="Blair et al. (2013), UCI Machine Learning Repository 272",
    )

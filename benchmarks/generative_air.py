"""Real holes in a record of air quality: a VAE with a Gaussian-process prior beside lines, a GP of each channel, a VAE."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gpseq
from benchmarks.tables import table
from examples.generative import air
from gpseq import plots
from gpseq.storage import replace_file

SEEDS = 3
KEPT = Path("build/generative")
#: Files of the package whose change changes a number.
CODE = ("gp_vae", "markov", "kalman", "state_space", "small_matrices", "sparse", "evidence", "observations", "draws")
#: The contender that the goals are about, and those it is to beat.
OURS, RIVALS = air.MARKOV, (air.LINEAR, air.PLAIN)


def load_whole() -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    """All eleven variables: values ``(S, T, 11)``, NaN where missing, names of variables, names of stations.

    Raises:
        FileNotFoundError: the folder that ``GPSEQ_DATA`` names is not set or lacks the file.
        ValueError: the file does not hold what is expected.
    """
    folder = os.environ.get("GPSEQ_DATA")
    if not folder:
        raise FileNotFoundError("GPSEQ_DATA: expected the folder that holds beijing_air.npz, got no such variable.")
    path = Path(folder) / "beijing_air.npz"
    if not path.is_file():
        raise FileNotFoundError(f"GPSEQ_DATA: expected a folder with beijing_air.npz, got {folder}.")
    with np.load(path, allow_pickle=False) as archive:
        if not {"values", "variables", "stations"} <= set(archive.files):
            raise ValueError(f"{path}: expected arrays values, variables and stations, got {sorted(archive.files)}.")
        values = torch.from_numpy(archive["values"])
        variables, stations = tuple(archive["variables"].tolist()), tuple(archive["stations"].tolist())
    if values.dim() != 3 or (len(stations), len(variables)) != (values.shape[0], values.shape[2]):
        raise ValueError(f"{path}: expected values (stations, hours, variables), got {tuple(values.shape)}.")
    return values, variables, stations


def run(smoke: bool) -> dict[str, Any]:
    """Every contender on the same holes, for each seed of the holes and of the networks."""
    settings = air.SMOKE if smoke else air.Settings()
    values, variables, stations = air.shipped() if smoke else load_whole()
    record, val_record, test_record = air.split(values, variables, stations)
    seeds = []
    for seed in range(1 if smoke else SEEDS):
        generator = torch.Generator().manual_seed(seed)
        val = air.lay_holes(val_record, 8 if smoke else air.VAL, generator)
        test = air.lay_holes(test_record, 8 if smoke else air.TEST, generator)
        contenders = {}
        for name in air.CONTENDERS:
            key = {"data": len(variables), "settings": asdict(settings), "seed": seed, "contender": name}
            found = None if smoke else recall(key)
            if found is None:
                p, vae, seconds = air.contend(record, val, test, settings, seed, name)
                found = {"scores": air.score(p, test), "seconds": seconds}
                if vae is not None and name != air.PLAIN:
                    prior = vae.prior if name == air.MARKOV else vae.prior.covar_module
                    found["lengthscales"] = prior.lengthscale.detach().flatten().tolist()
                if not smoke:
                    keep(key, found)
            contenders[name] = found
        lengths = test.length[test.hidden]
        counts = {name: int(((lengths >= low) & (lengths <= high)).sum()) for name, (low, high) in air.LENGTHS.items()}
        seeds.append({"hidden": int(test.hidden.sum()), "by length": counts, "contenders": contenders})
    return {
        "variables": list(variables),
        "stations": len(stations),
        "windows": {"val": len(val.y), "test": len(test.y), "hours": air.WINDOW},
        "settings": asdict(settings),
        "seeds": seeds,
    }


def place_of(key: Mapping[str, Any]) -> Path:
    """The file that keeps a result, by its settings and by the code that it comes from."""
    folder = Path(gpseq.__file__).parent / "generative"
    files = [Path(air.__file__), *(folder / f"{name}.py" for name in CODE)]
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    digest = hashlib.sha256(json.dumps([key, code], sort_keys=True).encode()).hexdigest()
    return KEPT / f"air-{digest[:20]}.json"


def recall(key: Mapping[str, Any]) -> dict[str, Any] | None:
    """A result of an earlier run, or ``None``."""
    path = place_of(key)
    return json.loads(path.read_text())["found"] if path.exists() else None


def keep(key: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Keep a result, so that a run that is stopped goes on."""
    KEPT.mkdir(parents=True, exist_ok=True)
    replace_file(place_of(key), json.dumps({"key": dict(key), "found": found}, indent=1).encode())


# --- report -----------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any], figures: Path) -> list[str]:
    """What was done, the scores, the goals, the scores by length of hole."""
    seeds = result["seeds"]
    names = list(seeds[0]["contenders"])
    return [
        "## Real holes in a record of air quality",
        _about(result),
        _scores(seeds, names),
        *_goals(seeds),
        _by_length(seeds, names),
        *_reading(seeds, names),
        _figure(seeds, names, figures),
    ]


def values_of(seeds: Sequence[Mapping[str, Any]], name: str, key: str) -> list[float]:
    """One score of a contender, for each seed."""
    return [seed["contenders"][name]["scores"][key] for seed in seeds]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _about(result: Mapping[str, Any]) -> str:
    seeds, windows, settings = result["seeds"], result["windows"], result["settings"]
    hidden = ", ".join(f"{seed['hidden']:,}" for seed in seeds)
    shares = ", ".join(
        f"{100 * statistics.fmean(seed['by length'][name] / seed['hidden'] for seed in seeds):.0f} % in holes of {name}"
        for name in air.LENGTHS
    )
    return (
        f"{len(result['variables'])} variables at {result['stations']} stations in Beijing, hourly; a series is a station "
        f"with all of its variables. The first two years are for training, the third for validation, the fourth for test. "
        "Holes are as they occur: over windows of "
        f"{windows['hours']} hours of the test year lie the holes, with their channels and durations, of another station and "
        "another day of that year, and what they cover of measured numbers is to be told. Validation holes come from the "
        "third year likewise, those of training from the first two. Concentrations and rain are logarithms (log1p); all is "
        "standardised by the training years, and so are the scores. "
        f"{windows['test']} test windows for each seed, with {hidden} hidden numbers: {shares}. "
        f"Scores are over hidden numbers, each by itself, mean ± standard deviation over {len(seeds)} "
        f"seed{'s' * (len(seeds) != 1)}, which draw holes, windows and networks.\n\n"
        f"*{air.LINEAR}*: in each channel, and about it a Gaussian whose spread is fitted to validation holes. "
        f"*{air.EXACT}*: exact, Matérn-3/2, by marginal likelihood. *{air.PLAIN}*: encoder, decoder, noise of each channel "
        "and training of the GP-VAEs, with a standard normal prior at each hour. "
        f"*{air.MARKOV}*: `GPPriorVAE`, exact paths by a Kalman filter; *{air.HIPPO}*: the same kernel through "
        f"{settings['features']} HiPPO features. All three are trained for {settings['steps']:,} steps of "
        f"{settings['batch']} windows, with {settings['latents']} latents; what the encoder sees of them has further real holes "
        "of the training years, and what they cover is still part of the loss. The best of several looks at the validation "
        "holes, by NLPD, is kept. The settings of training were chosen on other validation holes with the Matérn prior, and "
        "serve all three. NLPD in nats, of VAEs by 64 draws."
    )


def _scores(seeds: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    rows = [
        [
            f"**{name}**" if name == OURS else name,
            spread(values_of(seeds, name, "rmse")),
            spread(values_of(seeds, name, "nlpd")),
            spread([100 * value for value in values_of(seeds, name, "coverage")], 1),
            f"{statistics.fmean(seed['contenders'][name]['seconds'] for seed in seeds):.0f}",
        ]
        for name in names
    ]
    return table(["contender", "RMSE", "NLPD", "in the 95 % interval [%]", "CPU seconds"], rows)


def _goals(seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for rival in RIVALS:
        gains = [
            theirs - ours
            for theirs, ours in zip(values_of(seeds, rival, "rmse"), values_of(seeds, OURS, "rmse"), strict=True)
        ]
        verdict = "met" if statistics.fmean(gains) > 0 else "missed"
        lines.append(
            f"- Goal: *{OURS}* has a smaller RMSE than *{rival}*: **{verdict}**; RMSE smaller by {spread(gains)}, and "
            f"in {sum(gain > 0 for gain in gains)} of {len(gains)} seeds."
        )
    return ["\n".join(lines)]


def _by_length(seeds: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    rows = [
        [
            name,
            *(spread(values_of(seeds, name, f"{key}, {length}")) for key in ("rmse", "nlpd") for length in air.LENGTHS),
        ]
        for name in names
    ]
    heads = [f"{key}, {length}" for key in ("RMSE", "NLPD") for length in air.LENGTHS]
    return table(["by length of the hole", *heads], rows)


def _reading(seeds: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Who is best where, as the means say, and whether the second is further away than the spread over seeds."""
    lines = []
    keys = [("RMSE", "rmse"), ("NLPD", "nlpd")]
    keys += [(f"RMSE, holes of {length}", f"rmse, {length}") for length in air.LENGTHS]
    keys += [(f"NLPD, holes of {length}", f"nlpd, {length}") for length in air.LENGTHS]
    for title, key in keys:
        first, second = sorted(names, key=lambda name: statistics.fmean(values_of(seeds, name, key)))[:2]
        gaps = [b - a for a, b in zip(values_of(seeds, first, key), values_of(seeds, second, key), strict=True)]
        lines.append(
            f"- {title}: least for *{first}*; next is *{second}*, {spread(gaps)} more, "
            f"more in {sum(gap > 0 for gap in gaps)} of {len(gaps)} seeds."
        )
    return ["\n".join(lines)]


def _figure(seeds: Sequence[Mapping[str, Any]], names: Sequence[str], figures: Path) -> str:
    figure = plots.new_figure(9.0, 3.4)
    left, right = figure.subplots(1, 2)
    scores = {name: [seed["contenders"][name]["scores"] for seed in seeds] for name in names}
    air.draw_by_length(left, scores, "rmse", "RMSE, standardised")
    air.draw_by_length(right, scores, "nlpd", "NLPD [nats]")
    right.get_legend().remove()
    plots.save_figure(figure, figures / "generative_air.png")
    return "![RMSE and NLPD of imputed numbers by length of the hole](figures/generative_air.png)"

"""Write the benchmark report and its figures from the JSON results.

python -m benchmarks.report [--results DIR] [--out DIR]
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.run import CASES
from benchmarks.tables import table
from benchmarks.uncertainty.summary import TITLES, insert, summary
from gpseq import plots

ROOT = Path(__file__).parent.parent


def main() -> None:
    """One section a case, in the order in which the cases are listed below."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where benchmarks.md and figures/ go")
    args = parser.parse_args()
    figures = args.out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    files = {case: args.results / f"{case}.json" for case in CASES}
    documents = {case: json.loads(file.read_text()) for case, file in files.items() if file.exists()}
    missing = [case for case in CASES if case not in documents]
    machine = documents["solar"]["machine"]
    parts = [
        "# Benchmarks",
        "<!-- Written by `make report` from benchmarks/results/*.json; do not edit. -->",
        f"Measured by `make benchmarks` on {machine['cores']} cores ({machine['processor']}), Python {machine['python']}, "
        f"torch {machine['torch']}, GPyTorch {machine['gpytorch']}. Methods are compared within one run on one machine; "
        "absolute times vary from machine to machine and with what else it does.",
    ]
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.")
    for case in documents:
        section = SECTIONS.get(case) or importlib.import_module(f"benchmarks.{case}").report
        parts += section(documents[case]["result"], figures)
    (args.out / "benchmarks.md").write_text("\n\n".join(parts) + "\n")
    if args.out == ROOT / "docs":
        results = {case: documents[case]["result"] for case in TITLES if case in documents}
        shown = {case: result for case, result in results.items() if case in ("fashion", "agreement")}
        insert(ROOT / "README.md", "results", summary(shown))
        insert(ROOT / "docs" / "guide" / "costs.md", "results", summary(results))


def solar(result: dict[str, Any], figures: Path) -> list[str]:
    """Distance to the exact GP, seed by seed and method by method."""
    seeds = result["seeds"]
    names = list(seeds[0]["methods"])

    def gap(seed: dict[str, Any], name: str, score: str) -> float:
        return seed["methods"][name][score] - seed["methods"]["exact"][score]

    by_seed = [
        [
            s["seed"],
            f"{s['lengthscale']:.2f}",
            s["auto"],
            f"{s['methods']['exact']['rmse']:.4f}",
            f"{gap(s, 'LegS auto', 'rmse'):+.1e}",
            f"{s['methods']['exact']['nlpd']:.4f}",
            f"{gap(s, 'LegS auto', 'nlpd'):+.1e}",
        ]
        for s in seeds
    ]
    by_method = []
    for name in names:
        rmse = [gap(s, name, "rmse") for s in seeds]
        nlpd = [gap(s, name, "nlpd") for s in seeds]
        seconds = [sum(s["methods"][name]["seconds"]) for s in seeds]
        by_method.append(
            [
                name,
                f"{statistics.median(rmse):+.4f}",
                f"{max(rmse, key=abs):+.4f}",
                f"{statistics.median(nlpd):+.4f}",
                f"{max(nlpd, key=abs):+.4f}",
                f"{statistics.median(seconds):.3f}",
            ]
        )
    rho = 1.25 * (result["rows"] - 1) / statistics.median(s["lengthscale"] for s in seeds)

    def median_gap(name: str) -> str:
        return f"{statistics.median(gap(s, name, 'rmse') for s in seeds):+.4f}"

    versus = ", ".join(
        f"{median_gap(f'points {size}')} (polynomials {median_gap(f'LegS {size}')}) at {size}"
        for size in ("50", "150", "auto")
    )
    worst = max(abs(gap(s, "LegS auto", score)) for s in seeds for score in ("rmse", "nlpd"))
    figure = plots.new_figure(11, 3.4)
    shown = ["LegS auto", "LegS 50", "points 50", "OVC 12"]
    matrices = {name: _square(seeds[0]["methods"][name]["rmse_by_chunk"]) for name in shown}
    plots.plot_past_errors(list(figure.subplots(1, len(shown))), matrices, "RMSE, held-out years")
    plots.save_figure(figure, figures / "solar_past.png")
    return [
        "## Solar irradiance: does the stream end where the exact GP ends?",
        "The paper's own series (Lean, 2004; `tsi_11yr_bkgrnd`, standardised, yearly since 1610) in 10 sequential chunks; "
        "20 % of the years held out at random; RBF kernel and noise by maximum likelihood on the first chunk, several "
        "starts; all methods and the exact GP share them. `auto` is the number of features that "
        "`HippoFeatures.required(kernel, 1.25 × span, noise=...)` names.",
        table(
            ["seed", "lengthscale [years]", "auto", "exact RMSE", "auto − exact", "exact NLPD", "auto − exact"], by_seed
        ),
        f"The largest difference of `auto` from the exact GP over all seeds and both scores is **{worst:.1e}**.",
        table(
            ["method", "RMSE − exact, median", "worst", "NLPD − exact, median", "worst", "all updates [s], median"],
            by_method,
        ),
        f"`LegS 50` and `LegS 150` are the paper's sizes. The padded horizon is about {rho:.0f} lengthscales, where the "
        f"capacity law asks for {1.35 * rho:.0f} features at 0.1 % of the prior variance: 50 are far below that and 150 a "
        "little above. `points` is the same streaming update with inducing points on an even grid "
        f"over what has been seen, laid anew at each chunk; beside the polynomials of equal size its median RMSE is off by {versus}. `SVGP refit` keeps all data and is fitted anew at each chunk: "
        "what its number of points can do at best. `OVC` turns the first chunk into pseudo-data at 12 or 50 inducing "
        "points and then stores every new point, so it is nearly an exact GP here; with 50 points on 31 data its "
        "pseudo-data lose accuracy in GPyTorch's arithmetic.",
        "![RMSE on every past chunk as the stream goes on, first seed](figures/solar_past.png)",
    ]


def throughput(result: dict[str, Any], figures: Path) -> list[str]:
    """Rate, flatness in time and memory, and the floor."""
    rows = []
    for name, s in result["streams"].items():
        low, _, high = s["update_quartiles_us"]
        growth = s["resident_growth_mb"]
        rows.append(
            [
                name if name.startswith("chunks") else f"chunks of {s['chunk']}, {name}",
                f"{s['points']:,}",
                f"{s['points_per_second']:,.0f}",
                f"{s['update_median_us']:,.0f} ({low:,.0f} to {high:,.0f})",
                f"{s['last_over_first']:.2f}",
                f"{s['basis_changes']} × {s['basis_change_median_us'] / 1000:.1f}",
                "" if growth is None else f"{growth:.2f}",
            ]
        )
    floor = result["floor"]
    single = result["streams"]["chunks of 1"]["update_median_us"]
    ways = [
        [name, f"{us:,.0f}", f"{floor['points_per_second'][name]:,.0f}", f"{floor['update_over'].get(name, 1.0):.2f}"]
        for name, us in floor["median_us"].items()
    ]
    return [
        "## One million points",
        f"RBF kernel, M = {result['num_features']}, Q = {result['num_nodes']}, from a horizon of 1 to 20 lengthscales, "
        f"through `StreamingGP.update`, {result['threads']} threads.",
        table(
            [
                "stream",
                "points",
                "points/s, all included",
                "update [µs], median (quartiles)",
                "last 100 / first 100",
                "basis changes [ms]",
                "resident memory, update 10 to 1,000 [MB]",
            ],
            rows,
        ),
        f"The floor. Each point costs {floor['flops_per_point']:,} floating-point operations (2 M Q for the whitened "
        f"features, 2 M² for the information) and {floor['kernel_evaluations_per_point']} kernel evaluations. Chunks of "
        "1,000 on a fixed basis, in turn with a loop that does nothing but that, with no checks, no evidence and no "
        "object around it:",
        table(["way", "µs", "points/s", "update / this, median of pairs"], ways),
        f"An update of a single point costs {single:,.0f} µs, nearly all of it the fixed cost of GPyTorch's kernel calls "
        "and of the checks: send points in chunks where you can.",
    ]


def conditioning(result: dict[str, Any], figures: Path) -> list[str]:
    """Update time and stored numbers beside OVC."""
    rows = [
        [
            f"{r['points']:,}",
            f"{r['stream_us'] / 1000:.2f}",
            f"{r['ovc_us'] / 1000:.1f}",
            f"{r['ratio']:.0f}",
            f"{r['stream_numbers']:,}",
            f"{r['ovc_numbers']:,}",
        ]
        for r in result["rows"]
    ]
    return [
        "## One more chunk after many",
        f"Medians of the last {result['timed']} chunks of {result['chunk']} at each length. OVC is `get_fantasy_model`, GPyTorch's own "
        "online conditioning, without the further work that it does at the next prediction. It was given all earlier points "
        "at once: chunk by chunk, its growing matrices did not fit in 24 GB at 10,000 points.",
        table(
            [
                "points learnt",
                "stream update [ms]",
                "OVC update [ms]",
                "OVC / stream",
                "numbers kept, stream",
                "numbers kept, OVC",
            ],
            rows,
        ),
    ]


def covariance(result: dict[str, Any], figures: Path) -> list[str]:
    """Accuracy of the covariances."""
    kuu = result["kuu"]
    routes = [
        [
            f"{r['rho']:g}",
            r["order"],
            f"{r['kuu_frequency']:.0e}",
            f"{r['kuf_frequency']:.0e}",
            f"{r['kuf_recurrence']:.0e}",
        ]
        for r in result["routes"]
    ]
    parity = [
        [r["order"], f"{r['build_us']:,.0f}", f"{r['dense_us']:,.0f}", f"{r['parity_us']:,.0f}"]
        for r in result["parity"]
    ]
    return [
        "## Interdomain covariances",
        f"Kuu of an RBF kernel, lengthscale {kuu['lengthscale']}, horizon 1, {kuu['order']} features, against 30-digit "
        f"arithmetic by another formula (lag reduction): largest error **{kuu['max_error']:.1e}**.",
        "Quadrature against the two independent routes in `gpseq.hippo`, largest difference:",
        table(
            ["horizon [lengthscales]", "features", "Kuu, frequency", "Kuf, frequency", "Kuf, exact recurrence"], routes
        ),
        "Structure. Under a stationary kernel, modes of unequal parity are uncorrelated, so Kuu could be factored as two "
        "matrices of half the size. Median times in µs; a basis change needs all of the first column and one of the other "
        "two:",
        table(["features", "form Kuu from the kernel matrix", "Cholesky, dense", "Cholesky, by parity"], parity),
        "Forming the matrix, which parity does not shorten for a kernel that is only called, costs more than the factor. "
        "So `kuu` returns a dense operator.",
    ]


def stretching(result: dict[str, Any], figures: Path) -> list[str]:
    """float32 data against float64 data."""
    rows = [
        [
            r["transfer"],
            r["num_features"],
            f"{r['updates']:,}",
            f"{r['mean_difference']:.1e}",
            f"{r['std_difference']:.1e}",
            f"{r['smallest_variance']:.1e}",
            "yes" if r["finite"] else "no",
            f"{r['rmse_of_signal']:.4f}",
        ]
        for r in result["rows"]
    ]
    return [
        "## A thousand re-stretchings",
        "Every update passes the horizon (`horizon_growth=None`), so the basis changes each time. float32 hyperparameters "
        "and data against float64 ones; largest differences over 500 times of the past and just beyond it.",
        table(
            [
                "transfer",
                "features",
                "updates",
                "mean, float32 − float64",
                "standard deviation",
                "smallest variance",
                "finite",
                "RMSE to the signal",
            ],
            rows,
        ),
    ]


def series(result: dict[str, Any], figures: Path) -> list[str]:
    """Rough and noisy series, at several sizes."""
    rows = []
    for s in result["series"]:
        exact = s["methods"]["exact"]
        for name, scores in s["methods"].items():
            if name == "exact":
                continue
            rows.append(
                [
                    f"{s['series']} ({s['rows']:,})",
                    s["kernel"],
                    f"{s['lengthscale']:.3g}",
                    name.removeprefix("LegS ") + (" (auto)" if name == f"LegS {s['auto']}" else ""),
                    f"{scores['residual']:.2%}",
                    f"{scores['rmse']:.4f}",
                    f"{scores['rmse'] - exact['rmse']:+.4f}",
                    f"{scores['nlpd']:.3f}",
                    f"{scores['nlpd'] - exact['nlpd']:+.3f}",
                    f"{sum(scores['seconds']):.2f}",
                ]
            )
    short = [f"{s['series']} with {s['kernel']}" for s in result["series"] if not s["auto_holds"]]
    lacking = (
        f"`auto` stops at 600 features here; that is not enough for {', '.join(short)}: the exact GP, or a method with a "
        "shorter memory, is the better choice there."
        if short
        else "`auto` found a number of features under 600 for every series."
    )
    return [
        "## Rough and noisy series, and what lack of capacity does",
        "Weekly CO2 at Mauna Loa (time in years), a speech envelope at 500 Hz (seconds), and the power plant of UCI sorted "
        "by its first column, ambient temperature, which serves as time (a stand-in for a stream: every fourth row). Ten "
        "chunks, 20 % held out, hyperparameters by maximum likelihood on the first chunk.",
        table(
            [
                "series (rows)",
                "kernel",
                "lengthscale",
                "features",
                "residual variance",
                "RMSE",
                "− exact",
                "NLPD",
                "− exact",
                "all updates [s]",
            ],
            rows,
        ),
        lacking
        + " Where the capacity law is violated nothing breaks: the prediction turns smooth, its variance rises by "
        "the part of the prior that is not held, at all times alike, and the model warns.",
    ]


def counts(result: dict[str, Any], figures: Path) -> list[str]:
    """Coverage by chunk, distance to a batch fit, and time."""
    by_size = {
        size: [r for r in result["rows"] if r["size"] == size] for size in sorted({r["size"] for r in result["rows"]})
    }

    def coverage(rows: list[dict[str, Any]], when: str) -> list[str]:
        chunks = [[r[when][c] for r in rows] for c in range(len(rows[0][when]))]
        shares = [sum(s["inside"] for s in c) / sum(s["count"] for s in c) for c in chunks]
        pooled = sum(s["inside"] for c in chunks for s in c) / sum(s["count"] for c in chunks for s in c)
        return [f"{pooled:.1%}", *(f"{share:.1%}" for share in shares)]

    shares = [
        [size, label, *coverage(rows, when)]
        for size, rows in by_size.items()
        for label, when in (("just learnt", "just_learnt"), ("at the end", "at_end"))
    ]
    distances = [
        [
            size,
            f"{statistics.mean(r['nlpd'] for r in rows):.3f}",
            f"{statistics.mean(r['nlpd_batch'] for r in rows):.3f}",
            f"{statistics.mean(r['nlpd'] - r['nlpd_batch'] for r in rows):+.4f}",
            f"{max((r['nlpd'] - r['nlpd_batch'] for r in rows), key=abs):+.4f}",
            f"{max((r['nlpd_frozen'] - r['nlpd_batch'] for r in rows), key=abs):+.4f}",
            f"{max(r['residual'] for r in rows):.2%}",
            f"{statistics.median(s for r in rows for s in r['steps']):.0f}",
            f"{statistics.median(s for r in rows for s in r['update_seconds']):.3f}",
            f"{statistics.median(s for r in rows for s in r['seconds'][1:]):.1f}",
            f"{statistics.median(s for r in rows for s in r['adam_seconds']):.1f}",
            f"{statistics.median(s for r in rows for s in r['adam_seconds']) / statistics.median(s for r in rows for s in r['update_seconds']):.0f}",
        ]
        for size, rows in by_size.items()
    ]
    low, high = (f(r["dispersion"] for r in result["rows"]) for f in (min, max))
    return [
        "## Daily deaths: counts through a stream",
        "Deaths by day of death in the first 365 days (a stand-in for the paper's Santa Catarina), negative binomial with "
        "log link, Matern 5/2, five tasks of 73 days, 20 % of the days held out, 5 seeds. Hyperparameters are fitted to the "
        "first task by the bound, under log-normal priors (medians: 60 days, variance 2, dispersion 800; spread 0.3). Then "
        'the days arrive in weeks, the horizon grows by a tenth as often as needed, and `learn="basis_change"` lets the '
        "hyperparameters follow. Coverage counts the held-out days of each task inside the 95 % interval of new counts, "
        "when the task has just been learnt, and again after all tasks.",
        table(
            ["features", "held-out days scored", "95 % interval, all", *(f"chunk {c + 1}" for c in range(5))], shares
        ),
        table(
            [
                "features",
                "NLPD, stream",
                "NLPD, batch",
                "difference, mean",
                "worst seed",
                "worst seed, hyperparameters frozen at their last values",
                "residual variance",
                "steps an update, median",
                "one update with a task [s]",
                "a task in weeks, learning [s]",
                f"{result['adam_steps']:,} Adam steps [s]",
                "Adam / update",
            ],
            distances,
        ),
        "`batch` is the same model (features, hyperparameters, likelihood) given all training days at once. Adam trains a "
        "Cholesky q of the same model on the same bound of one task. The dispersions that were learnt lie between "
        f"{low:.0f} and {high:.0f}.",
    ]


def moons(result: dict[str, Any], figures: Path) -> list[str]:
    """Accuracy on all past tasks after the last."""
    rows = []
    for size, method in dict.fromkeys((r["size"], r["method"]) for r in result["rows"]):
        last = [r["accuracy"][-1] for r in result["rows"] if (r["size"], r["method"]) == (size, method)]
        tasks = [statistics.mean(a[t] for a in last) for t in range(len(last[0]))]
        overall = [statistics.mean(a) for a in last]
        rows.append(
            [size, method, *(f"{t:.3f}" for t in tasks), f"{statistics.mean(overall):.3f}", f"{min(overall):.3f}"]
        )
    return [
        "## Two moons: classes along a path",
        "600 points in three tasks by their first coordinate, half of each held out; Bernoulli likelihood, 5 seeds. Accuracy "
        "on each past task after the last one. 20 is the paper's size.",
        table(["size", "features", "task 1", "task 2", "task 3", "mean", "worst seed"], rows),
        "`kernel-farthest` is the ablation in which each step of the path goes to the point that is least alike. The paper "
        "reports that it forgets.",
    ]


def memories(result: dict[str, Any], figures: Path) -> list[str]:
    """Error and NLPD by age of the past."""
    parts = [
        "## Which memory keeps what",
        f"Ten chunks, 20 % held out at random, 5 seeds, {result['series'][0]['size']} features or points each. Kernel and noise "
        "by maximum likelihood on the first chunk (RBF; Matern 3/2 on the first three chunks of the speech, which begins "
        "with silence); in the last series as stated. The horizon ends at the data for all. The composite puts "
        f"{result['long']} features on the whole past and the others on the last eighth of the whole span, as long as the "
        "window of `LegT window`. The pyramid has three windows: the whole past, its last quarter, its last sixteenth. "
        "`re-selected` picks its points at each update by greedy conditional variance; `optimised` climbs the online "
        "bound by 300 Adam steps a chunk.",
    ]
    figure = plots.new_figure(11, 2.7 * len(result["series"]))
    axes = figure.subplots(len(result["series"]), 2, squeeze=False)
    for row, series in enumerate(result["series"]):
        names = list(series["seeds"][0])
        rows = []
        for name in names:
            runs = [seed[name] for seed in series["seeds"]]
            past = {
                score: [statistics.mean(r[f"{score}_by_chunk"][-1][c] for r in runs) for c in range(10)]
                for score in ("rmse", "nlpd")
            }
            rows.append(
                [
                    name,
                    f"{statistics.mean(r['rmse'] for r in runs):.3f}",
                    f"{past['rmse'][-1]:.3f}",
                    f"{statistics.mean(past['rmse'][:5]):.3f}",
                    f"{statistics.mean(r['nlpd'] for r in runs):.3f}",
                    f"{past['nlpd'][-1]:.3f}",
                    f"{statistics.mean(past['nlpd'][:5]):.3f}",
                    f"{statistics.mean(sum(r['seconds']) for r in runs):.2f}",
                ]
            )
            if name in SHOWN:
                age = [9 - c for c in range(10)]
                for column, score in enumerate(("rmse", "nlpd")):
                    axes[row][column].plot(
                        age, past[score], marker="o", markersize=3, linewidth=1.3, color=SHOWN[name], label=name
                    )
        for column, score in enumerate(("RMSE", "NLPD")):
            plots.style_axes(
                axes[row][column],
                "age of the past [chunks]" if row == len(result["series"]) - 1 else "",
                f"{series['series']}: {score}",
            )
            axes[row][column].invert_xaxis()
        axes[row][0].set_yscale("log")
        axes[row][1].set_yscale("symlog", linthresh=1.0)
        parts += [
            f"**{series['series']}** ({series['rows']:,} rows)",
            table(
                [
                    "memory",
                    "RMSE, all",
                    "last chunk",
                    "first half",
                    "NLPD, all",
                    "last chunk",
                    "first half",
                    "all updates [s]",
                ],
                rows,
            ),
        ]
    axes[0][0].legend(fontsize=7, frameon=False, ncols=2)
    plots.save_figure(figure, figures / "memories.png")
    parts += [
        "![Error and NLPD by age of the past at the end, means over seeds](figures/memories.png)",
        "On the trend with late detail the composite beats either of its parts at equal size, because it spends few features "
        "on the trend and the others where the detail is. Elsewhere there is no free lunch: below capacity a memory that is "
        "sharper near is blunter far back. `vfe` is the default for LegS, `adf` for whatever forgets; the rows that name the "
        "other one show what the choice does.",
    ]
    return parts


#: Which memories are drawn, and in which colour.
SHOWN = {
    "LegS": plots.BLUE,
    "LegS + LegT": plots.ORANGE,
    "pyramid": plots.GREEN,
    "points, re-selected": plots.VERMILION,
    "points, optimised": plots.GREY,
    "exact": "black",
}


def adaptive(result: dict[str, Any], figures: Path) -> list[str]:
    """Residual variance at every time and the order that it took."""
    rows = []
    for series in dict.fromkeys(s["series"] for s in result["streams"]):
        for tolerance in sorted({s["tolerance"] for s in result["streams"]}, reverse=True):
            runs = [s for s in result["streams"] if s["series"] == series and s["tolerance"] == tolerance]
            last = [r["orders"][-1] for r in runs]
            rows.append(
                [
                    series,
                    f"{tolerance:.1%}",
                    len(runs),
                    sum(len(r["times"]) for r in runs),
                    f"{max(v for r in runs for v in r['residuals']):.3%}",
                    f"{result['first_order']} to {min(last)}" + (f"–{max(last)}" if max(last) > min(last) else ""),
                ]
            )
    figure = plots.new_figure(10, 3.2)
    left, right = figure.subplots(1, 2)
    shown = [s for s in result["streams"] if s["seed"] == 0 and s["series"].startswith("Solar")]
    for run, colour in zip(shown, (plots.BLUE, plots.ORANGE), strict=False):
        left.step(run["times"], run["orders"], where="post", color=colour, label=f"tolerance {run['tolerance']:.1%}")
        right.semilogy(run["times"], run["residuals"], color=colour, marker=".", markersize=4, linewidth=0.8)
        right.axhline(run["tolerance"], color=colour, linewidth=0.8, linestyle=(0, (4, 2)))
    left.legend(fontsize=8, frameon=False)
    plots.style_axes(left, "years seen", "features")
    plots.style_axes(right, "years seen", "residual prior variance")
    right.set_ylim(bottom=1e-6)
    plots.save_figure(figure, figures / "adaptive.png")
    return [
        "## A memory that sizes itself",
        "Chunks of ten, `max_features=2000`. The residual variance is read after every update.",
        table(["stream", "tolerance", "seeds", "updates", "largest residual", "features"], rows),
        "![Features and residual variance as Solar goes on, first seed; dashed: the tolerances](figures/adaptive.png)",
    ]


def paths(result: dict[str, Any], figures: Path) -> list[str]:
    """Exactness, memory, and the distance of the published route."""
    memory = result["memory"]
    rows = []
    for name in result["routes"][0]["routes"]:
        runs = [r["routes"][name] for r in result["routes"]]
        kuu = [r["kuu_distance"] for r in runs]
        rows.append(
            [
                name,
                "" if kuu[0] is None else f"{statistics.mean(kuu):.1%}",
                f"{statistics.mean(r['mean_distance'] for r in runs):.4f}",
                f"{statistics.mean(r['rmse'] for r in runs):.4f}",
                f"{statistics.mean(r['nlpd'] for r in runs):.4f}",
                f"{statistics.mean(r['seconds'] for r in runs):.2f}",
            ]
        )
    exact = ", ".join(f"{r['difference']:.0e} (M = {r['order']})" for r in result["recurrence"])
    tenths = memory["seconds"]
    return [
        "## Paths through many dimensions",
        f"**Exactness.** Recurrence with irregular physical steps, 200 points, against the explicit cell weights: {exact}.",
        f'**Constant memory.** `"rff"` mode over {memory["points"]:,} points: the state dict holds {memory["numbers"][0]:,} numbers after the '
        f"first tenth and {memory['numbers'][-1]:,} after the last; the last tenth took {tenths[-1] / tenths[0]:.2f} times as long as the first.",
        f"**The published route.** UCI power plant sorted by temperature, {result['routes'][0]['rows']:,} rows in ten tasks, 20 % held out, "
        f"{result['size']} features, kernel given, {len(result['routes'])} seeds. Distances are from the first row: Frobenius, relative, in Kuu; "
        "root mean square in predictive means (targets have unit variance).",
        table(["route", "Kuu", "predictive mean", "RMSE", "NLPD", "all updates [s]"], rows),
    ]


def learning(result: dict[str, Any], figures: Path) -> list[str]:
    """NLPD before and after the change."""

    def mean(scores: list[list[float]]) -> float:
        return sum(s for s, _ in scores) / sum(n for _, n in scores)

    rows, labels = [], {"frozen": "frozen", "basis_change": "`basis_change`", "ensemble": "ensemble of nine"}
    changes = list(dict.fromkeys(r["change"] for r in result["series"]))
    figure = plots.new_figure(11, 3.2)
    axes = figure.subplots(1, len(changes), squeeze=False)[0]
    for ax, change in zip(axes, changes, strict=True):
        runs = [r["methods"] for r in result["series"] if r["change"] == change]
        for (name, label), colour in zip(labels.items(), (plots.GREY, plots.BLUE, plots.ORANGE), strict=True):
            scores = [r[name]["nlpd_sum_and_count"] for r in runs]
            half = len(scores[0]) // 2
            before, after = ([mean(s[:half]) for s in scores], [mean(s[half:]) for s in scores])
            gain = [mean(r["frozen"]["nlpd_sum_and_count"][half:]) - a for r, a in zip(runs, after, strict=True)]
            loss = [b - mean(r["frozen"]["nlpd_sum_and_count"][:half]) for r, b in zip(runs, before, strict=True)]
            rows.append(
                [
                    change,
                    label,
                    f"{statistics.mean(before):.3f}",
                    f"{statistics.mean(after):.3f}",
                    "" if name == "frozen" else f"{max(loss):+.3f}",
                    "" if name == "frozen" else f"{-min(gain):+.3f}",
                    f"{statistics.mean(r[name]['nlpd_at_end'] for r in runs):.3f}",
                    f"{statistics.mean(r[name]['seconds'] for r in runs):.1f}",
                ]
            )
            pooled = [mean([s[c] for s in scores if s[c][1] > 0]) for c in range(len(scores[0]))]
            ax.plot(pooled, color=colour, linewidth=1.3, label=label.strip("`"))
        ax.axvline(len(pooled) / 2 - 0.5, color="0.6", linewidth=0.8)
        if ax.get_ylim()[1] > 1:
            ax.set_yscale("symlog", linthresh=1.0)
        plots.style_axes(ax, "chunk", "NLPD, just learnt" if ax is axes[0] else "")
        ax.set_title(change, fontsize=9)
    axes[0].legend(fontsize=8, frameon=False)
    plots.save_figure(figure, figures / "learning.png")
    endurance = result["endurance"]
    return [
        "## Hyperparameters that move",
        f"A thousand points in 50 chunks on 40 units of time, {result['size']} features, 5 seeds; 20 % held out. Hyperparameters by maximum "
        "likelihood on the first fifth; half-way something changes. NLPD of the held-out rows of a chunk when it has just "
        "been learnt, averaged over the chunks before and after the change. `worst` is the seed that compares worst with frozen ones.",
        table(
            [
                "change",
                "method",
                "before",
                "after",
                "worst, before",
                "worst, after",
                "whole past, at the end",
                "all updates [s]",
            ],
            rows,
        ),
        "![NLPD of each chunk just after it was learnt, pooled over seeds; the line marks the change](figures/learning.png)",
        f"{endurance['updates']} updates that each change the basis and learn: "
        + ("every state finite, no failure" if endurance["finite"] else "**not finite**")
        + f"; the noise went from {endurance['noise'][0]:.3f} to {endurance['noise'][-1]:.3f} (standard deviation; 0.1 before the "
        "change and 0.4 after it).",
    ]


def _square(rows: list[list[float]]) -> list[list[float]]:
    return [row + [float("nan")] * (len(rows) - len(row)) for row in rows]


#: A case that is not here has its ``report`` beside its ``run``.
SECTIONS = {
    "solar": solar,
    "throughput": throughput,
    "conditioning": conditioning,
    "covariance": covariance,
    "stretching": stretching,
    "series": series,
    "counts": counts,
    "moons": moons,
    "memories": memories,
    "adaptive": adaptive,
    "paths": paths,
    "learning": learning,
}

if __name__ == "__main__":
    main()

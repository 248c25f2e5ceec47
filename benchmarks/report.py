"""Write the benchmark report and its figures from the JSON results.

python -m benchmarks.report [--results DIR] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

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
    documents = {case: json.loads((args.results / f"{case}.json").read_text()) for case in SECTIONS}
    machine = documents["solar"]["machine"]
    parts = [
        "# Benchmarks",
        "<!-- Written by `make report` from benchmarks/results/*.json; do not edit. -->",
        f"Measured by `make benchmarks` on {machine['cores']} cores ({machine['processor']}), Python {machine['python']}, "
        f"torch {machine['torch']}, GPyTorch {machine['gpytorch']}. Methods are compared within one run on one machine; "
        "absolute times vary from machine to machine and with what else it does.",
    ]
    for case, section in SECTIONS.items():
        parts += section(documents[case]["result"], figures)
    (args.out / "benchmarks.md").write_text("\n\n".join(parts) + "\n")


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


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


def _square(rows: list[list[float]]) -> list[list[float]]:
    return [row + [float("nan")] * (len(rows) - len(row)) for row in rows]


SECTIONS = {
    "solar": solar,
    "throughput": throughput,
    "conditioning": conditioning,
    "covariance": covariance,
    "stretching": stretching,
    "series": series,
}

if __name__ == "__main__":
    main()

"""Tables, pictures and the outcome, from the JSON of the experiment."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.pseudo_video.families import ORDERS, TITLES
from benchmarks.pseudo_video.pictures import unpack
from benchmarks.pseudo_video.verdicts import comparisons, goals, outcome
from benchmarks.tables import table
from examples.generative.frames import IMAGE, Recipe
from examples.generative.pseudo_videos import draw_rows

#: Videos of each contender in the picture of whole videos.
VIDEOS = 2
#: Recall that a contender has that has learnt anything of the variety of the images.
LEARNT = 0.01


def report_all(result: Mapping[str, Any], figures: Path) -> list[str]:
    """All parts, as Markdown.

    Args:
        result: of the experiment.
        figures: a folder.
    """
    chosen = list(next(iter(result["datasets"].values()))["families"])
    parts = ["## Images as last frames of pseudo-videos", _about(result), _information(result)]
    for family in chosen:
        for part in result["datasets"].values():
            parts += _family(family, part, result)
        parts += _pictures(family, result, figures)
    parts += _videos(chosen, result, figures)
    parts.append(" ".join([outcome(result["datasets"]), *_unlearnt(result["datasets"])]))
    rows = [[goal, reached, "met" if met else "missed"] for goal, reached, met in goals(result)]
    parts.append(table(["asked for", "reached", "verdict"], rows))
    parts.append(
        "Tiny images with little that is coarse and fine, short trainings, and one schedule of frames: this "
        "neither confirms nor refutes what larger models do. The same code runs at a larger size on an accelerator: "
        "`python -m benchmarks.pseudo_video.run --device cuda --size large`."
    )
    return parts


def _unlearnt(datasets: Mapping[str, Any]) -> list[str]:
    """Families none of whose contenders has learnt to generate: what a comparison of them is worth."""
    words = []
    for part in datasets.values():
        for family, found in part["families"].items():
            recalls = [statistics.fmean(run["recall"] for run in runs) for runs in found.values() if runs]
            if max(recalls) < LEARNT:
                words.append(f"{TITLES[family]} on {part['title']}")
    if not words:
        return []
    return [
        f"Nobody's recall reaches {LEARNT:.0%} in {', '.join(words)}: there no contender has learnt to generate, and their "
        "differences say nothing of frames."
    ]


def _about(result: Mapping[str, Any]) -> str:
    size, recipe = result["settings"], Recipe(**result["settings"]["recipe"])
    chosen = list(next(iter(result["datasets"].values()))["families"])
    steps = []
    for family in chosen:
        one = size["training"][family]
        words = f"{TITLES[family]}: {one['steps']} steps of {one['batch_size']} images"
        if family == "vq":
            words += f", then {size['training']['prior']['steps']} of the prior"
        steps.append(f"{words}, {size['samples'][family]:,} images judged")
    judged = "; ".join(f"{part['title']} {part['classifier']['accuracy']:.1%}" for part in result["datasets"].values())
    return (
        "After the idea of Chen et al. (2024), whose numbers are not replicated. Models of images, and models of videos "
        f"whose last frame is the image: {recipe.num_frames} frames, blurred up to {recipe.width:g} pixels and with fresh "
        f"noise of {recipe.noise:g} (brightness runs from 0 to 1) at every step. Inside a family all have the same network, "
        f"optimiser and steps ({'; '.join(steps)}; AdamW), but for the VAE with one latent, which is "
        f"smaller, and the image model with as many tokens, whose patches are. {_choice(result)} "
        "*Copies*: the video model, shown copies of the image. *Matched star*: each frame has the distribution that it has "
        "in first order, given the image, but the frames do not depend on each other. *No supervision*: the hierarchical "
        "VAE of the same depth, whose stages are not told what to look like; the VAE with one latent is there to show what "
        "depth alone does. The Fréchet distance is that of 32 features of a small classifier, no FID; it gets right of the "
        f"test images: {judged}. The reference is the same {size['reference']:,} test images for all; *training images* is "
        "the floor, real images in the place of generated ones. Precision and recall by three nearest neighbours. "
        f"{result['seeds']} seed{'s' * (result['seeds'] > 1)}, mean ± standard deviation; times on "
        f"{'one core' if result['device'] == 'cpu' else result['device']}."
    )


def _choice(result: Mapping[str, Any]) -> str:
    """How the settings came about."""
    if result["size"] != "small":
        return "Settings were not tuned."
    return (
        "Settings of the hierarchical VAEs are the second of two that were tried, on digits and on the one without "
        "supervision alone, for its training loss at equal time (its Fréchet distance to test images was seen then, too); "
        "so they may favour it. Those of the other families were not tuned. The numbers of steps were raised once, for all "
        "contenders of a family alike, because with fewer hardly any real image was near a generated one; that was seen "
        "on digits, in models of images alone."
    )


def _information(result: Mapping[str, Any]) -> str:
    rows = []
    for part in result["datasets"].values():
        for order, one in part["information"].items():
            rows.append(
                [
                    part["title"],
                    order,
                    f"{one['single'][-1]:.2f}",
                    f"{one['single'][0]:.2f}",
                    f"{one['total']:.2f}",
                    f"{one['gain']:.3f}",
                    f"{one['mmse_last']:.4f}",
                    f"{one['mmse_total']:.4f}",
                ]
            )
    header = [
        "images",
        "order",
        "first frame",
        "last before the image",
        "all frames",
        "gain",
        "MMSE, last",
        "MMSE, all",
    ]
    return table(header, rows) + (
        "\n\nInformation of frames about a Gaussian image with the covariance of 6,000 training images, in nats an image, "
        "exact; MMSE: squared error of a pixel of the best estimate of the image from the frame before it, and from all."
    )


def _family(family: str, part: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """The table of a family on one data set, and its differences."""
    found = {name: runs for name, runs in part["families"][family].items() if runs}
    bound, tokens = family == "hvae", family == "vq"
    header = ["", "Fréchet", "precision [%]", "recall [%]"]
    header += ["reconstruction × 1000"] * (family != "diffusion") + ["log p(image) above [nats]"] * bound
    header += ["parameters", "frames", *(["tokens"] * tokens), "training [s]", "sampling [s]"]
    floor = part["floor"][family]
    first = [
        "training images",
        f"{floor['frechet']:.1f}",
        f"{100 * floor['precision']:.1f}",
        f"{100 * floor['recall']:.1f}",
    ]
    rows: list[list[Any]] = [first + [""] * (len(header) - len(first))]
    for name, runs in found.items():
        row: list[Any] = [
            name,
            spread([run["frechet"] for run in runs], 1),
            spread([100 * run["precision"] for run in runs], 1),
            spread([100 * run["recall"] for run in runs], 1),
        ]
        if family != "diffusion":
            row.append(spread([1000 * run["error"] for run in runs], 1))
        if bound:
            row.append(spread([run["bound"] for run in runs], 0))
        row += [f"{runs[0]['parameters']:,}", runs[0]["frames"], *([runs[0]["tokens"]] * tokens)]
        row += [f"{statistics.median(run[key] for run in runs):.0f}" for key in ("seconds", "sampling")]
        rows.append(row)
    number = max(map(len, found.values()), default=0)
    gaps = "; ".join(f"{name} against {twin} {gap}" for name, twin, gap in comparisons(family, found))
    words = f"Differences of the Fréchet distance, with 95 % intervals of {number} seeds (Welch): {gaps}."
    return [f"### {TITLES[family][0].upper()}{TITLES[family][1:]}, {part['title']}", table(header, rows), words]


def _pictures(family: str, result: Mapping[str, Any], figures: Path) -> list[str]:
    """Last frames of the first seed: rows are contenders, data sets stand side by side."""
    parts = list(result["datasets"].values())
    names = [name for name in ORDERS[family] if all(part["families"][family].get(name) for part in parts)]
    if not names:
        return []
    rows = []
    for name in names:
        images = [unpack(part["families"][family][name][0]["images"]) for part in parts]
        rows.append(_joined(images))
    path = figures / f"pseudo_videos_{family}.png"
    draw_rows(path, names, rows, len(images[0]), f"{TITLES[family]}: what was generated")
    return [f"![Images that the contenders of the family generate: {TITLES[family]}](figures/{path.name})"]


def _videos(chosen: Sequence[str], result: Mapping[str, Any], figures: Path) -> list[str]:
    """Whole videos of the first seed."""
    parts = list(result["datasets"].values())
    frames = result["settings"]["recipe"]["num_frames"]
    names, rows = [], []
    for family in chosen:
        for name, order in ORDERS[family].items():
            if order == IMAGE or not all(part["families"][family].get(name) for part in parts):
                continue
            videos = [unpack(part["families"][family][name][0]["videos"])[: VIDEOS * frames] for part in parts]
            names.append(f"{family}, {name}")
            rows.append(_joined(videos))
    if not rows:
        return []
    path = figures / "pseudo_videos_frames.png"
    draw_rows(path, names, rows, frames, "whole videos, the last frame is the image")
    return [f"![Whole videos that the models of videos generate](figures/{path.name})"]


def _joined(images: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(images))


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation, or the one value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"

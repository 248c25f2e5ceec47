"""Does it help to tell an autoencoder what its steps should look like? Information, frames and controls."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.generative.frames import (
    COPIES,
    FIRST,
    MATCHED,
    STAR,
    UNTOLD,
    Recipe,
    Training,
    count,
    fit_features,
    fit_hvae,
    judge,
    reconstruction_error,
)
from gpseq import plots
from gpseq.datasets import Images, load_images
from gpseq.generative import InformationReport, PseudoVideo

# --- figures ----------------------------------------------------------------------------------------------------------


def draw_information(path: Path, reports: list[InformationReport]) -> None:
    """Information of single frames by their distance from the image, and of all frames."""
    figure = plots.new_figure(7.5, 3.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colors = (plots.BLUE, plots.GREEN, plots.VERMILION, plots.ORANGE)
    for report, color in zip(reports, colors, strict=True):
        dashed = "--" if report.order == "matched" else "-"  # lies on the chain's line
        left.plot(range(1, len(report.single) + 1), report.single, f"o{dashed}", color=color, label=report.order)
    plots.style_axes(left, "distance from the image", "of one frame [nats]")
    left.set_xticks(range(1, reports[0].num_frames))
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    names = [report.order for report in reports]
    right.bar(names, [report.last for report in reports], color=plots.GREY, label="the last one before the image")
    gains = [report.gain for report in reports]
    right.bar(names, gains, bottom=[report.last for report in reports], color=colors, label="what the others add")
    plots.style_axes(right, "", "of all frames [nats]")
    right.tick_params(axis="x", labelsize=8)
    plots.save_figure(figure, path)


def montage(rows: list[Tensor], gap: int = 2) -> Tensor:
    """One picture of rows of images.

    Args:
        rows: ``(n, 28, 28)`` each, as many in each.
        gap: pixels between images.

    Returns:
        ``(height, width)``, brightness 0 to 1.
    """
    padded = [nn.functional.pad(row.clamp(0, 1), (0, gap, 0, gap), value=0.2) for row in rows]
    return torch.cat([torch.cat(list(row), 1) for row in padded])[:-gap, :-gap]


def draw_rows(path: Path, names: list[str], rows: list[Tensor], every: int = 0, title: str = "") -> None:
    """Rows of images with names.

    Args:
        path: of the figure.
        names: of the rows.
        rows: ``(n, 28, 28)`` each.
        every: so many images belong together, and a line is drawn behind them; 0 draws none.
        title: of the picture.
    """
    picture, gap = montage(rows), 2
    height, width = picture.shape
    margin = 0.5 + 0.07 * max(len(name) for name in names)  # inches
    figure = plots.new_figure(margin + width / 75, 0.3 + height / 75)
    ax = figure.subplots()
    ax.imshow(picture, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    step = rows[0].shape[-1] + gap
    for place in range(every, len(rows[0]), every) if every else ():
        ax.axvline(place * step - gap / 2 - 0.5, color=plots.BLUE, linewidth=1.0)
    ax.set_xticks([])
    ax.set_yticks([step * (row + 0.5) - 1 for row in range(len(rows))], names, fontsize=8)
    ax.tick_params(length=0)
    ax.set_title(title, loc="left", fontsize=9)
    for spine in ax.spines.values():
        spine.set_visible(False)
    plots.save_figure(figure, path)


# --- the example ------------------------------------------------------------------------------------------------------


def show_loader(data: Images, recipe: Recipe) -> None:
    """``PseudoVideo`` in the place of a data set of images: for a video model of one's own."""
    images = TensorDataset(data.x_train.unsqueeze(1), data.y_train)
    videos = PseudoVideo(images, recipe.num_frames, recipe.corruption, "star", recipe.noise, seed=0, layout="cthw")
    loader = DataLoader(videos, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv3d(4, 1, 3, padding=1))
    for epoch in range(2):
        videos.set_epoch(epoch)  # fresh noise
        video, labels = next(iter(loader))
        print(f"epoch {epoch}: videos {tuple(video.shape)} of digits {labels[:5].tolist()}..., to a network of")
        print(f"  channels, frames and pixels of your own: {tuple(network(video).shape)}")


def main(out: Path, smoke: bool) -> None:
    """Information of frames, and five hierarchical autoencoders: three that are told frames, and two controls."""
    out.mkdir(parents=True, exist_ok=True)
    recipe, training = Recipe(), Training(4 if smoke else 600, 16, 3e-3)
    reference, samples, held = (300, 200, 50) if smoke else (1500, 1500, 400)
    data = load_images("mnist")
    images = data.x_train.unsqueeze(1)

    reports = recipe.information(images)
    print("information of frames about a Gaussian image with the digits' covariance, in nats; exact")
    print(InformationReport.table(reports), end="\n\n")
    draw_information(out / "pseudo_videos_information.png", reports)
    show_loader(data, recipe)

    network = fit_features(data, 1 if smoke else 6)
    judging = judge(network, data, reference, samples, held)
    print(f"\nclassifier: {judging.accuracy:.1%} of the test images; {training.steps} steps each, one seed")
    heading = f"{'':>16}  Fréchet  precision  recall  reconstruction  log p(image) above  parameters  seconds"
    print(heading)
    _row("training images", judging.floor(samples), "", "", "", "")
    names, rows = ["test images, star"], [recipe.video(images[:4], "star").flatten(0, 1).squeeze(1)]
    for name in (UNTOLD, COPIES, FIRST, MATCHED, STAR):
        begun = time.perf_counter()
        model, _ = fit_hvae(name, images, recipe, training, seed=0, width=4)
        seconds = time.perf_counter() - begun
        generator = torch.Generator().manual_seed(1)
        found = judging.scores(model.sample(samples, generator=generator))
        error = reconstruction_error(model, judging.held, generator)
        bound = model.importance_bound(judging.held[:100], 2 if smoke else 20, generator).mean().item()
        _row(name, found, f"{error:.4f}", f"{bound:.0f}", f"{count(model):,}", f"{seconds:.0f}")
        names.append(name)
        rows.append(model.sample(4, last_only=False, generator=generator).flatten(0, 1).squeeze(1))
    names[0] = "real, star"
    draw_rows(
        out / "pseudo_videos.png", names, rows, recipe.num_frames, "four videos each, the last frame is the image"
    )
    print(f"figures: {out / 'pseudo_videos_information.png'}, {out / 'pseudo_videos.png'}")


def _row(name: str, found: dict[str, float], error: str, bound: str, parameters: str, seconds: str) -> None:
    print(
        f"{name:>16}  {found['frechet']:7.2f}  {found['precision']:9.1%}  {found['recall']:6.1%}  {error:>14}"
        f"  {bound:>18}  {parameters:>10}  {seconds:>7}"
    )

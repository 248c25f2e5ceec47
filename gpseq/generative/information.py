r"""How much the frames of a pseudo-video say about its image: exact, where everything is Gaussian.

After a linear corruption, frames are jointly Gaussian with a Gaussian image. Each order makes the frame at distance i
from the image and frames nearer to it, as :math:`W_i x + (\text{nearer frames}) + e_i` with fresh noise
:math:`e_i \sim N(0, Q_i)`; alone it is :math:`A_i x + n_i`, :math:`n_i \sim N(0, N_i)`. The nearer frames
are known when all are, and drop out of the precision that all together add to the image:

.. math:: \Lambda_{\text{all}} = \sum_i W_i^\top Q_i^{-1} W_i, \qquad \Lambda_i = A_i^\top N_i^{-1} A_i, \qquad
    I = \tfrac12 \log \lvert I + R^\top \Lambda R \rvert, \quad R R^\top = \Sigma.

So the covariance of all frames is never formed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpseq.checks import check_count, check_floating, check_number, stacklevel_outside
from gpseq.generative.corruption_base import Corruption, Shape
from gpseq.generative.draws import drawn
from gpseq.generative.frame_matrices import linear_frames
from gpseq.generative.frames import FrameRule, as_images, check_recipe, pseudo_video

METHODS = ("auto", "exact", "sample")
#: Draws of an estimate from a covariance.
DRAWS = 20_000
#: Numbers of one chunk of sampled frames, 64 MiB.
CHUNK = 2**23


@dataclass(frozen=True)
class InformationReport:
    r"""What :func:`information_report` found, in nats per image; as a string, a table.

    Attributes:
        order: how the frames hang together.
        num_frames: T.
        noise: deviation of the noise of each frame.
        single: :math:`I(x_T; x_{T-i})` for the distances i = 1 to T - 1.
        total: :math:`I(x_T; x_{1:T-1})`.
        mmse_last: mean squared error per pixel of the best estimate of the image from :math:`x_{T-1}`.
        mmse_total: the same from all frames.
        num_samples: N of an estimate; ``None`` where the numbers are exact.
        bias_single: by how much an estimate of each of ``single`` is too high on average; 0 where they are exact.
        bias_total: the same of ``total``.
    """

    order: str
    num_frames: int
    noise: float
    single: tuple[float, ...]
    total: float
    mmse_last: float
    mmse_total: float
    num_samples: int | None = None
    bias_single: float = 0.0
    bias_total: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether no draws were made."""
        return self.num_samples is None

    @property
    def first(self) -> float:
        """:math:`I(x_T; x_1)`, of the most corrupted frame."""
        return self.single[-1]

    @property
    def last(self) -> float:
        """:math:`I(x_T; x_{T-1})`, of the frame before the image."""
        return self.single[0]

    @property
    def gain(self) -> float:
        """What all frames say beyond the last one before the image."""
        return self.total - self.last

    @property
    def bias_gain(self) -> float:
        """By how much an estimate of the gain is too high on average."""
        return self.bias_total - self.bias_single

    @staticmethod
    def table(reports: Sequence[InformationReport]) -> str:
        """Several reports, one a line, and a second line for the bias of each estimate.

        Args:
            reports: at least one.

        Returns:
            The table, with a heading.
        """
        width = max(5, *(len(report.order) for report in reports))
        lines = [
            f"{'order':{width}}  I(x_T; x_1)  I(x_T; x_T-1)  I(x_T; all)    gain  MMSE from x_T-1  MMSE from all",
        ]
        for report in reports:
            lines.append(
                f"{report.order:{width}}  {report.first:11.2f}  {report.last:13.2f}  {report.total:11.2f}  "
                f"{report.gain:6.3f}  {report.mmse_last:15.4f}  {report.mmse_total:13.4f}"
            )
            if not report.exact:
                lines.append(
                    f"{' bias':{width}}  {report.bias_single:+11.2f}  {report.bias_single:+13.2f}  "
                    f"{report.bias_total:+11.2f}  {report.bias_gain:+6.3f}  from {report.num_samples:,} draws"
                )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table([self])


def information_report(
    corruption: Corruption | None,
    order: str | FrameRule,
    num_frames: int,
    noise: float,
    covariance: Tensor | None = None,
    image_shape: Shape | None = None,
    images: Tensor | None = None,
    *,
    ridge: float = 1e-3,
    method: str = "auto",
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
) -> InformationReport:
    r"""Information that the frames of a pseudo-video hold about its image.

    A Markov chain is one backwards too: in first order, frames before :math:`x_{T-1}` add nothing to it. Other orders
    gain :math:`\sum_{t < T-1} I(x_T; x_t \mid x_{t+1:T-1})`. That is no promise for the images that a model makes:
    frames that say more are harder to make, too.

    Linear corruptions in the orders ``"markov"``, ``"star"``, ``"average"`` and ``"matched"`` are reported exactly for
    a Gaussian image, from their matrices and its covariance, in float64; with d pixels, in O(T d³) time and O(d²)
    memory. All else is estimated: frames are drawn, and the report is that of the Gaussian with their second moments.
    An estimate from N draws of :math:`d_1` and :math:`d_2` numbers is too high by about :math:`d_1 d_2 / 2N`; its
    expected bias for Gaussian draws is printed beside it, and not taken off.

    Args:
        corruption: C, see ``pseudo_video``.
        order: how the frames hang together.
        num_frames: T, at least 2.
        noise: deviation of the noise of each frame.
        covariance: of the flat image, ``(C H W, C H W)``.
        image_shape: C, H, W; needed with a covariance.
        images: ``(n, C, H, W)`` in the place of a covariance, floating or bytes, which are divided by 255. An exact
            report takes their covariance plus the ridge, an estimate the images themselves plus noise of that variance.
        ridge: added to the variance of each pixel of ``images``, because pixels that never vary have no density.
        method: ``"exact"``, ``"sample"``, or ``"auto"``, exact where that can be.
        num_samples: N, of an estimate; ``None`` is once each image, or 20,000 draws from a covariance. With more draws
            than images, images come again with fresh noise.
        generator: of an estimate's draws.

    Returns:
        A value that prints as a table.

    Raises:
        TypeError: an argument of another kind.
        ValueError: other numbers or shapes, neither or both of covariance and images, frames without noise, whose
            information is infinite, an exact report where there is none, or too few samples.

    Warns:
        UserWarning: the bias of an estimate is more than a tenth of it.

    Source:
        Cover and Thomas (2006), Elements of information theory, sections 2.8 and 8.5, for data processing and Gaussian
        information.

    Example:
        >>> from gpseq.generative.corruptions import GaussianBlur
        >>> image = {"covariance": torch.eye(16), "image_shape": (1, 4, 4)}
        >>> print(information_report(GaussianBlur(0.5), "markov", 4, 0.5, **image))
        order   I(x_T; x_1)  I(x_T; x_T-1)  I(x_T; all)    gain  MMSE from x_T-1  MMSE from all
        markov         2.49           8.67         8.67   0.000           0.3553         0.3553
        >>> information_report(GaussianBlur(0.5), "star", 4, 0.5, **image).gain > 1
        True
    """
    check_count("num_frames", num_frames, least=2)
    expected = "a finite number that is not negative"
    if check_number("ridge", ridge, expected=expected) < 0:
        raise ValueError(f"ridge: expected {expected}, got {ridge!r}.")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
    if (covariance is None) == (images is None):
        raise ValueError("covariance: expected either it or images, got " + ("neither." if images is None else "both."))
    if images is not None:
        images = as_images("images", images).detach().double()
        shape = _check_shape(images.shape[1:] if image_shape is None else image_shape)
        if shape != tuple(images.shape[1:]) or len(images) < 2:
            raise ValueError(f"images: expected at least two of shape {shape}, got shape {tuple(images.shape)}.")
        centred = images.flatten(1) - images.flatten(1).mean(0)
        covariance = centred.mT @ centred / (len(images) - 1)
        covariance.diagonal().add_(ridge)
    else:
        shape = _check_shape(image_shape)
    root = _root(covariance, math.prod(shape))
    check_recipe(num_frames, corruption, order, noise, "tchw", shape)
    recipe = (corruption, order, num_frames, float(noise))
    if isinstance(order, str) and corruption is not None and corruption.is_linear and method != "sample":
        return _exact(corruption, order, num_frames, float(noise), root, shape)
    if method == "exact":
        raise ValueError(f"method: only linear corruptions in a named order have an exact report, got {corruption!r}.")
    if num_samples is None:
        num_samples = DRAWS if images is None else len(images)
    numbers = num_frames * math.prod(shape)
    if check_count("num_samples", num_samples) <= numbers:
        raise ValueError(f"num_samples: expected more than the {numbers} numbers of a video, got {num_samples}.")
    report = _estimate(recipe, root, shape, images, math.sqrt(ridge), num_samples, generator)
    _warn_of_bias(report)
    return report


def expected_bias(num_samples: int, first: int, second: int) -> float:
    r"""By how much information is overestimated from the sample covariance of Gaussian draws.

    .. math:: \tfrac12 \bigl( s(d_1) + s(d_2) - s(d_1 + d_2) \bigr), \qquad
        s(k) = \sum_{j=1}^{k} \psi\bigl( \tfrac{N - j}{2} \bigr)

    whatever the covariance; about :math:`d_1 d_2 / 2N` for large N.

    Args:
        num_samples: N, more than both numbers together.
        first: numbers in the one.
        second: numbers in the other.

    Returns:
        In nats.

    Example:
        >>> expected_bias(100_000, 10, 20)
        0.0010
    """
    half = 0.5 * (num_samples - torch.arange(1, first + second + 1, dtype=torch.float64))
    sums = torch.digamma(half).cumsum(0)
    return 0.5 * float(sums[first - 1] + sums[second - 1] - sums[-1])


def _exact(
    corruption: Corruption, order: str, num_frames: int, noise: float, root: Tensor, image_shape: Shape
) -> InformationReport:
    everything, mmse_last = torch.zeros_like(root), 0.0
    single: list[float] = []
    for frame in linear_frames(corruption, order, num_frames, noise, image_shape, root):
        everything = everything + _precision(frame.direct, frame.fresh)
        found, mmse = _gaussian_information(root, _precision(frame.loading, frame.noise))
        mmse_last = mmse_last if single else mmse
        single.append(found)
    total, mmse_total = _gaussian_information(root, everything)
    return InformationReport(order, num_frames, noise, tuple(single), total, mmse_last, mmse_total)


def _precision(loading: Tensor, noise: Tensor) -> Tensor:
    """What an observation adds to the precision of the image, A' N^-1 A."""
    whitened = torch.linalg.solve_triangular(_factor(noise), loading, upper=False)
    return whitened.mT @ whitened


def _gaussian_information(root: Tensor, precision: Tensor) -> tuple[float, float]:
    """Information about the image in an added precision, and what variance it leaves per pixel."""
    inner = torch.eye(len(root)).to(root) + root.mT @ precision @ root
    factor = torch.linalg.cholesky(0.5 * (inner + inner.mT))
    left = torch.linalg.solve_triangular(factor, root.mT, upper=False).square().sum() / len(root)
    return float(factor.diagonal().log().sum()), float(left)


def _factor(covariance: Tensor, of_image: bool = False) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(covariance)
    scales = factor.diagonal().abs()
    # Where rounding would decide the number, it is no better than infinite.
    if not info and scales.min() ** 2 > 1e-15 * scales.max() ** 2:
        return factor
    if of_image:
        raise ValueError("ridge: expected images that vary in every direction for an estimate; a ridge does that.")
    raise ValueError("noise: expected some in every direction; without it frames hold infinite information.")


def _estimate(
    recipe: tuple[Corruption | None, str | FrameRule, int, float],
    root: Tensor,
    image_shape: Shape,
    images: Tensor | None,
    jitter: float,
    num_samples: int,
    generator: torch.Generator | None,
) -> InformationReport:
    corruption, order, num_frames, noise = recipe
    size, length = len(root), num_frames * len(root)
    rows = max(1, CHUNK // length)
    centre, total, outer = None, root.new_zeros(length), root.new_zeros(length, length)
    for begin in range(0, num_samples, rows):
        count = min(rows, num_samples - begin)
        draws = drawn(torch.randn, root.new_empty(count, size), generator)
        if images is None:
            flat = draws @ root.mT
        else:
            flat = images.flatten(1)[torch.arange(begin, begin + count) % len(images)] + jitter * draws
        video = pseudo_video(flat.view(-1, *image_shape), num_frames, corruption, order, noise, generator)
        frames = video.flip(1).flatten(1)  # by the distance from the image
        centre = frames.mean(0) if centre is None else centre  # any point near the mean, against cancellation
        total, outer = total + (frames - centre).sum(0), outer + (frames - centre).mT @ (frames - centre)
    joint = (outer - torch.outer(total, total) / num_samples) / (num_samples - 1)
    nearest, single = slice(size, 2 * size), []
    for i in range(1, num_frames):
        single.append(_sample_information(joint, size, slice(i * size, (i + 1) * size), num_samples)[0])
    every, mmse_total = _sample_information(joint, size, slice(size, length), num_samples)
    return InformationReport(
        order if isinstance(order, str) else getattr(order, "__name__", type(order).__name__),
        num_frames,
        noise,
        tuple(single),
        every,
        _sample_information(joint, size, nearest, num_samples)[1],
        mmse_total,
        num_samples,
        expected_bias(num_samples, size, size),
        expected_bias(num_samples, size, length - size),
    )


def _sample_information(joint: Tensor, size: int, part: slice, num_samples: int) -> tuple[float, float]:
    """From log-determinants; the error without the bias of a regression on as many numbers as the frames have."""
    image, frames, cross = joint[:size, :size], joint[part, part], joint[part, :size]
    whitened = torch.linalg.solve_triangular(_factor(frames), cross, upper=False)
    left = image - whitened.mT @ whitened
    before, after = _factor(image, of_image=True), _factor(left)
    freedom = (num_samples - 1) / (num_samples - 1 - len(frames))
    return float((before.diagonal() / after.diagonal()).log().sum()), float(freedom * left.diagonal().mean())


def _warn_of_bias(report: InformationReport) -> None:
    estimates = {
        "I(x_T; x_1)": (report.first, report.bias_single),
        "I(x_T; x_T-1)": (report.last, report.bias_single),
        "I(x_T; all)": (report.total, report.bias_total),
        "gain": (report.gain, report.bias_gain),
    }
    bad = [f"{name} {value:.3f}, bias {bias:.3f}" for name, (value, bias) in estimates.items() if bias > 0.1 * value]
    if bad:
        warnings.warn(
            f"The bias of estimates from {report.num_samples:,} draws is more than a tenth of them, in nats: "
            f"{'; '.join(bad)}. Take more draws (num_samples).",
            UserWarning,
            stacklevel=stacklevel_outside(),
        )


def _check_shape(image_shape: Any) -> Shape:
    if not isinstance(image_shape, Sequence) or len(image_shape) != 3:
        raise ValueError(f"image_shape: expected (C, H, W), got {image_shape!r}.")
    channels, height, width = (check_count("image_shape", number) for number in image_shape)
    return channels, height, width


def _root(covariance: Any, size: int) -> Tensor:
    """R, with R R' the covariance, in float64."""
    given = check_floating("covariance", covariance).detach()
    if given.shape != (size, size) or not given.isfinite().all():
        raise ValueError(f"covariance: expected finite numbers, ({size}, {size}), got shape {tuple(given.shape)}.")
    exact, scale = given.double(), given.abs().max()
    if (exact - exact.mT).abs().max() > 1e-5 * scale:
        raise ValueError("covariance: expected a symmetric matrix.")
    values, vectors = torch.linalg.eigh(0.5 * (exact + exact.mT))
    if values.min() < -1e-5 * scale:
        raise ValueError(f"covariance: expected no negative eigenvalue, got {values.min():.3g}.")
    return vectors * values.clamp_min(0).sqrt()

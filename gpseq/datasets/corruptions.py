"""Images made worse, in five steps: noise, blur, rotation and loss of contrast."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# For severity 1 to 5: standard deviation of the noise; of the blur, as a fraction of the shorter side; degrees; and
# the fraction of the contrast that is left.
SEVERITIES: dict[str, tuple[float, float, float, float, float]] = {
    "noise": (0.05, 0.1, 0.2, 0.3, 0.4),
    "blur": (0.02, 0.03, 0.04, 0.055, 0.07),
    "rotation": (6.0, 12.0, 20.0, 30.0, 45.0),
    "contrast": (0.75, 0.5, 0.35, 0.25, 0.15),
}
CORRUPTIONS = tuple(SEVERITIES)


def corrupt(images: Tensor, kind: str, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Make images worse by one of five degrees.

    ============  ==========================================================  ===============================
    ``kind``      what happens                                                severity 1 to 5
    ============  ==========================================================  ===============================
    "noise"       Gaussian noise on each pixel, cut off at 0 and 1            deviation .05, .1, .2, .3, .4
    "blur"        Gaussian blur                                               .02, .03, .04, .055, .07 sides
    "rotation"    rotation about the middle, to the left or to the right      6, 12, 20, 30, 45 degrees
    "contrast"    each channel is drawn towards its mean                      .75, .5, .35, .25, .15 left
    ============  ==========================================================  ===============================

    Noise draws one number a pixel and rotation one an image, the same at all severities: with generators of one seed,
    a higher severity makes more of the same. The other two draw nothing.

    Args:
        images: ``(n, h, w)`` or ``(n, c, h, w)``, floating, brightness from 0 to 1.
        kind: one of ``CORRUPTIONS``: ``"noise"``, ``"blur"``, ``"rotation"``, ``"contrast"``.
        severity: 1 to 5; 0 gives a copy.
        generator: of the draws; ``None`` is torch's default. Draws do not depend on the dtype of the images.

    Returns:
        New images of the same shape, dtype and device, in [0, 1].

    Raises:
        ValueError: if there is no such kind or severity, or if the images are of another shape or range.
        TypeError: if the images are not floating.

    Example:
        >>> images = torch.rand(2, 28, 28)
        >>> corrupt(images, "noise", 3, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 28, 28])
        >>> corrupt(torch.tensor([[[0.0, 1.0]]]), "contrast", 2)
        tensor([[[0.2500, 0.7500]]])
    """
    if kind not in SEVERITIES:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(SEVERITIES)}")
    if isinstance(severity, bool) or severity not in range(6):
        raise ValueError(f"severity: got {severity!r}, expected an integer from 0 to 5")
    _check(images)
    if severity == 0:
        return images.clone()
    amount = SEVERITIES[kind][severity - 1]
    if kind == "noise":
        return add_noise(images, amount, generator)
    if kind == "rotation":
        return rotate(images, amount * _signs(len(images), generator))
    functions: dict[str, Callable[[Tensor, float], Tensor]] = {
        "blur": lambda x, fraction: blur(x, fraction * min(x.shape[-2:])),
        "contrast": reduce_contrast,
    }
    return functions[kind](images, amount)


def add_noise(images: Tensor, deviation: float, generator: torch.Generator | None = None) -> Tensor:
    """Add independent Gaussian noise to each pixel and cut off at 0 and 1.

    Args:
        images: ``(n, h, w)`` or ``(n, c, h, w)``, floating, in [0, 1].
        deviation: standard deviation of the noise, not negative.
        generator: of the draws; ``None`` is torch's default.

    Returns:
        As ``images``.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if the images are not floating.
    """
    _check(images)
    if not 0 <= deviation < float("inf"):
        raise ValueError(f"deviation: got {deviation}, expected a number that is not negative")
    # Drawn in float32, where the generator lives: the same noise for every dtype and device of the images.
    device = generator.device if generator is not None else torch.device("cpu")
    noise = torch.randn(images.shape, dtype=torch.float32, device=device, generator=generator).to(images.device)
    x = _exact(images)
    return (x + deviation * noise.to(x.dtype)).clamp(0, 1).to(images.dtype)


def blur(images: Tensor, deviation: float) -> Tensor:
    """Blur by a Gaussian of two dimensions; beyond the border there is nothing, and the weights inside sum to 1.

    Args:
        images: ``(n, h, w)`` or ``(n, c, h, w)``, floating, in [0, 1].
        deviation: of the Gaussian, in pixels, not negative.

    Returns:
        As ``images``.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if the images are not floating.
    """
    _check(images)
    if not 0 <= deviation < float("inf"):
        raise ValueError(f"deviation: got {deviation}, expected a number of pixels that is not negative")
    if deviation == 0:
        return images.clone()
    x = _exact(images)

    def weights(size: int) -> Tensor:
        pixel = torch.arange(size, dtype=x.dtype, device=x.device)
        return torch.softmax(-0.5 * ((pixel[:, None] - pixel) / deviation).square(), dim=-1)

    height, width = images.shape[-2:]
    return (weights(height) @ x @ weights(width).mT).clamp(0, 1).to(images.dtype)


def rotate(images: Tensor, degrees: Tensor | float) -> Tensor:
    """Turn each image about its middle, with bilinear interpolation; what comes in from outside is 0.

    Args:
        images: ``(n, h, w)`` or ``(n, c, h, w)``, floating, in [0, 1].
        degrees: ``(n,)`` or one number, against the clock.

    Returns:
        As ``images``.

    Raises:
        ValueError: if an argument is of another shape or out of its range.
        TypeError: if the images are not floating.

    Example:
        >>> rotate(torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), 90.0).round()
        tensor([[[0., 0.],
                 [1., 0.]]])
    """
    _check(images)
    angles = torch.as_tensor(degrees)
    if angles.ndim > 1 or (angles.ndim == 1 and len(angles) != len(images)):
        raise ValueError(f"degrees: got shape {tuple(angles.shape)}, expected one number or ({len(images)},)")
    if not angles.isfinite().all():
        raise ValueError("degrees: expected finite numbers")
    if not len(images):
        return images.clone()
    x = _exact(images)
    batch = x if x.ndim == 4 else x[:, None]
    height, width = batch.shape[-2:]
    angle = angles.to(x).expand(len(batch)).deg2rad()
    # Coordinates run from -1 to 1 along either side, hence the ratios; the map is from the new image to the old one.
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = [cos, -sin * height / width, zero, sin * width / height, cos, zero]
    grid = functional.affine_grid(torch.stack(rows, dim=-1).view(-1, 2, 3), list(batch.shape), align_corners=False)
    turned = functional.grid_sample(batch, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return turned.view(images.shape).clamp(0, 1).to(images.dtype)


def reduce_contrast(images: Tensor, fraction: float) -> Tensor:
    """Draw each channel of each image towards its mean: ``mean + fraction (x - mean)``.

    Args:
        images: ``(n, h, w)`` or ``(n, c, h, w)``, floating, in [0, 1].
        fraction: of the contrast that is left, from 0 to 1.

    Returns:
        As ``images``.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if the images are not floating.
    """
    _check(images)
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, expected a number from 0 to 1")
    x = _exact(images)
    return torch.lerp(x.mean(dim=(-2, -1), keepdim=True), x, fraction).clamp(0, 1).to(images.dtype)


def _signs(count: int, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else torch.device("cpu")
    return 2.0 * torch.randint(2, (count,), device=device, generator=generator) - 1


def _exact(images: Tensor) -> Tensor:
    """In float32 at least: half precision would lose the differences between small severities."""
    return images.to(torch.promote_types(images.dtype, torch.float32))


def _check(images: Tensor) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: got {got}, expected a floating tensor in [0, 1]; divide bytes by 255")
    if images.ndim not in (3, 4) or 0 in images.shape[1:]:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (n, h, w) or (n, c, h, w)")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"images: values run from {low:g} to {high:g}, expected 0 to 1")

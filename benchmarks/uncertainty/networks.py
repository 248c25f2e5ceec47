"""Networks of the uncertainty benchmarks: a small vision transformer, its control without attention, and SNGP's parts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class PerToken(nn.Module):
    """A layer of the encoder that looks at each token alone: a perceptron in the place of attention.

    With ``hidden = 2 width`` in that place it has as many weights as the attention that it replaces.

    Args:
        width: of the tokens.
        mlp_width: of the second perceptron, the one that a layer with attention has too.
        dropout: probability.
    """

    def __init__(self, width: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.first = _perceptron(width, 2 * width, dropout)
        self.second = _perceptron(width, mlp_width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` to the same."""
        x = x + self.first(x)
        return x + self.second(x)


def _perceptron(width: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, width),
        nn.Dropout(dropout),
    )


def encoder_layers(
    width: int, heads: int, mlp_width: int, depth: int, dropout: float = 0.1, attention: bool = True
) -> nn.ModuleList:
    """Layers of an encoder with attention, or of its control without."""

    def layer() -> nn.Module:
        if not attention:
            return PerToken(width, mlp_width, dropout)
        return nn.TransformerEncoderLayer(
            width, heads, mlp_width, dropout, activation="gelu", norm_first=True, batch_first=True
        )

    return nn.ModuleList(layer() for _ in range(depth))


class VisionTransformer(nn.Module):
    """A small vision transformer on images ``(B, 28, 28)`` of brightness 0 to 1: 16 patches, mean pooling.

    Args:
        num_classes: C.
        attention: false for the control, whose tokens meet at the pooling only.
        patch: side of a patch, in pixels.
        width: of the tokens.
        heads: of each attention.
        depth: number of layers.
        mlp_width: hidden units of the perceptrons.
        dropout: probability.
    """

    def __init__(
        self,
        num_classes: int = 10,
        attention: bool = True,
        patch: int = 7,
        width: int = 64,
        heads: int = 4,
        depth: int = 4,
        mlp_width: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch**2, width)
        self.position = nn.Parameter(torch.randn((28 // patch) ** 2, width) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers = encoder_layers(width, heads, mlp_width, depth, dropout, attention)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``(B, width)``, what the head sees."""
        # Mean and deviation of Fashion-MNIST's pixels, rounded.
        patches = (x - 0.29).div(0.35).unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        tokens = self.dropout(self.embed(patches.flatten(3).flatten(1, 2)) + self.position)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        return self.head(self.features(x))


class BoundedNorm(nn.Module):
    """Keeps the largest singular value of a matrix below a bound, by one step of power iteration a call in training.

    Args:
        weight: the matrix at the start, ``(a, b)``.
        bound: of the singular value.
    """

    def __init__(self, weight: Tensor, bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.register_buffer("left", nn.functional.normalize(torch.randn(weight.shape[0]), dim=0))
        self.left: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix, smaller where it has to be."""
        with torch.no_grad():
            right = nn.functional.normalize(weight.mT @ self.left, dim=0)
            left = nn.functional.normalize(weight @ right, dim=0)
            if self.training:
                self.left = left
        norm = left @ weight @ right
        return weight * (self.bound / norm).clamp(max=1.0)


class RandomFeatureHead(nn.Module):
    r"""A Gaussian process on features in random Fourier features, with one Laplace precision for all classes.

    .. math::
        \phi(h) = \sqrt{2 / D} \cos(W h / \ell + b), \quad z = B \phi, \quad
        P = I + \sum_i p_i (1 - p_i) \phi_i \phi_i^\top, \quad v = \phi^\top P^{-1} \phi,

    with p the largest probability.

    Args:
        width: of the features.
        num_classes: C.
        num_features: D.

    Source:
        Liu et al. (2020), Simple and principled uncertainty estimation with deterministic deep learning via distance
        awareness, sections 3.1 and 3.2.
    """

    def __init__(self, width: int, num_classes: int, num_features: int = 1024) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        # Normed features are sqrt(width) from the origin: the lengthscale is of the order of their distances.
        self.register_buffer("frequency", torch.randn(num_features, width) / math.sqrt(width))
        self.register_buffer("phase", 2 * math.pi * torch.rand(num_features))
        self.register_buffer("factor", torch.eye(num_features))
        self.frequency: Tensor
        self.phase: Tensor
        self.factor: Tensor
        self.weight = nn.Linear(num_features, num_classes)

    def basis(self, features: Tensor) -> Tensor:
        """phi, ``(B, D)``."""
        return torch.cos(self.norm(features) @ self.frequency.mT + self.phase) * math.sqrt(2 / len(self.phase))

    def forward(self, features: Tensor) -> Tensor:
        """Mean logits ``(B, C)``."""
        return self.weight(self.basis(features))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Accumulate the precision in one pass over the training part's features ``(n, width)``."""
        precision = torch.eye(len(self.phase), dtype=torch.float64)
        for part in features.split(1000):
            phi = self.basis(part)
            p = self.weight(phi).softmax(-1).amax(-1)
            rows = (phi * (p * (1 - p)).sqrt().unsqueeze(-1)).double()
            precision += rows.mT @ rows
        self.factor = torch.linalg.cholesky(precision).to(self.factor.dtype).contiguous()  # as it is loaded

    def variance(self, features: Tensor) -> Tensor:
        """v, ``(B,)``."""
        solved = torch.linalg.solve_triangular(self.factor, self.basis(features).mT, upper=False)
        return solved.square().sum(0)


def make_sngp(network: nn.Module, bound: float = 0.95) -> nn.Module:
    """Bound the hidden maps of a network and give it a Gaussian process as head, in place.

    Every ``nn.Linear`` but the head, and the projections of attention, are bounded. The head's ``forward`` takes
    features as a linear head does.
    """
    old = network.head
    for module in list(network.modules()):
        names = [name for name in ("weight", "in_proj_weight") if isinstance(getattr(module, name, None), nn.Parameter)]
        if module is not old and isinstance(module, nn.Linear | nn.MultiheadAttention):
            for name in names:
                parametrize.register_parametrization(module, name, BoundedNorm(getattr(module, name), bound))
    network.head = RandomFeatureHead(old.in_features, old.out_features)
    return network

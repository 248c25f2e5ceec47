"""How layers of Gaussian processes draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import nn

from gpseq.nn.generator import Draws, setting
from gpseq.sgpa.arguments import check_choice


class Sampled(Draws):
    """A layer that draws from Gaussian processes in one of several ways, which ``SAMPLING`` names.

    Attributes:
        sampling: how the layer draws; may be set at any time.
    """

    SAMPLING: ClassVar[tuple[str, ...]] = ("marginal", "mean")

    @property
    def sampling(self) -> str:
        """How the layer draws."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: str) -> None:
        check_choice("sampling", sampling, self.SAMPLING)
        self._sampling = sampling


@contextmanager
def use_sampling(model: nn.Module, sampling: str) -> Iterator[None]:
    """Let every layer of a model that draws do so in one way; what was set before comes back at the end.

    With ``"mean"`` nothing draws: the mean-only pass of a model, which every claim about its noise is to be held
    against.

    Args:
        model: any module; the layers of ``gpseq.nn`` inside are found at any depth.
        sampling: ``"marginal"``, ``"joint"``, ``"pathwise"`` or ``"mean"``, as far as all layers know it.

    Raises:
        ValueError: a layer does not know it. All layers are as they were.

    Example:
        >>> from gpseq.nn import SGPAttention
        >>> layer = SGPAttention(8, 2, num_inducing=4)
        >>> with use_sampling(layer, "mean"):
        ...     layer.sampling
        'mean'
        >>> layer.sampling
        'marginal'
    """
    with setting([module for module in model.modules() if isinstance(module, Sampled)], "sampling", sampling):
        yield

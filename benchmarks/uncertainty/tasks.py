"""What a contender is given: data in parts, and how a network for them is made and trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """Inputs, and their labels where they have any.

    Attributes:
        inputs: ``(n, 28, 28)``, images from 0 to 1, or ``(n, T)``, ids of words, in which 0 is padding.
        labels: ``(n,)``, classes from 0; ``None`` for inputs that belong to none of them.
    """

    inputs: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and self.labels.shape != self.inputs.shape[:1]:
            raise ValueError(f"labels: got {tuple(self.labels.shape)} beside {tuple(self.inputs.shape)} inputs")

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Task:
    """A data set, and the settings that every contender is trained with.

    A network that ``make`` returns takes one tensor and gives logits ``(B, C)``. It has ``features(x)``, which is
    ``(B, width)``, and ``head``, a ``nn.Linear``, with ``network(x) == head(features(x))``. Its layers are
    ``nn.TransformerEncoderLayer`` with ``norm_first`` and ``batch_first``.

    Attributes:
        name: how results and cached networks are called.
        train: what networks are trained on.
        val: what scalars are fitted on.
        test: from the same distribution.
        shifted: labelled parts that drift away from it, by name; ``"kind 3"`` for a kind at severity 3.
        ood: parts that belong to no class.
        make: makes an untrained network from torch's default generator; ``make(False)`` one without attention.
        epochs: how often a network sees the training part.
        batch_size: inputs in a step.
        learning_rate: peak of the rate, which rises in a line and falls along half a cosine.
        weight_decay: of AdamW.
        warmup: fraction of all steps in which the rate rises.
        kinds: ways to train that make sense here. What is pre-trained has no control without attention, and no bounds on
            its maps.
        seeds: how many are judged.
    """

    name: str
    train: Part
    val: Part
    test: Part
    shifted: dict[str, Part]
    ood: dict[str, Part]
    make: Callable[[bool], nn.Module]
    epochs: int = 12
    batch_size: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    kinds: tuple[str, ...] = ("softmax", "none", "sngp", "gp", "gp without dropout")
    seeds: int = 5

    @property
    def num_classes(self) -> int:
        """Classes of the labels."""
        assert self.train.labels is not None
        return int(self.train.labels.max()) + 1

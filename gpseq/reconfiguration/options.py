"""What the loss of a distillation is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from gpseq.checks import check_number
from gpseq.reconfiguration.objectives import PATH_LOSSES

#: The floor of the teacher's spread, in parts of the root mean square of its increments.
FLOOR = 0.05
TASK_LOSSES = ("auto", "ce", "kd", None)
#: Weights of the published recipe: means, spreads, labels; for teachers without and with a spread of their own.
DIRECTOR = {"softmax": (0.8, 0.0, 0.2), "gp": (0.4, 0.2, 0.4)}


@dataclass(frozen=True)
class Options:
    """The options of a :class:`~gpseq.reconfiguration.Distiller`, checked; see there.

    Raises:
        ValueError: one is unknown, or there is nothing to learn from.
    """

    path_loss: str = "kl"
    forcing: str | float | Callable[[int], float] = "rollout"
    task_loss: str | Callable[[Tensor, Tensor], Tensor] | None = "auto"
    weights: Mapping[str, float] | None = None
    normalise: bool = True
    temperature: float = 1.0
    floor: float = FLOOR
    reduction: str = "mean"
    steps: str = "fixed"

    def __post_init__(self) -> None:
        for name, known in (
            ("path_loss", PATH_LOSSES),
            ("steps", ("fixed", "random")),
            ("reduction", ("mean", "sum")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}.")
        task, forcing = self.task_loss, self.forcing
        if not callable(task) and task not in TASK_LOSSES:
            raise ValueError(
                f"task_loss: expected one of {', '.join(map(str, TASK_LOSSES))} or a function, got {task!r}."
            )
        if not callable(forcing) and forcing not in ("rollout", "teacher"):
            if isinstance(forcing, str) or not 0 <= check_number("forcing", forcing) <= 1:
                raise ValueError(
                    f"forcing: expected 'rollout', 'teacher', a number from 0 to 1 or a function, got {forcing!r}."
                )
        check_number("temperature", self.temperature, above=0.0, expected="a positive number")
        check_number("floor", self.floor, above=-1e-300, expected="a number that is not negative")
        object.__setattr__(self, "weights", _weights(self.weights or {}, self.path_loss))
        if not self.weight("path") and (task is None or not self.weight("task")):
            raise ValueError(f"weights: expected a path or a task to learn from, got {self.weights} with {task=}.")

    def weight(self, name: str) -> float:
        """Of a part of the loss.

        Args:
            name: ``"path"``, ``"task"``, ``"mean"`` or ``"spread"``.
        """
        assert self.weights is not None
        return self.weights[name]

    @property
    def needs_spread(self) -> bool:
        """Whether the loss divides by the teacher's spread, and there may be none."""
        return self.floor == 0 and self.path_loss in ("kl", "reverse_kl")

    def director(self, has_spread: bool) -> Options:
        """The published recipe.

        Args:
            has_spread: whether the teacher has a spread of its own.
        """
        means, spreads, labels = DIRECTOR["gp" if has_spread else "softmax"]
        weights = {"path": 1.0, "mean": means, "spread": spreads, "task": labels}
        return replace(self, path_loss="mse", forcing="teacher", task_loss="ce", normalise=False, weights=weights)

    def forced(self, step: int | None) -> float:
        """Weight of the loss from the teacher's states, 0 to 1.

        Args:
            step: of training.

        Raises:
            ValueError: a function gives another number.
        """
        forcing = self.forcing
        if callable(forcing):
            part = float(forcing(0 if step is None else step))
            if not 0 <= part <= 1:
                raise ValueError(f"forcing: expected a function with values from 0 to 1, got {part}.")
            return part
        return {"rollout": 0.0, "teacher": 1.0}[forcing] if isinstance(forcing, str) else float(forcing)


def _weights(given: Mapping[str, float], path_loss: str) -> Mapping[str, float]:
    known = {"path": 1.0 if path_loss == "mse" else 0.1, "task": 1.0, "mean": 1.0, "spread": 0.0}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"weights: expected {', '.join(known)}, got {', '.join(unknown)}.")
    for name, value in given.items():
        known[name] = check_number(f"weights[{name!r}]", value, above=-1e-300, expected="a number that is not negative")
    return known

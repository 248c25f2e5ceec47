"""The generalised Gauss-Newton matrix, example by example: roots of Hessians in the outputs, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from gpseq.logits import class_logits, log_softmax, network_output

#: Outputs of an example up to which the expectation over labels is exact.
EXACT_UP_TO = 32
#: Labels that do not count, as in torch's cross-entropy.
IGNORED = -100
#: Numbers of gradients of single examples that are held at a time.
BUDGET = 2**26


@dataclass(frozen=True)
class Head:
    """What the outputs of a network mean.

    Attributes:
        likelihood: ``"classification"`` or ``"regression"``.
        noise: variance of observations.
    """

    likelihood: str
    noise: float

    def outputs(self, output: Any) -> Tensor:
        """What a network returned, ``(B, *tokens, K)``."""
        if self.likelihood == "classification":
            return class_logits(output)
        values, noise = network_output(output)
        if noise is not None:
            raise TypeError("model: expected values, whose noise variance is an argument, got a Normal.")
        return values.unsqueeze(-1) if values.dim() == 1 else values

    def columns(
        self,
        outputs: Tensor,
        labels: Tensor | None,
        num_samples: int | str | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        r"""Columns c of a root of the Hessian in the outputs, :math:`\sum_c c c^\top = \Lambda` or in expectation.

        For classes, :math:`\sqrt{p_k} (e_k - p)` for all k, or :math:`e_k - p` for k that are drawn.

        Args:
            outputs: ``(B, *tokens, K)``.
            labels: ``(B, *tokens)``; ``None`` if all count.
            num_samples: see :func:`~gpseq.propagation.laplace.fit_curvature`.
            generator: of the draws.

        Returns:
            ``(C, B, *tokens, K)``.
        """
        tokens, classes = outputs.shape[1:-1], outputs.shape[-1]
        exact = num_samples is None or (num_samples == "auto" and tokens.numel() * classes <= EXACT_UP_TO)
        number = 1 if isinstance(num_samples, str) or num_samples is None else num_samples
        if self.likelihood == "classification":
            probs = log_softmax(outputs).exp()
            if exact:
                hot = torch.eye(classes, dtype=probs.dtype, device=probs.device)
                hot = hot.view(classes, *[1] * (probs.dim() - 1), classes)
                columns = (hot - probs) * probs.movedim(-1, 0).unsqueeze(-1).sqrt()
            else:
                drawn = torch.multinomial(probs.flatten(0, -2), number, replacement=True, generator=generator)
                drawn = drawn.mT.reshape(number, *probs.shape[:-1])
                columns = (nn.functional.one_hot(drawn, classes).to(probs) - probs) * number**-0.5
        elif exact:
            columns = torch.eye(classes, dtype=outputs.dtype, device=outputs.device) * self.noise**-0.5
            columns = columns.view(classes, *[1] * (outputs.dim() - 1), classes).expand(-1, *outputs.shape)
        else:
            shape = (number, *outputs.shape)
            columns = torch.randn(shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
            columns = columns * (number * self.noise) ** -0.5
        if exact and tokens.numel() > 1:  # the Hessian has no entries between tokens: one at a time
            apart = torch.eye(tokens.numel(), dtype=columns.dtype, device=columns.device).view(-1, 1, 1, *tokens, 1)
            columns = (apart * columns).flatten(0, 1)
        if labels is None or self.likelihood == "regression" or labels.is_floating_point():
            return columns
        if labels.shape != outputs.shape[:-1]:
            raise ValueError(
                f"loader: expected labels of shape {tuple(outputs.shape[:-1])} for outputs of shape "
                f"{tuple(outputs.shape)}, got {tuple(labels.shape)}."
            )
        return columns * (labels != IGNORED).to(columns).unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class Call:
    """A batch as arguments of a model.

    Attributes:
        args: by position.
        named: by name.
        labels: of the batch, if there are any.
        size: B.
    """

    args: tuple[Any, ...]
    named: dict[str, Any]
    labels: Tensor | None
    size: int

    @classmethod
    def of(cls, batch: Any) -> Call:
        """Take a batch apart."""
        labels: Any = None
        x: Any = batch
        if isinstance(batch, Sequence) and not isinstance(batch, str):
            if len(batch) != 2:
                raise TypeError(f"loader: expected batches (x, y) or mappings, got {len(batch)} elements.")
            x, labels = batch
        named = {}
        if isinstance(x, Mapping):
            named = {str(name): value for name, value in x.items() if name != "labels"}
            labels = x.get("labels", labels)
        elif not isinstance(x, Tensor):
            raise TypeError(f"loader: expected tensors or mappings of them, got {type(x).__name__}.")
        first = x if isinstance(x, Tensor) else next((v for v in named.values() if isinstance(v, Tensor)), None)
        if first is None or first.dim() == 0:
            raise TypeError("loader: expected inputs with a batch dimension, got none.")
        labels = labels if isinstance(labels, Tensor) else None
        return cls(() if named or isinstance(x, Mapping) else (x,), named, labels, len(first))

    def run(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Any:
        """The model's output, with some of its weights replaced."""
        return functional_call(model, dict(weights), self.args, self.named)

    def split(self) -> tuple[dict[Any, Tensor], Callable[[Mapping[Any, Tensor]], Call]]:
        """Tensors that have an example in each row, and how to make a call of others in their place."""
        places: dict[Any, Any] = {**dict(enumerate(self.args)), **self.named}
        rows = {
            place: value
            for place, value in places.items()
            if isinstance(value, Tensor) and value.dim() and len(value) == self.size
        }

        def join(found: Mapping[Any, Tensor]) -> Call:
            both = {**places, **found}
            args = tuple(both[number] for number in range(len(self.args)))
            return Call(args, {name: both[name] for name in self.named}, None, len(next(iter(found.values()))))

        return rows, join


class Squares:
    """Sums of squares of gradients of single examples: the diagonal of the curvature, of any module.

    Args:
        model: whose weights they are about.
        chosen: parameters, by names.
        chunk_size: examples at a time.
    """

    def __init__(self, model: nn.Module, chosen: Mapping[str, Tensor], chunk_size: int | None) -> None:
        self.model, self.chunk_size = model, chunk_size
        self.weights = {name: p.detach() for name, p in chosen.items()}
        self.totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.weights.items()}
        self._one_by_one = False

    def add(self, call: Call, head: Head, columns: Tensor) -> None:
        """Add a batch.

        Args:
            call: the batch.
            head: of the model.
            columns: of the root of the Hessian, ``(C, B, *tokens, K)``.
        """
        if not self.weights:
            return
        size = sum(p.numel() for p in self.weights.values())
        wide = max(min(len(columns), BUDGET // size), 1)
        chunk = self.chunk_size or max(min(call.size, BUDGET // (size * wide)), 1)
        rows, join = call.split()
        for start in range(0, call.size, chunk):
            part = {place: value[start : start + chunk] for place, value in rows.items()}
            for few in columns[:, start : start + chunk].split(wide):
                for name, found in self._squares(part, join, head, few).items():
                    self.totals[name] += found.detach()

    def _squares(
        self, rows: Mapping[Any, Tensor], join: Callable[[Mapping[Any, Tensor]], Call], head: Head, columns: Tensor
    ) -> dict[str, Tensor]:
        if not self._one_by_one:
            try:
                return self._together(rows, join, head, columns)
            except (RuntimeError, ValueError, TypeError):
                # Some modules look at values, which a batch of examples under vmap does not have. A true fault comes up
                # again below.
                self._one_by_one = True
        return self._alone(rows, join, head, columns)

    def _together(
        self, rows: Mapping[Any, Tensor], join: Callable[[Mapping[Any, Tensor]], Call], head: Head, columns: Tensor
    ) -> dict[str, Tensor]:
        def one(row: Mapping[Any, Tensor], few: Tensor) -> dict[str, Tensor]:
            call = join({place: value.unsqueeze(0) for place, value in row.items()})
            pull: Any = vjp(lambda weights: head.outputs(call.run(self.model, weights))[0], self.weights)[1]
            return {name: value.square().sum(0) for name, value in vmap(lambda c: pull(c)[0])(few).items()}

        found = vmap(one, in_dims=(0, 1))(dict(rows), columns)
        return {name: value.double().sum(0) for name, value in found.items()}

    def _alone(
        self, rows: Mapping[Any, Tensor], join: Callable[[Mapping[Any, Tensor]], Call], head: Head, columns: Tensor
    ) -> dict[str, Tensor]:
        totals = {name: torch.zeros_like(value) for name, value in self.totals.items()}
        for number in range(columns.shape[1]):
            weights = {name: value.clone().requires_grad_() for name, value in self.weights.items()}
            call = join({place: value[number : number + 1] for place, value in rows.items()})
            with torch.enable_grad():
                outputs = head.outputs(call.run(self.model, weights))
            for column in columns[:, number : number + 1]:
                grads = torch.autograd.grad(
                    outputs,
                    list(weights.values()),
                    column,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for name, value in zip(weights, grads, strict=True):
                    totals[name] += value.double().square()
        return totals

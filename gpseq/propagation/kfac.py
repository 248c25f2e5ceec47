r"""Kronecker factors of the curvature of matrices of weights, from what goes into a layer and what comes back to it.

A layer :math:`h = W a` with gradients :math:`g = \partial (c^\top f) / \partial h` has the block

.. math:: \sum_n \sum_c (g a^\top) \otimes (g a^\top) \approx B \otimes A, \qquad
    B = \sum_n \sum_c g g^\top, \quad A = \tfrac1N \sum_n a a^\top

which is exact where gradients do not depend on the inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.propagation.curvature import Factors, eigenbasis
from gpseq.propagation.gauss_newton import Call, Head


class Tap:
    """Factors of one layer, added up over batches.

    Args:
        module: of a kind that :func:`is_reachable`.
        weight: name of its weight, if that is chosen.
        bias: likewise.
        sharing: ``"expand"`` or ``"reduce"``.
    """

    def __init__(self, module: nn.Module, weight: str | None, bias: str | None, sharing: str) -> None:
        self.module, self.weight, self.bias, self.sharing = module, weight, bias, sharing
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None
        self.count = 0
        self._calls: list[tuple[Tensor, Tensor]] = []
        self._active: Tensor | None = None

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Keep the input and the output of a call, and let the gradient begin at the output at the latest."""
        probe = output if output.requires_grad else output.detach().requires_grad_()
        self._calls.append((args[0].detach().clone(), probe))
        return probe.clone()  # what comes next may change it in place

    @property
    def probes(self) -> list[Tensor]:
        """Outputs of the calls in this batch."""
        return [probe for _, probe in self._calls]

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one column of the root of the Hessian.

        Args:
            gradients: in the probes.
        """
        parts = [
            torch.zeros_like(probe) if part is None else part
            for part, (_, probe) in zip(gradients, self._calls, strict=True)
        ]
        rows = self._rows([self._channels_last(part) for part in parts], mean=False)
        some = (rows != 0).any(-1)
        self._active = some if self._active is None else self._active | some
        self.outputs = _plus(self.outputs, rows.mT @ rows)

    def close(self) -> None:
        """End a batch: its inputs count where something depends on what becomes of them."""
        if self._active is not None:
            inputs = self._rows([self._unfolded(given) for given, _ in self._calls], mean=True)[self._active]
            self.inputs = _plus(self.inputs, inputs.mT @ inputs)
            self.count += len(inputs)
        self._calls, self._active = [], None

    def _unfolded(self, x: Tensor) -> Tensor:
        """What the matrix multiplies, ``(B, *positions, D)``."""
        if not isinstance(self.module, nn.Conv2d):
            return x
        conv: Any = self.module
        return nn.functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT

    def _channels_last(self, x: Tensor) -> Tensor:
        """``(B, *positions, K)``."""
        return x.flatten(2).mT if isinstance(self.module, nn.Conv2d) else x

    def _rows(self, parts: list[Tensor], mean: bool) -> Tensor:
        """Positions of all calls, or their mean or sum in each example: ``(n, D)``."""
        if self.sharing == "expand":
            return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        rows = torch.cat([part.reshape(len(part), -1, part.shape[-1]) for part in parts], 1)
        return rows.mean(1) if mean else rows.sum(1)

    def factors(self) -> dict[str, Factors]:
        """Of weight and bias, by their names."""
        assert self.inputs is not None and self.outputs is not None
        found: dict[str, Factors] = {}
        like: Any = self.module.weight
        outputs = eigenbasis(self.outputs, like)
        if self.weight is not None:
            inputs = eigenbasis(self.inputs / max(self.count, 1), like)
            # Rows of the Conv1D of transformers are inputs.
            rows, columns = (inputs, outputs) if _is_conv1d(self.module) else (outputs, inputs)
            found[self.weight] = Factors(*rows, *columns)
        if self.bias is not None:
            found[self.bias] = Factors(*outputs, like.new_ones(1, 1), like.new_ones(1))
        return found


class Taps:
    """Factors of all layers that are chosen and can be reached.

    Args:
        model: with its layers.
        taps: of those.
    """

    def __init__(self, model: nn.Module, taps: list[Tap]) -> None:
        self.model, self.taps = model, taps
        # Without gradients of their own: the graph begins at the first layer that is tapped.
        self._weights = {name: p.detach() for name, p in model.named_parameters()}
        self._started = False

    @classmethod
    def of(cls, model: nn.Module, chosen: Mapping[str, Tensor], sharing: str) -> Taps:
        """Find the layers.

        Args:
            model: with its layers.
            chosen: parameters, by names.
            sharing: ``"expand"`` or ``"reduce"``.
        """
        uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        names = {id(p): name for name, p in chosen.items() if uses[id(p)] == 1}
        taps = []
        for module in model.modules():
            if is_reachable(module):
                weight, bias = (names.get(id(getattr(module, part))) for part in ("weight", "bias"))
                if weight is not None or bias is not None:
                    taps.append(Tap(module, weight, bias, sharing))
        return cls(model, taps)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters whose factors are found."""
        return tuple(name for tap in self.taps for name in (tap.weight, tap.bias) if name is not None)

    def add(self, call: Call, head: Head, columns: Tensor) -> None:
        """Add a batch; layers that the first one does not call are given up.

        Args:
            call: the batch.
            head: of the model.
            columns: of the root of the Hessian in the outputs, ``(C, B, *tokens, K)``.
        """
        if not self.taps:
            return
        with ExitStack() as stack, torch.enable_grad():
            for tap in self.taps:
                stack.callback(tap.module.register_forward_hook(tap.hook).remove)
            found = head.outputs(call.run(self.model, self._weights))
        if not self._started:
            self.taps = [tap for tap in self.taps if tap.probes]
            self._started = True
        probes = [probe for tap in self.taps for probe in tap.probes]
        if not probes:
            return
        for column in columns:
            gradients = torch.autograd.grad(found, probes, column, retain_graph=True, allow_unused=True)
            start = 0
            for tap in self.taps:
                size = len(tap.probes)
                tap.add(gradients[start : start + size])
                start += size
        for tap in self.taps:
            tap.close()

    def factors(self) -> dict[str, Any]:
        """Of all parameters, by their names."""
        return {name: factors for tap in self.taps for name, factors in tap.factors().items()}


def is_reachable(module: nn.Module) -> bool:
    """Whether a module is one matrix of weights, whose inputs and outputs a hook sees.

    Args:
        module: any.
    """
    kind = type(module)
    if isinstance(module, nn.Linear):
        return kind.forward is nn.Linear.forward
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return kind.forward is nn.Conv2d.forward and plain
    return _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """The matrix of GPT-2 and its like, whose rows are inputs."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "bias")


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more.double() if total is None else total + more.double()

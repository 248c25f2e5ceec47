r"""Softmax attention as a map of moments: its tangent, and the variances that independent tokens leave.

Letters: B elements of the batch, H heads, Tq and Tk tokens, D the width of a head, A the weights of attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from gpseq.propagation.laws import Law
from gpseq.propagation.moments import LinearMap

#: Tokens up to which variances that come from queries and keys are exact.
EXACT = 32
#: With more tokens, random directions that stand for the features of queries and keys. Each such variance scatters by
#: the root of 2 / SKETCH; an output projection averages over all heads and their entries.
SKETCH = 4


@dataclass(frozen=True, eq=False)
class Heads:
    r"""One call of attention, at the mean.

    .. math:: o_t = \sum_s A_{ts} v_s, \qquad A = \operatorname{softmax}(c\, q k^\top + \text{mask})

    Attributes:
        query: ``(B, H, Tq, D)``.
        key: ``(B, H, Tk, D)``.
        value: ``(B, H, Tk, D)``.
        weights: A, ``(B, H, Tq, Tk)``; rows of zeros where a mask leaves nothing.
        scale: c.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    weights: Tensor
    scale: float

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Heads:
        """Attention of projected tokens.

        Args:
            query: ``(B, H, Tq, D)``.
            key: ``(B, H, Tk, D)``.
            value: ``(B, H, Tk, D)``.
            mask: added to the scores, broadcastable to ``(B, H, Tq, Tk)``; ``-inf`` removes a key.
            scale: ``None`` is one by the root of D.
        """
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query @ key.mT * scale
        if mask is not None:
            scores = scores + mask
        nothing = scores.isneginf().all(-1, keepdim=True)
        weights = torch.where(nothing, 0.0, scores.masked_fill(nothing, 0.0).softmax(-1))
        return cls(query, key, value, weights, scale)

    @cached_property
    def output(self) -> Tensor:
        """``(B, H, Tq, D)``."""
        return self.weights @ self.value

    def tangent(self, query: Tensor | None, key: Tensor | None, value: Tensor) -> Tensor:
        r"""Change of the output with all three, for many changes at a time.

        .. math::
            do_t = \sum_s A_{ts}\, dv_s + \sum_s A_{ts} \Bigl( \ell_{ts} - \sum_u A_{tu} \ell_{tu} \Bigr) v_s, \qquad
            \ell_{ts} = c\, (dq_t \cdot k_s + q_t \cdot dk_s)

        Args:
            query: ``(R, B, H, Tq, D)``; with ``None`` here and for the keys the weights of attention are constants.
            key: ``(R, B, H, Tk, D)``.
            value: the same.

        Returns:
            ``(R, B, H, Tq, D)``.
        """
        change = self.weights @ value
        if query is None or key is None:
            return change
        pull = query @ self.key.mT + self.query @ key.mT
        pull = pull * (self.weights * self.scale)
        # The sum of the pulls comes with the product: it is that with a value of one.
        both = pull @ nn.functional.pad(self.value, (0, 1), value=1.0)
        return torch.addcmul(change + both[..., :-1], both[..., -1:], self.output, value=-1)

    def squared(self, query: Tensor | None, key: Tensor | None, value: Tensor) -> Tensor:
        r"""Variances of the output where all entries of queries, keys and values are independent.

        Args:
            query: variances, ``(B, H, Tq, D)``; with ``None`` here and for the keys the weights are constants.
            key: variances, ``(B, H, Tk, D)``.
            value: the same.

        Returns:
            ``(B, H, Tq, D)``.
        """
        found = self.weights.square() @ value
        if query is not None:
            found = found + self.from_query(query)
        if key is not None:
            found = found + self.from_key(key)
        return found

    def from_query(self, variance: Tensor) -> Tensor:
        r"""What variances of the queries' entries leave.

        .. math:: \sum_j (\partial o_{ti} / \partial q_{tj})^2 s_{tj}
        """
        key, width = self.key, self.key.shape[-1]
        if key.shape[-2] > EXACT and width > SKETCH and width % SKETCH == 0:
            # Entries in groups, with random signs, and a group's mean variance.
            key = (key * _signs(width, 1, key).view(-1)).unflatten(-1, (-1, SKETCH)).sum(-2)
            variance = variance.unflatten(-1, (-1, SKETCH)).mean(-2)
        return self.scale**2 * self._spread(key, variance)

    def _spread(self, features: Tensor, variance: Tensor | None) -> Tensor:
        r"""Squares of the covariances of values and some features under the weights, summed over features.

        .. math:: \sum_j \Bigl( \sum_s A_{ts} (v_{si} - o_{ti}) f_{sj} \Bigr)^2 s_{tj}

        Args:
            features: f, ``(B, H, Tk, J)``.
            variance: s, ``(B, H, Tq, J)``; ``None`` is one.

        Returns:
            ``(B, H, Tq, D)``.
        """
        found = []
        parts = [self.weights, self.value, features, self.output]
        number = self.value.shape[-1] * features.shape[-1]
        for some in self._in_parts(number, *parts, *([] if variance is None else [variance])):
            weights, value, feature, output = some[:4]
            pairs = (feature.unsqueeze(-1) * value.unsqueeze(-2)).flatten(-2)  # side by side
            both = (weights @ pairs).unflatten(-1, (-1, value.shape[-1]))  # (n, Tq, J, D)
            centred = torch.addcmul(both, (weights @ feature).unsqueeze(-1), output.unsqueeze(-2), value=-1)
            total = torch.zeros_like(output)
            for j, one in enumerate(centred.square().unbind(-2)):
                total = total + one if variance is None else torch.addcmul(total, one, some[4][..., j, None])
            found.append(total)
        return torch.cat(found).view_as(self.output)

    def from_key(self, variance: Tensor) -> Tensor:
        """The same for the keys' entries, which all queries see."""
        pull = self.query.square() @ variance.mT * self.weights.square() * self.scale**2  # (B, H, Tq, Tk)
        # sum_s pull (v_si - o_ti)^2, written out
        value, output = self.value, self.output
        spread = pull @ value.square() - 2 * output * (pull @ value) + output.square() * pull.sum(-1, keepdim=True)
        return spread.clamp_min(0)

    def from_key_weights(self, rows: Tensor, columns: Tensor, tokens: Tensor) -> Tensor:
        r"""What noise of the keys' weights leaves, which all tokens share.

        The weights' variances are taken to be products :math:`s_{hj} r_i`.

        Args:
            rows: s, ``(H, D)``.
            columns: r, ``(E,)``.
            tokens: what the weights multiply, ``(B, Tk, E)``.

        Returns:
            ``(B, H, Tq, D)``.
        """
        size = (self.query.square() * rows.unsqueeze(-2)).sum(-1, keepdim=True) * self.scale**2
        # What all keys have in common does not move a softmax, and would only cost digits.
        tokens = (tokens - tokens.mean(1, keepdim=True)) * columns.sqrt()
        heads = self.query.shape[1]
        if tokens.shape[1] > EXACT:
            if tokens.shape[-1] > SKETCH:
                tokens = tokens @ (_signs(tokens.shape[-1], SKETCH, tokens) * SKETCH**-0.5)
            return size * self._spread(tokens.unsqueeze(1).expand(-1, heads, -1, -1), None)
        alike = (tokens @ tokens.mT).unsqueeze(1).expand(-1, heads, -1, -1)
        found = []
        number = self.value.shape[-1] * tokens.shape[1]
        for weights, value, output, both in self._in_parts(number, self.weights, self.value.mT, self.output, alike):
            # For each query and feature i, w_s = A_ts (v_si - o_ti), and w' alike w.
            pull = weights.unsqueeze(-2) * (value.contiguous().unsqueeze(-3) - output.unsqueeze(-1))  # (n, Tq, D, Tk)
            pull = pull.flatten(1, 2)
            found.append(((pull @ both) * pull).sum(-1).clamp_min(0))
        return size * torch.cat(found).view_as(self.output)

    def _in_parts(self, number: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Some heads at a time, ``(n, ...)`` of ``(B, H, ...)``: on a CPU as many as stay in the cache."""
        tokens = max(self.query.shape[-2], self.key.shape[-2])
        room = 2**18 if self.query.device.type == "cpu" else 2**27
        together = max(room // (tokens * number), 1)
        yield from zip(*(tensor.flatten(0, 1).split(together) for tensor in tensors), strict=True)


def _signs(rows: int, columns: int, like: Tensor) -> Tensor:
    """Random signs, ``(rows, columns)``, which are always the same."""
    return _drawn_signs(rows, columns, like.dtype, like.device)


@lru_cache(maxsize=16)
def _drawn_signs(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kept where they are used. A later call may need a graph, which tensors of the inference mode cannot be in.
    with torch.inference_mode(False):
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = torch.randint(2, (rows, columns), generator=generator, device="cpu") * 2 - 1
        return drawn.to(device, dtype)


def heads_map(heads: Heads, frozen: bool = False) -> LinearMap:
    """Attention of packed tokens as a linear map: queries, keys and values of all heads side by side.

    Args:
        heads: at the mean; Tq equal to Tk.
        frozen: whether the weights of attention are constants.

    Returns:
        From events ``(T, 3 H D)`` to ``(T, H D)``.
    """
    number = heads.query.shape[1]

    def split(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = packed.chunk(3, -1)
        query, key, value = (part.unflatten(-1, (number, -1)).transpose(-3, -2) for part in parts)
        return query, key, value

    def join(out: Tensor) -> Tensor:
        return out.transpose(-3, -2).flatten(-2)

    def push(columns: Tensor) -> Tensor:
        query, key, value = split(columns)
        return join(heads.tangent(None, None, value) if frozen else heads.tangent(query, key, value))

    def squared(variance: Tensor) -> Tensor:
        query, key, value = split(variance)
        return join(heads.squared(None, None, value) if frozen else heads.squared(query, key, value))

    return LinearMap(push, squared, mixes=True)


def separable(law: Law, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Variances of a matrix of weights as a product of rows and columns that has their sums.

    Args:
        law: of the matrix, ``(H D, E)``.
        width: D.
        like: gives dtype and device.

    Returns:
        ``(H, D)`` and ``(E,)``.
    """
    entries = law.marginals().to(like)  # (H D, E)
    total = entries.sum().clamp_min(torch.finfo(like.dtype).tiny)
    return entries.sum(1).unflatten(0, (-1, width)), entries.sum(0) / total

r"""Softmax attention as a map of moments: its tangent, and the variances that independent tokens leave.

Letters: B elements of the batch, H heads, Tq and Tk tokens, D the width of a head, A the weights of attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpseq.propagation.laws import Law
from gpseq.propagation.moments import LinearMap


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

    @property
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
        scores = torch.cat([query, self.query.expand_as(query)], -1) @ torch.cat([self.key.expand_as(key), key], -1).mT
        pull = self.weights * scores * self.scale
        return change + pull @ self.value - pull.sum(-1, keepdim=True) * self.output

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
        # G_tij = c sum_s A_ts (v_si - o_ti) k_sj, the covariance of values and keys under the weights.
        found = []
        parts = (self.weights, self.value, self.key, self.output, variance)
        for weights, value, key, output, spread in self._in_parts(*parts):
            pairs = (value.unsqueeze(-1) * key.unsqueeze(-2)).flatten(-2)
            both = (weights @ pairs).unflatten(-1, (value.shape[-1], -1))
            centred = both - output.unsqueeze(-1) * (weights @ key).unsqueeze(-2)
            found.append((centred.square() @ spread.unsqueeze(-1)).squeeze(-1))
        return self.scale**2 * torch.cat(found).view_as(self.output)

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
        tokens = tokens - tokens.mean(1, keepdim=True)
        alike = ((tokens * columns) @ tokens.mT).unsqueeze(1).expand(-1, self.query.shape[1], -1, -1)
        found = []
        for weights, value, output, both in self._in_parts(self.weights, self.value, self.output, alike):
            # For each query and feature i, w_s = A_ts (v_si - o_ti), and w' alike w.
            pull = weights.unsqueeze(-2) * (value.mT.unsqueeze(-3) - output.unsqueeze(-1))  # (n, Tq, D, Tk)
            pull = pull.flatten(1, 2)
            found.append(((pull @ both) * pull).sum(-1).clamp_min(0))
        return size * torch.cat(found).view_as(self.output)

    def _in_parts(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Some heads at a time, ``(n, ...)`` of ``(B, H, ...)``: on a CPU as many as stay in the cache."""
        queries, keys, width = self.query.shape[-2], self.key.shape[-2], self.key.shape[-1]
        room = 2**19 if self.query.device.type == "cpu" else 2**27
        together = max(room // (queries * width * max(width, keys)), 1)
        yield from zip(*(tensor.flatten(0, 1).split(together) for tensor in tensors), strict=True)

    def independent_values(self, variance: Tensor) -> Tensor:
        """Variances of the output for values whose noise is independent between tokens: ``(B, H, Tk, D)``."""
        return self.weights.square() @ variance


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
    entries = law.variance(torch.eye(law.shape[1], dtype=like.dtype, device=like.device)).mT  # (H D, E)
    total = entries.sum().clamp_min(torch.finfo(like.dtype).tiny)
    return entries.sum(1).unflatten(0, (-1, width)), entries.sum(0) / total

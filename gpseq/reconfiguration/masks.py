"""What a block is told about which tokens may see which, in one convention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpseq.checks import check_floating


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks of self-attention as in ``nn.MultiheadAttention``: ``True`` is ignored, and floats are added to scores.

    Attributes:
        pairs: ``(T, T)`` or ``(B, H, T, T)`` with 1 in the place of B or H where it is the same for all, queries before
            keys; ``None``: all are seen.
        keys: ``(B, T)``, bool; ``None``: none is ignored.
        causal: whether a token sees none after it, whatever ``pairs`` says.

    Example:
        >>> Masks(keys=torch.tensor([[False, True]])).padding()
        tensor([[False,  True]])
    """

    pairs: Tensor | None = None
    keys: Tensor | None = None
    causal: bool = False

    @classmethod
    def of(cls, mask: Tensor | Masks | None, batch: int | None = None) -> Masks:
        """Masks from what a user gives: ``(B, T)`` bools for keys, ``(T, T)`` or ``(B, H, T, T)`` for pairs.

        Args:
            mask: see above.
            batch: B, by which a square one is told apart; ``None``: it is one of pairs.

        Raises:
            TypeError: it is neither bool nor floating point.
            ValueError: it has another number of dimensions, or may be of either kind, as B is T.
        """
        if mask is None or isinstance(mask, Masks):
            return mask or cls()
        if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: expected a tensor of bools or floating-point numbers, got {got}.")
        if mask.dim() == 2 and mask.dtype == torch.bool:
            if mask.shape[0] != mask.shape[1]:
                return cls(keys=mask)
            if len(mask) == batch:
                raise ValueError(
                    f"mask: expected Masks(keys=mask) or Masks(pairs=mask), as a shape of {tuple(mask.shape)} may be "
                    "(B, T) or (T, T), got a tensor."
                )
        if mask.dim() in (2, 4):
            return cls(pairs=mask)
        raise ValueError(f"mask: expected (B, T), (T, T) or (B, H, T, T), got shape {tuple(mask.shape)}.")

    def padding(self) -> Tensor | None:
        """Tokens that nobody sees, ``(B, T)`` or ``(1, T)``; ``None`` where that cannot be."""
        found = self.keys
        if self.pairs is not None:
            unseen = ignored(self.pairs).all(dim=-2)
            unseen = unseen.unsqueeze(0) if unseen.dim() == 1 else unseen.all(dim=1)
            found = unseen if found is None else found | unseen
        return found

    def check(self, batch: int, tokens: int, heads: int) -> Masks:
        """The same, if it fits.

        Args:
            batch: B.
            tokens: T.
            heads: H.

        Raises:
            ValueError: it does not.
        """
        if self.keys is not None and self.keys.shape not in ((batch, tokens), (1, tokens)):
            raise ValueError(f"mask: expected {(batch, tokens)} for keys, got {tuple(self.keys.shape)}.")
        if self.pairs is not None:
            shape = tuple(self.pairs.shape)
            fits = shape[-2:] == (tokens, tokens)
            if len(shape) == 4:
                fits = fits and shape[0] in (1, batch) and shape[1] in (1, heads)
            if not fits:
                raise ValueError(
                    f"mask: expected {(tokens, tokens)}, or {(batch, heads, tokens, tokens)} with 1 in the place of "
                    f"the first two where all share it, got {shape}."
                )
        return self

    def for_attention(self, like: Tensor, heads: int) -> dict[str, Tensor | None]:
        """Arguments of ``nn.MultiheadAttention``: keys alone stay ``(B, T)``, all else becomes one float.

        A query that may see no key at all sees itself, so that its softmax is a number; such queries are padding.

        Args:
            like: tokens ``(B, T, D)``.
            heads: H.

        Returns:
            ``key_padding_mask``, ``(B, T)``, and ``attn_mask``, ``(T, T)`` or ``(B H, T, T)``; at most one is given.

        Raises:
            ValueError: a mask does not fit.
        """
        batch, tokens = like.shape[:2]
        self.check(batch, tokens, heads)
        if self.pairs is None and not self.causal:
            keys = self.keys
            if keys is not None:  # of an element that is all padding nothing is hidden
                keys = (keys & ~keys.all(dim=-1, keepdim=True)).expand(batch, tokens)
            return {"key_padding_mask": keys, "attn_mask": None}
        hidden = torch.zeros(1, 1, tokens, tokens, dtype=torch.bool, device=like.device)
        added = like.new_zeros(())
        if self.causal:
            hidden = hidden | torch.ones(tokens, tokens, dtype=torch.bool, device=like.device).triu(1)
        if self.keys is not None:
            hidden = hidden | self.keys[:, None, None, :]
        if self.pairs is not None:
            hidden = hidden | ignored(self.pairs)
            added = added if self.pairs.dtype == torch.bool else self.pairs.to(like.dtype)
        alone = torch.eye(tokens, dtype=torch.bool, device=like.device) & hidden.all(dim=-1, keepdim=True)
        found = torch.where(hidden, torch.where(alone, 0.0, float("-inf")).to(like.dtype), added)
        shared = found.shape[:2] == (1, 1)
        found = found[0, 0] if shared else found.expand(batch, heads, tokens, tokens).flatten(0, 1)
        return {"key_padding_mask": None, "attn_mask": found}


def ignored(mask: Tensor) -> Tensor:
    """Where a mask hides a key; hosts write minus infinity, or the least number of a dtype.

    Args:
        mask: bool or float.
    """
    if mask.dtype == torch.bool:
        return mask
    return check_floating("mask", mask) <= torch.finfo(mask.dtype).min / 2


def only_hides(mask: Tensor) -> bool:
    """Whether a mask adds nothing to the scores of what it does not hide.

    Args:
        mask: bool or float.
    """
    return mask.dtype == torch.bool or bool((ignored(mask) | (mask == 0)).all())


def additive_to_keys(mask: Tensor, seen: bool = False) -> tuple[Tensor | None, Tensor | None]:
    """A mask ``(B, H, T, T)`` as one of pairs, or of keys where it was made by repeating those.

    Args:
        mask: bool or float; ``(B, 1, 1, T)`` is the same for all queries.
        seen: whether ``True`` is for what is seen, rather than for what is ignored.

    Returns:
        Pairs and keys, one of them ``None``.
    """
    if mask.dim() == 4 and mask.shape[1] == 1 and (mask.shape[2] == 1 or mask.stride(2) == 0):
        row = mask[:, 0, 0]  # looked at before its sign changes, which writes the rows out
        if only_hides(row):
            return None, ~row if seen and row.dtype == torch.bool else ignored(row)
        mask = mask.expand(-1, -1, mask.shape[-1], -1)
    return ~mask if seen and mask.dtype == torch.bool else mask, None

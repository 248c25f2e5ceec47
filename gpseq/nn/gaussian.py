"""What attention layers with Gaussian heads share: how they draw, and their moments in one pass."""

from __future__ import annotations

from linear_operator.operators import RootLinearOperator
from torch import Tensor

from gpseq.checks import check_count
from gpseq.nn.projection import ProjectedAttention, Tokens
from gpseq.nn.sampling import Sampled
from gpseq.sgpa.draws import deviations


class GaussianAttention(Sampled, ProjectedAttention):
    """Base of attention layers whose heads are Gaussian processes.

    Subclasses implement :meth:`marginals`.

    Attributes:
        num_samples: how many times each sequence stands in the batch; divergences are averaged over them. 1 unless set.
    """

    @property
    def num_samples(self) -> int:
        """How many times each sequence stands in the batch."""
        return self._num_samples

    @num_samples.setter
    def num_samples(self, num_samples: int) -> None:
        self._num_samples = check_count("num_samples", num_samples)

    def marginals(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Mean and marginal variances of the heads.

        Args:
            tokens: of the call.

        Returns:
            ``(B, H, Tq, D)`` and ``(B, H, D, Tq)``, or of size 1 in place of D.
        """
        raise NotImplementedError(f"{type(self).__name__} must define marginals().")

    def conditional(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, RootLinearOperator]:
        r"""Mean and covariance of each token's output in one pass, without a draw.

        The output projection is linear, so :math:`W_O \operatorname{diag}(\sigma^2) W_O^\top` is exact for every token
        by itself. What the last call left behind stays.

        Args:
            query: as in :meth:`forward`.
            key: as in :meth:`forward`; ``None`` is self-attention.
            value: as in :meth:`forward`; ``None`` is ``key``.
            key_padding_mask: as in :meth:`forward`.
            attn_mask: as in :meth:`forward`.
            is_causal: as in :meth:`forward`.

        Returns:
            Mean in the layout of ``query``, and its leading dimensions with ``(embed_dim, embed_dim)``, the covariance.

        Raises:
            TypeError: as :meth:`forward`.
            ValueError: as :meth:`forward`.

        Example:
            >>> import torch
            >>> from gpseq.nn import SGPAttention
            >>> layer = SGPAttention(8, 2, num_inducing=4)
            >>> mean, covariance = layer.conditional(torch.randn(5, 8))
            >>> mean.shape, covariance.shape
            (torch.Size([5, 8]), torch.Size([5, 8, 8]))
        """
        key = query if key is None else key
        value = key if value is None else value
        tokens, batched = self._tokens(query, key, value, key_padding_mask, False, attn_mask, is_causal)
        mean, variance = self.marginals(tokens)
        deviation = deviations(variance).mT.expand_as(mean)
        weight = self.out_proj.weight
        root = weight * deviation.transpose(-3, -2).flatten(-2).unsqueeze(-2).to(weight.dtype)
        if tokens.is_self and tokens.removed is not None:
            root = root.masked_fill(tokens.removed[..., None, None], 0.0)
        return self._output(mean, tokens, batched), RootLinearOperator(self._layout(root, batched))

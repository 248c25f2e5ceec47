"""Attention by the singular vectors of an asymmetric kernel, with a Gaussian process on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpseq.checks import check_count
from gpseq.nn.divergence import divergence_of_data
from gpseq.nn.linear_time import Heads, LinearTimeAttention, key_weights, only_causal
from gpseq.nn.projection import Tokens
from gpseq.sgpa.arguments import check_choice
from gpseq.sgpa.basis import algebra_dtype
from gpseq.sgpa.eigen import eigen_features, eigen_kl, ksvd_objective, unit_tokens
from gpseq.sgpa.scales import variance_correction


class KEPAttention(LinearTimeAttention):
    r"""Self-attention with untied queries and keys, as Gaussian processes on the singular vectors of its kernel.

    The kernel :math:`\kappa(x, y) = \phi(q(x))^\top \phi(k(y))`, :math:`\phi(z) = z / |z|`, is not symmetric. It has
    left and right singular vectors instead of eigenvectors, and the projections on ``rank`` of them are

    .. math::
        e = \phi(q)\, W_e, \qquad r = \phi(k)\, W_r

    with weights made of the sequence (:func:`gpseq.sgpa.eigen.eigen_features`). Both
    :math:`\kappa \kappa^\top` and :math:`\kappa^\top \kappa` are symmetric and have the eigenvalues :math:`\Lambda^2`.
    Inducing variables u on the eigenpairs with prior :math:`N(0, \Lambda^2)` and one Gaussian
    :math:`q(u_d) = N(m_d, L_d L_d^\top)` for each output dimension give

    .. math::
        \mu_d = (e + r) \Lambda^{-1} m_d, \qquad
        \Sigma_d = (e + r) \Lambda^{-1} L_d L_d^\top \Lambda^{-1} (e + r)^\top .

    Nothing is T x T: time and memory are linear in the number of tokens.

    :meth:`kl_divergence` depends on the parameters alone. :meth:`ksvd_loss` is small where e and r are projections on
    singular vectors, and has to be added to the loss with a weight of its own for them to become that; without it the
    layer is a valid Gaussian process all the same, on free features. It is a degenerate one, of rank ``rank`` and with
    prior variance :math:`|e + r|^2`: unlike an RBF kernel's this does not grow far from the data.

    Where this departs from the published layer, and why:

    - The published weights are ``rank * 10`` sampled tokens times position-wise parameters, which fixes the length.
      Here they follow from the dual of the decomposition, :math:`W_e = \tfrac1n \sum_j \phi(k_j) h_j^\top`, with dual
      variables :math:`h_j` that are a linear map of the value of token j. So there are values, any length from 1 on,
      padding, and a causal form.
    - :math:`L_d` is lower triangular in the right pair of axes, so its covariance is not singular and the divergence is
      that of the covariance in use. (In the public code the triangle runs over rank and output dimension.)
    - Each of the D output dimensions has functions of its own; published are ``rank`` functions and a linear map.
    - Noise is independent over output dimensions, as their posteriors are.

    Args:
        embed_dim: width of the tokens, a multiple of ``num_heads``.
        num_heads: H.
        rank: s, singular vectors a head. Tokens may be fewer. More than ``head_dim`` are redundant, and refused.
        sampling: ``"marginal"`` noise for each token and dimension by itself, ``"joint"``, a function a sequence (right
            for pooled outputs, and the cheapest), or ``"mean"``.
        dropout: share of tokens whose value is dropped in training.
        bias: of queries, keys, values and output.
        add_bias_kv: not supported.
        add_zero_attn: not supported.
        kdim: must be ``embed_dim``: queries and keys are of the same tokens.
        vdim: width of the values.
        batch_first: whether the batch is the first dimension or the second.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        sampling: may be set at any time.
        num_samples: how many times each sequence stands in the batch. 1 unless set.
        left_map: from values to left dual variables, ``(H, D, s)``.
        right_map: to right ones, ``(H, D, s)``.
        log_singular: logarithm of :math:`\Lambda`, ``(H, s)``.
        inducing_mean: m, ``(H, s, D)``.
        log_diagonal: of L, ``(H, D, s)``.
        lower: entries of L below the diagonal, ``(H, D, s, s)``.

    Shape:
        As ``nn.MultiheadAttention``, self-attention only: r lives at the keys, e at the queries, and their sum needs
        both at one token. Masks on pairs of tokens: none, or the causal one, by any name; under it row t is the layer's
        answer for tokens 1 to t by themselves. A floating ``key_padding_mask`` b multiplies the kernel's columns by
        :math:`e^b`. Returned weights are :math:`\kappa(x_i, x_j) / n`, the matrix whose singular vectors are meant.

    Source:
        Chen, Tao, Tonin and Suykens (2024), Self-Attention through Kernel-Eigen Pair Sparse Variational Gaussian
        Processes.

    Example:
        >>> layer = KEPAttention(embed_dim=8, num_heads=2, rank=3, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> out, _ = layer(x, x, x, need_weights=False)
        >>> out.shape, layer.kl_divergence() < 2.0, layer.ksvd_loss() >= 0
        (torch.Size([3, 5, 8]), tensor(True), tensor(True))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        rank: int = 10,
        sampling: str = "marginal",
        *,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            tied=False,
            dropout=dropout,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        if self.kdim != self.embed_dim:
            raise ValueError(
                f"kdim: expected embed_dim = {embed_dim}: queries and keys are of the same tokens, got {kdim}."
            )
        self.rank = check_count("rank", rank)
        if rank > self.head_dim:
            raise ValueError(
                f"rank: expected at most the width of a head, {self.head_dim}, the rank of its kernel, got {rank}."
            )
        self.sampling, self.num_samples = sampling, 1

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_heads, *shape, device=device, dtype=dtype))

        self.left_map, self.right_map = empty(self.head_dim, rank), empty(self.head_dim, rank)
        self.log_singular = empty(rank)
        self.inducing_mean = empty(rank, self.head_dim)
        self.log_diagonal = empty(self.head_dim, rank)
        self.lower = empty(self.head_dim, rank, rank)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew: the covariance of q(u) is the prior's, its mean costs about half a nat."""
        self.reset_projections()
        for dual in (self.left_map, self.right_map):
            nn.init.normal_(dual, std=self.head_dim**-0.5)
        nn.init.zeros_(self.log_singular)
        nn.init.normal_(self.inducing_mean, std=(self.embed_dim * self.rank) ** -0.5)
        nn.init.zeros_(self.log_diagonal)
        nn.init.zeros_(self.lower)

    @property
    def scale_tril(self) -> Tensor:
        """L, the lower factor of the covariance of q(u) of each output dimension, ``(H, D, s, s)``."""
        return self.lower.tril(-1) + torch.diag_embed(self.log_diagonal.exp())

    def heads(self, tokens: Tokens, variance: bool) -> Heads:
        """Posterior of the heads; see the base class."""
        if not tokens.is_self:
            raise ValueError(
                "key: expected the same tensor as query: r lives at the keys, e at the queries, and the layer needs "
                "their sum at one token. RFFAttention and SGPAttention do cross-attention."
            )
        is_causal = only_causal(tokens, "other ones need the kernel's T x T matrix, which this layer never forms")
        query, key, value = (
            self.project_query(tokens.query),
            self.project_key(tokens.key),
            self.project_value(tokens.value),
        )
        dtype = algebra_dtype(query)
        with torch.autocast(query.device.type, enabled=False):
            keep, counts = key_weights(tokens, dtype)
            q, k, v = unit_tokens(query.to(dtype)), unit_tokens(key.to(dtype)), value.to(dtype)
            k = k if counts is None else k * counts
            duals = v @ self.left_map.to(dtype), v @ self.right_map.to(dtype)
            features = eigen_features(q, k, *duals, keep, is_causal)
            singular = self.log_singular.to(dtype).exp()
            # The sum over whole sequences is J's, whatever a token sees: as a loss it may look ahead.
            whole = eigen_features(q, k, *duals, keep) if is_causal else features
            objective = ksvd_objective(whole, singular, keep)
            both = features.left + features.right
            mean = both @ (self.inducing_mean.to(dtype) / singular.unsqueeze(-1))
            root = self.scale_tril.to(dtype) / singular[:, None, :, None]
            spread = None
            if variance:
                spread = variance_correction(root, both) + both.square().sum(-1, keepdim=True)
                spread = spread.mT.clamp_min(0.0)
            weights = self._kernel_matrix(q, k, keep, is_causal).to(query.dtype) if tokens.need_weights else None
        return Heads(mean.to(query.dtype), spread, both, root, weights, objective)

    def kl_divergence(self, num_data: int | None = None, convention: str | None = None) -> Tensor:
        r"""What q(u) costs, in nats: :math:`\sum_{h,d} \mathrm{KL}[N(m_d, L_d L_d^\top) \,\|\, N(0, \Lambda^2)]`.

        Args:
            num_data: N, number of training sequences; ``None`` is the batch of the last call. It matters for
                ``"per_sequence"`` only.
            convention: ``"global"`` (also ``None``): one function for all sequences, paid once. ``"per_sequence"``: a
                function a sequence, N times that, as published.

        Returns:
            A scalar. Divided by N, it is what is added to the mean cross-entropy.

        Raises:
            RuntimeError: the size of the batch is asked for, and the layer was not called yet.
            ValueError: the convention is unknown.
        """
        check_choice("convention", convention, ("global", "per_sequence", None))
        num_data = None if num_data is None else check_count("num_data", num_data)
        dtype = torch.promote_types(self.log_singular.dtype, torch.float32)
        singular = self.log_singular.to(dtype).exp()
        total = eigen_kl(self.inducing_mean.to(dtype), self.scale_tril.to(dtype), singular).sum()
        per_sequence = convention == "per_sequence"
        if self._cost is None and per_sequence and num_data is None:
            raise RuntimeError("kl_divergence: expected a call of the layer before, whose batch is all the data.")
        own = total.new_zeros(self.num_samples if self._cost is None else len(self._cost))
        return divergence_of_data(total, own, self.num_samples, num_data, per_sequence)

    def ksvd_loss(self) -> Tensor:
        r"""How far the last call was from a singular value decomposition: :math:`\tfrac1B \sum_b \sum_h J_{bh}^2`.

        J (:func:`gpseq.sgpa.eigen.ksvd_objective`) is zero at singular vectors. To be added to the loss with a weight.

        Returns:
            A scalar.

        Raises:
            RuntimeError: the layer was not called yet.
        """
        if self._cost is None:
            raise RuntimeError("ksvd_loss: expected a call of the layer before, it is that of what it saw.")
        return self._cost.square().sum(-1).mean() if len(self._cost) else self._cost.sum()

    def _kernel_matrix(self, query: Tensor, key: Tensor, keep: Tensor | None, is_causal: bool) -> Tensor:
        """The kernel over the number of keys, ``(B, H, T, T)``."""
        matrix = query @ key.mT
        if keep is not None:
            matrix = matrix * keep.unsqueeze(-2)
        if not is_causal:
            return matrix / (matrix.shape[-1] if keep is None else keep.sum(-1)[..., None, None].clamp_min(1))
        there = torch.ones(matrix.shape[-1:], device=matrix.device) if keep is None else keep.to(matrix.dtype)
        return matrix.tril() / there.cumsum(-1).clamp_min(1.0).unsqueeze(-1)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{super().extra_repr()}, rank={self.rank}"

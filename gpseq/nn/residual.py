"""A Gaussian process that is added to attention which something else computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpseq.checks import check_count, check_jitter
from gpseq.nn.divergence import divergence_of_data
from gpseq.nn.inducing import COVARIANCES, InducingKeys
from gpseq.nn.sampling import Sampled
from gpseq.sgpa.arguments import check_choice
from gpseq.sgpa.posterior import AttentionPosterior


class ResidualGP(Sampled):
    r"""What mode ``"residual"`` adds to trained attention, for hosts that compute the attention themselves.

    .. math:: f = A + g, \qquad g \sim GP(0, k) \text{ on the queries}, \qquad m = A + K_{qg}\, v_g

    A is what the host computes, under its own masks, positions and caches. At the start :math:`v_g = 0`, so that the
    mean is A exactly; the variance grows to the prior's away from the inducing keys. Inducing keys lie among the
    projected queries, since that is all that hosts hand over.

    Args:
        num_heads: H.
        head_dim: D, of queries and of values.
        num_inducing: M, inducing keys a head.
        kernel: ``"rbf"`` or ``"exponential"``.
        covariance: of q(u), as in :class:`~gpseq.nn.SGPAttention`.
        sampling: ``"marginal"``, ``"joint"``, ``"pathwise"`` or ``"mean"``, as there.
        rank: of the low-rank covariance.
        jitter: relative; ``None`` fits the dtype.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        sampling: may be set at any time.
        self_attention: whether queries look at each other, True unless the host says otherwise. Only then does a mask
            of keys say which queries are padding.
        inducing: the parameters, a :class:`~gpseq.nn.inducing.InducingKeys`.

    Source:
        Derived in the guide "Attention as a sparse GP", mode ``"residual"``; not the published method.

    Example:
        >>> gp = ResidualGP(num_heads=2, head_dim=4, num_inducing=3, sampling="mean")
        >>> query, heads = torch.randn(2, 1, 2, 5, 4)
        >>> gp(query, heads).equal(heads), gp.kl_divergence().item()
        (True, 0.0)
    """

    SAMPLING = ("marginal", "joint", "pathwise", "mean")
    # What the last call left behind, and where draws come from: neither is copied or saved.
    _transient = frozenset({"generator", "_batch"})
    _batch: int | None = None
    self_attention: bool = True

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_inducing: int = 16,
        kernel: str = "rbf",
        covariance: str = "shared",
        sampling: str = "marginal",
        *,
        rank: int = 2,
        jitter: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("kernel", kernel, ("rbf", "exponential"))
        check_choice("covariance", covariance, COVARIANCES)
        self.num_heads, self.head_dim = check_count("num_heads", num_heads), check_count("head_dim", head_dim)
        self.num_inducing = check_count("num_inducing", num_inducing)
        self.kernel, self.covariance, self.sampling = kernel, covariance, sampling
        self.rank, self.jitter = check_count("rank", rank), check_jitter(jitter)
        self.num_samples = 1
        self.inducing = InducingKeys(
            num_heads, num_inducing, head_dim, head_dim, covariance, self.rank, device=device, dtype=dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw inducing keys anew; q(u) is the prior, and the noise about a hundredth of normalised tokens."""
        variance = 1e-4 if self.kernel == "rbf" else 3e-5  # as mode "residual" of SGPAttention has it
        self.inducing.reset(self.head_dim**0.5 * (1.0 if self.kernel == "rbf" else 2**0.5), variance)

    def settings(self) -> dict[str, Any]:
        """Options that make the same layer again, as plain numbers and names: all but widths, device and dtype."""
        names = ("num_inducing", "kernel", "covariance", "sampling", "rank", "jitter")
        return {name: getattr(self, name) for name in names}

    def posterior(self, query: Tensor, output: str = "diagonal") -> AttentionPosterior:
        """What is added to the heads: posterior of the GP at the queries.

        Args:
            query: projected queries, ``(B, H, T, D)``.
            output: ``"diagonal"``, ``"full"`` or ``"mean"``, see :func:`gpseq.sgpa.inducing_posterior`.

        Returns:
            Mean ``(B, H, T, D)``, with a variance ``(B, H, D, T)`` (or of size 1 in place of D) or covariance.

        Raises:
            ValueError: a shape does not fit.
        """
        if query.dim() != 4 or query.shape[1] != self.num_heads or query.shape[-1] != self.head_dim:
            raise ValueError(
                f"query: expected shape (batch, {self.num_heads}, tokens, {self.head_dim}), got {tuple(query.shape)}."
            )
        return self.inducing.posterior(query, **self.kernel_options(), output=output)

    def kernel_options(self) -> dict[str, Any]:
        """What :meth:`gpseq.nn.inducing.InducingKeys.posterior` has to know of the layer."""
        return {"kernel": self.kernel, "jitter": self.jitter}

    def forward(self, query: Tensor, heads: Tensor, mask: Tensor | None = None) -> Tensor:
        """Add a draw of the GP to heads of attention.

        Args:
            query: projected queries, rotated if the host rotates them, ``(B, H, T, D)``.
            heads: what the host's attention gives, ``(B, H, T, D)``.
            mask: the host's mask of pairs of tokens. Nothing is computed from it; in self-attention it tells
                :func:`gpseq.nn.fit_covariance` and its like which queries are padding.

        Returns:
            ``(B, H, T, D)`` in the dtype of ``heads``.

        Raises:
            ValueError: a shape does not fit.
        """
        if heads.shape != query.shape:
            raise ValueError(f"heads: expected the shape of query, {tuple(query.shape)}, got {tuple(heads.shape)}.")
        post = self.posterior(query, {"marginal": "diagonal", "joint": "full"}.get(self.sampling, "mean"))
        self._batch = query.shape[0]
        drawn = self.inducing.draw(post, query, self.sampling, self.generator, self.jitter)
        return (heads + drawn).to(heads.dtype)

    def kl_divergence(self, num_data: int | None = None, convention: str | None = None) -> Tensor:
        r"""What q(u) costs, in nats: all sequences share it.

        Args:
            num_data: N, number of training sequences; it matters with ``"per_sequence"`` only, where ``None`` is the
                batch of the last call.
            convention: ``"global"`` (``None``), :math:`\mathrm{KL}_g`, or ``"per_sequence"``, N times that.

        Returns:
            A scalar.

        Raises:
            RuntimeError: the size of a batch is asked for before any call.
            ValueError: the convention is unknown.
        """
        check_choice("convention", convention, ("global", "per_sequence", None))
        num_data = None if num_data is None else check_count("num_data", num_data)
        per_sequence = convention == "per_sequence"
        if per_sequence and num_data is None and self._batch is None:
            raise RuntimeError("kl_divergence: expected a call of the layer before, or num_data.")
        kl = self.posterior(self.inducing.location.unsqueeze(0)[..., :1, :], "mean").kl_global
        kl = kl.expand(self.num_heads, self.head_dim).sum()
        count = 1 if num_data is None and not per_sequence else num_data
        free = kl.new_zeros(self._batch or 1)
        return divergence_of_data(kl, free, self.num_samples, count, per_sequence)

    def extra_repr(self) -> str:
        """Options, as they stand in the printed model."""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, num_inducing={self.num_inducing}, "
            f"kernel={self.kernel!r}, covariance={self.covariance!r}, sampling={self.sampling!r}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in self._transient}

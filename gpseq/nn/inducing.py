"""The inducing keys of an attention layer: where they are, what is known there, and the kernel around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.nn.projection import may_look
from gpseq.sgpa.draws import joint_sample, marginal_sample, pathwise_noise
from gpseq.sgpa.inducing import inducing_posterior
from gpseq.sgpa.posterior import AttentionPosterior
from gpseq.sgpa.scales import DiagonalScale, LowRankScale, Scale

#: How the whitened covariance of the inducing variables is stored.
COVARIANCES = ("shared", "per_dim", "diagonal", "low_rank")
#: Buffers that are found from data.
FITTED = ("typical_variance", "temperature")


class InducingKeys(nn.Module):
    r"""Parameters of the sparse Gaussian processes of ``H`` heads.

    Attributes:
        location: where the inducing keys are, ``(H, M, embed_dim)`` in the space of the layer's input, or ``(H, M, D)``
            among the projected tokens.
        value: :math:`v_g`, or :math:`w` in the Cheng-Boots form, ``(H, M, D)``.
        log_lengthscale: ``(H, D)``.
        log_variance: ``(H,)``.
        log_diagonal: logarithm of the diagonal of the whitened factor, ``(H, D, M)`` or ``(H, 1, M)``.
        lower: its entries below the diagonal, ``(H, D, M, M)`` or ``(H, 1, M, M)``; ``None`` unless full.
        root: ``(H, D, M, R)``; ``None`` unless low rank.
        typical_variance: a buffer, the mean variance on the tokens that the covariance was fitted to, ``(H,)``; zeros
            before that, see :func:`gpseq.nn.fit_covariance`.
        temperature: a buffer, the layer's part (a, b) of the squared temperature and the power of its variance,
            ``(3,)``; zeros before :func:`gpseq.nn.calibrate`.

    Both buffers stay in float32 or float64 when the module is cast to less: what they say is compared with variances
    and added up over layers. A ``state_dict`` of a time before them loads with zeros.
    """

    typical_variance: Tensor
    temperature: Tensor

    def __init__(
        self,
        num_heads: int,
        num_inducing: int,
        width: int,
        head_dim: int,
        covariance: str,
        rank: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_heads, *shape, device=device, dtype=dtype))

        dims = 1 if covariance == "shared" else head_dim
        full = covariance in ("shared", "per_dim")
        self.location = empty(num_inducing, width)
        self.value = empty(num_inducing, head_dim)
        self.log_lengthscale = empty(head_dim)
        self.log_variance = empty()
        self.log_diagonal = empty(dims, num_inducing)
        self.lower = empty(dims, num_inducing, num_inducing) if full else None
        self.root = empty(dims, num_inducing, rank) if covariance == "low_rank" else None
        precise = _precise(dtype or torch.get_default_dtype())
        self.register_buffer("typical_variance", torch.zeros(num_heads, device=device, dtype=precise))
        self.register_buffer("temperature", torch.zeros(3, device=device, dtype=precise))

    def reset(self, lengthscale: float, variance: float) -> None:
        """Start at the prior: zero values, whitened covariance the identity, locations drawn from N(0, I).

        Args:
            lengthscale: of all heads.
            variance: of all heads.
        """
        nn.init.normal_(self.location)
        nn.init.zeros_(self.value)
        nn.init.constant_(self.log_lengthscale, math.log(lengthscale))
        nn.init.constant_(self.log_variance, math.log(variance))
        nn.init.zeros_(self.log_diagonal)
        if self.lower is not None:
            nn.init.zeros_(self.lower)
        if self.root is not None:
            # At zero a root has no gradient; this is near enough to the prior.
            nn.init.normal_(self.root, std=0.01)
        self.forget_fit()

    def forget_fit(self) -> None:
        """Zero what was found from data, which is true of the keys and the covariance of that time alone."""
        nn.init.zeros_(self.typical_variance)
        nn.init.zeros_(self.temperature)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InducingKeys:
        before = {name: self._buffers[name] for name in FITTED}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != _precise(moved.dtype):
                self._buffers[name] = buffer.to(moved.device, _precise(moved.dtype))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        location = state_dict.get(f"{prefix}location")
        for name in FITTED:
            key, buffer = f"{prefix}{name}", getattr(self, name)
            if isinstance(location, Tensor) and key not in state_dict:
                # Of a time before these buffers: whatever was fitted here is not true of the keys that come.
                state_dict[key] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=location.device)
            elif isinstance(saved := state_dict.get(key), Tensor):
                state_dict[key] = saved.to(_precise(saved.dtype))  # loading may assign it
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def scale(self) -> Scale:
        """The whitened covariance of q(u)."""
        if self.lower is not None:
            return self.lower.tril(-1) + torch.diag_embed(self.log_diagonal.exp())
        if self.root is not None:
            return LowRankScale(self.log_diagonal.exp(), self.root)
        return DiagonalScale(self.log_diagonal.exp())

    def key(self, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The inducing keys among the projected tokens, each head's by its own rows of the projection.

        Args:
            weight: ``(H D, embed_dim)``; ``None`` where locations are among the projected tokens already.
            bias: ``(H D,)`` or ``None``.

        Returns:
            ``(H, M, D)``.
        """
        return project_keys(self.location, weight, bias)

    def posterior(
        self,
        query: Tensor,
        kernel: str,
        jitter: float | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        output: str = "diagonal",
    ) -> AttentionPosterior:
        """Posterior of what the inducing keys alone know, see :func:`gpseq.sgpa.inducing_posterior`.

        Args:
            query: projected, ``(B, H, T, D)``.
            kernel: ``"rbf"`` or ``"exponential"``.
            jitter: relative; ``None`` fits the dtype.
            weight: of the projection of locations, see :meth:`key`.
            bias: likewise.
            output: ``"diagonal"``, ``"full"`` or ``"mean"``.
        """
        tokens = query.shape[-2]
        if (
            output == "mean"
            and tokens
            and not torch.is_grad_enabled()
            and may_look(self.value)
            and not self.value.any()
        ):
            query = query[..., :1, :]  # one token for the divergence: the mean is zero at all of them
        post = inducing_posterior(
            query,
            self.key(weight, bias),
            self.value,
            self.scale,
            self.log_lengthscale.exp(),
            self.log_variance.exp(),
            kernel=kernel,
            jitter=jitter,
            output=output,
        )
        return (
            post if query.shape[-2] == tokens else post._replace(mean=post.mean.expand(*query.shape[:-2], tokens, -1))
        )

    def draw(
        self,
        post: AttentionPosterior,
        query: Tensor,
        sampling: str,
        generator: torch.Generator | None,
        jitter: float | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """One draw of the heads.

        Args:
            post: at the queries, with a variance for ``"marginal"``, and a covariance for ``"joint"``.
            query: projected, ``(B, H, T, D)``.
            sampling: ``"marginal"``, ``"joint"``, ``"pathwise"`` or ``"mean"``.
            generator: of the draws; ``None`` is torch's default generator.
            jitter: relative; ``None`` fits the dtype.
            weight: of the projection of locations, see :meth:`key`.
            bias: likewise.

        Returns:
            ``(B, H, T, D)``.
        """
        if sampling == "mean":
            return post.mean
        if sampling == "marginal":
            assert post.variance is not None
            return marginal_sample(post.mean, post.variance, generator)
        if sampling == "joint":
            assert post.covariance is not None
            return joint_sample(post.mean, post.covariance, generator)
        noise = pathwise_noise(
            query,
            self.key(weight, bias),
            self.scale,
            self.log_lengthscale.exp(),
            self.log_variance.exp(),
            num_dims=self.value.shape[-1],
            factor=post.factor,
            jitter=jitter,
            generator=generator,
        )
        return (post.mean + noise).to(post.mean.dtype)


def _precise(dtype: torch.dtype) -> torch.dtype:
    """Float32, or float64 where there is that."""
    return torch.promote_types(dtype, torch.float32)


def project_keys(location: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Inducing keys among the projected tokens, each head's by its own rows of the projection.

    Args:
        location: ``(H, M, embed_dim)``, or ``(H, M, D)`` where there is no weight.
        weight: ``(H D, embed_dim)``, or ``None``.
        bias: ``(H D,)`` or ``None``.

    Returns:
        ``(H, M, D)``.
    """
    if weight is None:
        return location
    heads = location.shape[0]
    # In the parameters' own precision: the divergence, asked for outside of autocast, is about the same keys.
    with nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False):
        key = location @ weight.unflatten(0, (heads, -1)).mT
        return key if bias is None else key + bias.unflatten(0, (heads, -1)).unsqueeze(-2)

"""Attention in linear time: Gaussian process regression on random features of the keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gpseq.checks import check_count
from gpseq.nn.divergence import divergence_of_data
from gpseq.nn.linear_time import Heads, LinearTimeAttention, key_weights, only_causal
from gpseq.nn.projection import Tokens
from gpseq.sgpa.arguments import check_choice
from gpseq.sgpa.basis import algebra_dtype
from gpseq.sgpa.regression import RegressionPosterior, feature_regression, wave_features


class RFFAttention(LinearTimeAttention):
    r"""Attention as Gaussian process regression of values on keys, in time that is linear in the number of tokens.

    In each head the values are noisy readings of ``D`` functions at the keys, and the output is what is then known of
    them at the queries. The kernel is an RBF kernel seen through R random frequencies,
    :math:`k(x, y) \approx \psi(x)^\top \psi(y)`:

    .. math::
        m = \Psi_q (\Psi_k^\top \Psi_k + \sigma^2 I)^{-1} \Psi_k^\top v, \qquad
        \operatorname{var} = \sigma^2 \operatorname{diag} \Psi_q (\Psi_k^\top \Psi_k + \sigma^2 I)^{-1} \Psi_q^\top .

    The values are parameters of the posterior, not data: each layer that writes its own readings could fit them without
    cost. So the objective is no marginal likelihood of the values but, as in every variational layer, the divergence of
    the posterior from the prior. The functions of a head are linear in :math:`2 R` weights with prior
    :math:`N(0, I)`, and :meth:`kl_divergence` is the divergence of these weights
    (:func:`gpseq.sgpa.regression.feature_regression`): all of it depends on the sequence, nothing is shared by
    sequences.

    With sines and cosines in pairs the prior variance is exactly that of the kernel, and there is no residual to add.
    Its limit is another one: 2 R weights can be learnt from a few times 2 R tokens, and then the layer is sure
    everywhere, also far from all keys, where the exact process is not.

    Args:
        embed_dim: width of the tokens, a multiple of ``num_heads``.
        num_heads: H.
        num_frequencies: R, frequencies a head; there are 2 R features.
        sampling: ``"marginal"`` noise for each token and dimension by itself, ``"joint"``, a function a sequence (not
            under a causal mask, where every query has a posterior of its own), or ``"mean"``.
        learn_frequencies: whether frequencies are parameters. Then the kernel is any stationary one with R frequencies;
            fixed ones stay those of an RBF kernel, whose length-scales are learnt in any case.
        noise_scale: ``None`` as published: more keys, more known, and a greater divergence. ``"length"`` multiplies
            the noise variance by the number of keys, so that a sequence says as much whatever its length is; not under
            a causal mask, where the noise would be another for each prefix.
        dropout: share of keys whose value is dropped in training.
        bias: of values and output.
        add_bias_kv: not supported.
        add_zero_attn: not supported.
        kdim: width of the keys; if another than ``embed_dim``, they have a map of their own into the shared space.
        vdim: width of the values.
        batch_first: whether the batch is the first dimension or the second.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        sampling: may be set at any time.
        num_samples: how many times each sequence stands in the batch; divergences are averaged over them. 1 unless set.
        frequency: ``(H, R, D)``, a parameter or a buffer.
        log_lengthscale: ``(H, D)``.
        log_variance: ``(H,)``.
        log_noise: logarithm of :math:`\sigma^2`, ``(H,)``.

    Shape:
        As ``nn.MultiheadAttention``. Masks on pairs of tokens: none, or the causal one, by any name. A floating
        ``key_padding_mask`` b counts a key :math:`e^b` times (noise :math:`\sigma^2 e^{-b}`). Returned weights are the
        matrix that multiplies the values; its rows do not sum to 1, and entries may be negative.

    Source:
        The random-feature processes of the RFF-GPA literature; Rahimi and Recht (2007). One noise a head, normal
        frequencies (those of an RBF kernel), the divergence and the causal form are derived in the guide
        "Siblings of SGPA".

    Example:
        >>> layer = RFFAttention(embed_dim=8, num_heads=2, num_frequencies=16, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> out, _ = layer(x, x, x, need_weights=False, is_causal=True)
        >>> out.shape, bool(layer.kl_divergence() < 3.0)  # less than 1 nat a sequence
        (torch.Size([3, 5, 8]), True)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_frequencies: int = 32,
        sampling: str = "marginal",
        *,
        learn_frequencies: bool = False,
        noise_scale: str | None = None,
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
        check_choice("noise_scale", noise_scale, ("length", None))
        super().__init__(
            embed_dim,
            num_heads,
            tied=True,
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
        self.sampling, self.noise_scale = sampling, noise_scale
        self.num_frequencies = check_count("num_frequencies", num_frequencies)
        self.num_samples = 1

        def empty(*shape: int) -> Tensor:
            return torch.empty(num_heads, *shape, device=device, dtype=dtype)

        frequency = empty(num_frequencies, self.head_dim)
        if learn_frequencies:
            self.frequency: Tensor = nn.Parameter(frequency)
        else:
            self.register_buffer("frequency", frequency)
        self.log_lengthscale = nn.Parameter(empty(self.head_dim))
        self.log_variance, self.log_noise = nn.Parameter(empty()), nn.Parameter(empty())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""Draw all parameters anew, so that a sequence pays less than 1 nat.

        Tokens are taken to be normalised. Length-scales of :math:`\sqrt D` put typical tokens at a distance of 1 to 2,
        a prior variance of ``1 / embed_dim`` the noise at a tenth or so of the tokens' scale. With
        ``noise_scale="length"`` the divergence then stays under a nat at any length. Without, it grows with the number
        of readings, and small values of much noise keep it under a nat for 100 tokens or so.
        """
        by_length = self.noise_scale == "length"
        self.reset_projections(1.0 if by_length else 0.125)
        with torch.no_grad():
            nn.init.normal_(self.frequency)
        nn.init.constant_(self.log_lengthscale, 0.5 * math.log(self.head_dim))
        nn.init.constant_(self.log_variance, -math.log(self.embed_dim))
        nn.init.constant_(self.log_noise, 0.0 if by_length else math.log(4.0))

    def heads(self, tokens: Tokens, variance: bool) -> Heads:
        """Posterior of the heads; see the base class."""
        is_causal = only_causal(tokens, "a query with keys of its own has a regression of its own, in cubic time")
        if is_causal and self.noise_scale == "length":
            raise ValueError(
                "noise_scale: expected None under a causal mask: with 'length' the noise of every reading would be "
                "another for each prefix, which running sums cannot follow."
            )
        query = self.project_query(tokens.query)
        key = query if tokens.is_self and self.key_weight is None else self.project_key(tokens.key)
        value = self.project_value(tokens.value)
        dtype = algebra_dtype(query)
        with torch.autocast(query.device.type, enabled=False):
            keep, counts = key_weights(tokens, dtype)
            asked = self._waves(query.to(dtype))
            read = asked if key is query else self._waves(key.to(dtype))
            noise = self.log_noise.to(dtype).exp()
            if self.noise_scale == "length":
                length = read.shape[-2] if keep is None else keep.to(dtype).sum(-1).clamp_min(1.0)
                noise = noise * length

            def regress(values: Tensor) -> RegressionPosterior:
                # A key that counts twice is two readings of the same value.
                root = None if counts is None else counts.sqrt()
                scaled = (read, values) if root is None else (read * root, values * root)
                return feature_regression(asked, *scaled, noise, keep, is_causal)

            post = regress(value.to(dtype))
            weights = None
            if tokens.need_weights:
                eye = torch.eye(read.shape[-2], dtype=dtype, device=read.device)
                weights = regress(eye.expand(*read.shape[:-1], -1)).mean.to(query.dtype)
        root = None if post.root is None else post.root.unsqueeze(-3)
        return Heads(post.mean.to(query.dtype), post.variance, asked, root, weights, post.kl.sum((-2, -1)))

    def kl_divergence(self, num_data: int | None = None, convention: str | None = None) -> Tensor:
        r"""What the posteriors of the last call cost, in nats.

        Every sequence has functions of its own: with B sequences in that call and N of them in the training set both
        conventions of the layers of this package are :math:`\tfrac{N}{B} \sum_b \mathrm{KL}_b`. Divided by N, it is
        what is added to the mean cross-entropy. Under a causal mask :math:`\mathrm{KL}_b` is the mean over the
        prefixes.

        Args:
            num_data: N; ``None`` takes the batch for all the data, N = B.
            convention: ``"global"``, ``"per_sequence"`` or ``None``; there is no difference here.

        Returns:
            A scalar.

        Raises:
            RuntimeError: the layer was not called yet.
            ValueError: the convention is unknown.
        """
        check_choice("convention", convention, ("global", "per_sequence", None))
        num_data = None if num_data is None else check_count("num_data", num_data)
        if self._cost is None:
            raise RuntimeError("kl_divergence: expected a call of the layer before, it is that of what it saw.")
        return divergence_of_data(self._cost.new_zeros(()), self._cost, self.num_samples, num_data, False)

    def _waves(self, tokens: Tensor) -> Tensor:
        """Features of projected tokens, ``(B, H, T, 2 R)``."""
        parameters = (self.frequency, self.log_lengthscale.exp(), self.log_variance.exp())
        return wave_features(tokens, *(parameter.to(tokens.dtype) for parameter in parameters))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{super().extra_repr()}, num_frequencies={self.num_frequencies}, noise_scale={self.noise_scale!r}"

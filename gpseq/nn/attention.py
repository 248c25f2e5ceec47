"""Attention whose output is a sample of a sparse Gaussian process posterior."""

from __future__ import annotations

import math
from typing import Any

import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from torch import Tensor

from gpseq.checks import check_count, check_jitter
from gpseq.nn.divergence import divergence_of_data
from gpseq.nn.gaussian import GaussianAttention
from gpseq.nn.heads import heads_distribution
from gpseq.nn.hot import hot_draw, is_hot
from gpseq.nn.inducing import COVARIANCES, InducingKeys
from gpseq.nn.projection import Tokens, may_look
from gpseq.nn.softmax import softmax_attention
from gpseq.sgpa.arguments import check_choice
from gpseq.sgpa.basis import exponential_factor, inducing_basis, inducing_kl
from gpseq.sgpa.decoupled import decoupled_posterior
from gpseq.sgpa.inducing import inducing_features
from gpseq.sgpa.masks import removes
from gpseq.sgpa.posterior import AttentionPosterior
from gpseq.sgpa.scales import scale_root
from gpseq.sgpa.weights import attention_weights

MODES = ("sgpa", "residual", "softmax_kernel")
KERNELS = ("rbf", "exponential")
FORMS = ("orthogonal", "cheng_boots")


class SGPAttention(GaussianAttention):
    r"""Multi-head attention as ``embed_dim`` sparse Gaussian processes, in place of ``nn.MultiheadAttention``.

    Each head's output dimensions are Gaussian processes with one kernel :math:`k` on the head's projected tokens. Their
    means use every token, their covariance ``num_inducing`` learnt keys (:func:`gpseq.sgpa.decoupled_posterior`):

    .. math::
        m = C(q, a)\, v_a + K_{qg}\, v_g, \qquad
        \sigma^2 = k(q, q) + V (S - I) V^\top, \qquad
        C(q, a) = K_{qa} - K_{qg} K_{gg}^{-1} K_{ga} .

    The layer draws in ``train()`` and ``eval()`` alike: several passes differ by what the layer does not know
    (:func:`gpseq.prediction.predict` averages them), and ``sampling = "mean"`` turns that off. Training adds
    :meth:`kl_divergence` to the loss, divided by the number of training sequences.

    Queries and keys share one projection, because a kernel is symmetric; a layer with another ``kdim`` has a second map
    into the shared space.

    Args:
        embed_dim: width of the tokens, a multiple of ``num_heads``.
        num_heads: H.
        num_inducing: M, inducing keys a head.
        kernel: ``"rbf"``, whose variance returns to the prior's far from the inducing keys, or ``"exponential"``, the
            unnormalised softmax weight, whose variance grows with the norm of the token.
        mode: ``"sgpa"`` as published; ``"residual"``, ordinary softmax attention plus a GP with inducing keys only,
            whose mean starts at zero (it keeps trained weights exactly, and is not the published method); or
            ``"softmax_kernel"``, the kernel divided by its mean over the keys, so that weights are those of softmax
            attention: with ``kernel="exponential"`` the mean starts as softmax attention with tied projections.
        covariance: of q(u): one ``"shared"`` by the dimensions of a head, ``"per_dim"`` as published, ``"diagonal"``,
            or ``"low_rank"`` (diagonal plus ``rank`` columns).
        sampling: ``"marginal"`` noise for each token and dimension by itself, ``"joint"`` over the tokens at a cost of
            :math:`T^3`, ``"pathwise"``, joint by random features at linear cost, or ``"mean"``. Draws of the first kind
            are not functions: pooled over tokens they have too little variance.
        form: of the mean. ``"orthogonal"`` (default) or ``"cheng_boots"`` (default of ``"softmax_kernel"``), where the
            parameter is what is added to plain kernel attention.
        value_scale: ``"length"`` (default of ``"sgpa"``) divides values by the number of keys that a query sees;
            ``None`` takes them as they are, as published, and lets outputs and divergence grow with the length.
        rank: of the low-rank covariance.
        inducing_space: ``"input"``: inducing keys are tokens of the layer's input and go through its projection;
            ``"projected"``: they are free among the projected tokens.
        allow_indefinite: accept floating masks that are more than zero and ``-inf``. A bias on the log kernel need not
            leave it positive semi-definite, and without that there is no posterior: means are computed as asked,
            variances and divergences lose their meaning.
        jitter: relative jitter of :math:`K_{gg}`; ``None`` fits the dtype.
        dropout: share of keys whose value is dropped in training.
        bias: of values and output (and of queries and keys in mode ``"residual"``).
        add_bias_kv: not supported.
        add_zero_attn: not supported.
        kdim: width of the keys.
        vdim: width of the values.
        batch_first: whether the batch is the first dimension or the second.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        sampling: may be set at any time.
        num_samples: how many times each sequence stands in the batch; divergences are averaged over them. 1 unless
            set; may be set at any time.
        inducing: the parameters of the Gaussian processes.

    Shape:
        As ``nn.MultiheadAttention``, see :meth:`forward`. Tokens may be fewer than inducing keys.

    Source:
        Chen and Li (2023), Calibrating Transformers via Sparse Gaussian Processes; modes ``"residual"`` and
        ``"softmax_kernel"``, masks and forms are derived in the guide "Attention as a sparse GP".

    Example:
        >>> layer = SGPAttention(embed_dim=8, num_heads=2, num_inducing=4, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> out, _ = layer(x, x, x, need_weights=False)
        >>> out.shape, bool(layer.kl_divergence() < 3.0)  # less than 1 nat a sequence
        (torch.Size([3, 5, 8]), True)
    """

    SAMPLING = ("marginal", "joint", "pathwise", "mean")
    _transient = frozenset({"generator", "_kl"})
    _kl: tuple[Tensor, Tensor] | None = None  # of the last call: what all sequences share, and what each pays

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_inducing: int = 16,
        kernel: str = "rbf",
        mode: str = "sgpa",
        covariance: str = "shared",
        sampling: str = "marginal",
        *,
        form: str | None = None,
        value_scale: str | None = "default",
        rank: int = 2,
        inducing_space: str = "input",
        allow_indefinite: bool = False,
        jitter: float | None = None,
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
        check_choice("kernel", kernel, KERNELS)
        check_choice("mode", mode, MODES)
        check_choice("covariance", covariance, COVARIANCES)
        check_choice("inducing_space", inducing_space, ("input", "projected"))
        check_choice("form", form, (*FORMS, None))
        check_choice("value_scale", value_scale, ("default", "length", None))
        if mode == "residual" and form is not None:
            raise ValueError(f"form: expected None in mode 'residual', which has no keys of its own, got {form!r}.")
        if mode != "sgpa" and value_scale == "length":
            raise ValueError(f"value_scale: expected None in mode {mode!r}, which normalises itself, got 'length'.")
        super().__init__(
            embed_dim,
            num_heads,
            tied=mode != "residual",
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
        self.kernel, self.mode, self.covariance, self.sampling = kernel, mode, covariance, sampling
        self.form = form or ("cheng_boots" if mode == "softmax_kernel" else "orthogonal")
        self.value_scale = ("length" if mode == "sgpa" else None) if value_scale == "default" else value_scale
        self.inducing_space, self.allow_indefinite = inducing_space, bool(allow_indefinite)
        self.jitter = check_jitter(jitter)
        self.num_samples = 1
        self.inducing = InducingKeys(
            num_heads,
            check_count("num_inducing", num_inducing),
            embed_dim if inducing_space == "input" else self.head_dim,
            self.head_dim,
            covariance,
            check_count("rank", rank),
            device,
            dtype,
        )
        # The common kind of layer, whose derivatives are written out.
        self._may_be_hot = (
            (mode, kernel, self.form, inducing_space) == ("sgpa", "rbf", "orthogonal", "input")
            and covariance in ("shared", "per_dim")
            and self.key_weight is None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""Draw all parameters anew: q(u) is the prior, and a sequence pays less than 1 nat on average.

        Tokens are taken to be normalised. Then, with length-scales of :math:`\sqrt D`, typical ones are at a distance
        of 1 to 2 under the RBF kernel; under the exponential one their norm is :math:`1 / \sqrt 2`, because the
        divergence grows with its exponential. Mode ``"softmax_kernel"`` has the scale of softmax attention,
        :math:`D^{1/4}`, and smaller projections for that. A prior variance of ``1 / embed_dim`` at a typical token
        keeps the amortised divergence near half a nat for one token, and far below for many, and the noise at a tenth
        or so of the tokens' scale; in mode ``"residual"`` it is a hundredth.
        """
        width, exponential = self.head_dim, self.kernel == "exponential"
        lengthscale, value_gain, query_gain = width**0.5, 1.0, 1.0
        variance = 1e-4 if self.mode == "residual" else 1.0 / self.embed_dim
        if exponential:
            lengthscale *= 2**0.5
            variance *= 0.5 * math.exp(-0.5)  # the kernel at a typical token; and its tail is heavy
        if self.mode == "softmax_kernel":
            # Here the variance divides the divergence, so that the values have to start small.
            variance, value_gain = 1.0 / self.embed_dim, 0.5 / self.embed_dim
            if exponential:
                query_gain, lengthscale = width**0.25 / lengthscale, width**0.25
        self.reset_projections(value_gain, query_gain)
        self.inducing.reset(lengthscale, variance)

    def attend(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """From tokens to a draw of the heads; see the base class."""
        mask = tokens.attn_mask
        if self.sampling == "pathwise" and self.allow_indefinite and mask is not None and mask.is_floating_point():
            raise ValueError(
                "sampling: expected 'marginal', 'joint' or 'mean' with a floating attn_mask, got 'pathwise'."
            )
        if self._may_be_hot and self.sampling in ("marginal", "mean") and is_hot(self, tokens):
            noisy = self.sampling == "marginal"
            hot = hot_draw(self, self.inducing, tokens, self.value_scale, self.jitter, noisy)
            self._kl = hot.kl_global, hot.kl_amortised
            return hot.heads, None
        output = {"marginal": "diagonal", "joint": "full"}.get(self.sampling, "mean")
        post, query, weights = self._posterior(tokens, output)
        heads = self.inducing.draw(post, query, self.sampling, self.generator, self.jitter, *self._key_projection())
        self._kl = self._all_heads(post.kl_global), post.kl_amortised.sum((-2, -1))
        return heads, weights

    def posterior(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        full: bool = False,
    ) -> MultitaskMultivariateNormal:
        r"""Posterior of the heads, before the output projection; the last divergence stays what it was.

        Args:
            query: as in :meth:`forward`.
            key: as in :meth:`forward`.
            value: as in :meth:`forward`.
            key_padding_mask: as in :meth:`forward`.
            attn_mask: as in :meth:`forward`.
            is_causal: as in :meth:`forward`.
            full: whether tokens covary as in the posterior, :math:`K_{qq} + V (S - I) V^\top`, a dense matrix a head.
                By default they do through the inducing keys only: :math:`V S V^\top` plus a diagonal that makes every
                marginal variance exact, a low-rank matrix plus a diagonal one.

        Returns:
            Event ``(Tq, D)``, batch ``(B, H)``, or ``(H,)`` for inputs without a batch. Dimensions are independent.

        Raises:
            TypeError: as :meth:`forward`.
            ValueError: as :meth:`forward`.

        Example:
            >>> layer = SGPAttention(8, 2, num_inducing=4)
            >>> x = torch.randn(5, 8)
            >>> layer.posterior(x, x, x).rsample().shape
            torch.Size([2, 5, 4])
        """
        tokens, batched = self._tokens(query, key, value, key_padding_mask, False, attn_mask, is_causal)
        post, heads, _ = self._posterior(tokens, "full" if full else "diagonal")
        root = None if full else self._explained_root(heads, post.factor)
        return heads_distribution(post, root, batched)

    def moments(self, tokens: Tokens, output: str = "diagonal") -> AttentionPosterior:
        """Posterior of the heads at the tokens of a call.

        Args:
            tokens: of the call.
            output: ``"diagonal"``, ``"full"`` or ``"mean"``.
        """
        return self._posterior(tokens, output)[0]

    def marginals(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Mean and marginal variances of the heads; see the base class."""
        post = self.moments(tokens)
        assert post.variance is not None
        return post.mean, post.variance

    def kernel_options(self) -> dict[str, Any]:
        """What :meth:`gpseq.nn.inducing.InducingKeys.posterior` has to know of the layer."""
        weight, bias = self._key_projection()
        return {"kernel": self.kernel, "jitter": self.jitter, "weight": weight, "bias": bias}

    def kl_divergence(self, num_data: int | None = None, convention: str | None = None) -> Tensor:
        r"""What the layer's posterior costs: the divergence of what the last call saw, in nats.

        With B sequences in that call, and N of them in the training set,

        - ``"global"``: :math:`\mathrm{KL}_g + \tfrac{N}{B} \sum_b \mathrm{KL}_{a,b}`. One function is shared by all
          sequences through the inducing variables, each sequence adds a residual of its own.
        - ``"per_sequence"``: :math:`N (\mathrm{KL}_g + \tfrac1B \sum_b \mathrm{KL}_{a,b})`, a function a sequence, as
          published.

        Divided by N, either is what is added to the mean cross-entropy, before ``backward()``: both share one graph.
        Reentrant activation checkpointing runs the first forward without one, and the sequences' part has no gradient
        then; the non-reentrant kind keeps it.

        Args:
            num_data: N; ``None`` takes the batch for all the data, N = B.
            convention: ``None`` is ``"global"``, but for the Cheng-Boots form, whose q(u) depends on the sequence:
                there only ``"per_sequence"`` is defined.

        Returns:
            A scalar.

        Raises:
            RuntimeError: the layer was not called yet. In mode ``"residual"``, where no sequence has a divergence of
                its own, it need not have been, unless the size of its batch is asked for.
            ValueError: the convention is unknown, or not defined for the layer's form.
        """
        check_choice("convention", convention, ("global", "per_sequence", None))
        mixed = self.form == "cheng_boots"
        if mixed and convention == "global":
            raise ValueError(
                "convention: expected 'per_sequence' in the Cheng-Boots form, where q(u) depends on the sequence, "
                "got 'global'."
            )
        per_sequence = mixed or convention == "per_sequence"
        num_data = None if num_data is None else check_count("num_data", num_data)
        if self._kl is None:
            if self.mode != "residual" or (per_sequence and num_data is None):
                raise RuntimeError("kl_divergence: expected a call of the layer before, it is that of what it saw.")
            return divergence_of_data(
                self._kl_global(),
                self.inducing.value.new_zeros(self.num_samples),
                self.num_samples,
                num_data,
                per_sequence,
            )
        shared, amortised = self._kl
        if torch.is_grad_enabled() and not shared.requires_grad:
            shared = self._kl_global()  # the call kept no graph; this part needs none of what it saw
        return divergence_of_data(shared, amortised, self.num_samples, num_data, per_sequence)

    def _kl_global(self) -> Tensor:
        """What q(u) of the inducing keys pays, summed over heads and dimensions."""
        key = self.inducing.key(*self._key_projection())
        basis = inducing_basis(key, *self._kernel_parameters(), key, self.jitter)
        value = self.inducing.value.to(basis.key.dtype)
        if self.kernel == "exponential":
            value = value * exponential_factor(basis.key)
        return self._all_heads(inducing_kl(basis, value, self.inducing.scale))

    def _all_heads(self, kl: Tensor) -> Tensor:
        """Sum over heads and dimensions of ``(H, D)``, or ``(H, 1)`` where the dimensions share it."""
        return kl.expand(self.num_heads, self.head_dim).sum()

    def _posterior(self, tokens: Tokens, output: str) -> tuple[AttentionPosterior, Tensor, Tensor | None]:
        """Posterior of the heads, the queries that it is at, and the weights if the call asks for them."""
        if self.mode == "residual":
            return self._residual_posterior(tokens, output)
        self._check_bias(tokens)
        query = self.project_query(tokens.query)
        key = query if tokens.is_self and self.key_weight is None else self.project_key(tokens.key)
        value = self.project_value(tokens.value)
        options: dict[str, Any] = {
            "kernel": self.kernel,
            "key_padding_mask": tokens.key_padding_mask,
            "attn_mask": tokens.attn_mask,
            "is_causal": tokens.is_causal,
            "form": self.form,
            "jitter": self.jitter,
            "normalise": self.mode == "softmax_kernel",
            "value_scale": self.value_scale,
        }
        inducing_key = self.inducing.key(*self._key_projection())
        parameters = self._kernel_parameters()
        post = decoupled_posterior(
            query,
            key,
            value,
            inducing_key,
            self.inducing.value,
            self.inducing.scale,
            *parameters,
            output=output,
            **options,
        )
        if self.kernel == "exponential" and may_look(post.mean) and not post.mean.detach().isfinite().all():
            raise ValueError(
                f"query: expected tokens whose exponential kernel fits {post.mean.dtype}, got projected ones of norm "
                f"{(query.detach() / parameters[0].unsqueeze(-2)).norm(dim=-1).max().item():.0f} length-scales."
            )
        weights = attention_weights(query, key, inducing_key, *parameters, **options) if tokens.need_weights else None
        return post, query, weights

    def _residual_posterior(self, tokens: Tokens, output: str) -> tuple[AttentionPosterior, Tensor, Tensor | None]:
        """Softmax attention as the prior mean of a GP with inducing keys only."""
        query, key, value = (
            self.project_query(tokens.query),
            self.project_key(tokens.key),
            self.project_value(tokens.value),
        )
        mean, weights = softmax_attention(query, key, value, tokens)
        post = self.inducing.posterior(query, **self.kernel_options(), output=output)
        return post._replace(mean=mean + post.mean), query, weights

    def _explained_root(self, query: Tensor, factor: Tensor | None) -> Tensor:
        r"""A root of what the inducing variables explain, :math:`V S V^\top`, ``(B, H, D, T, M)`` or with D = 1."""
        features = inducing_features(
            query, self.inducing.key(*self._key_projection()), *self._kernel_parameters(), jitter=self.jitter
        )
        features = features if factor is None else features * factor
        return features.unsqueeze(-3) @ scale_root(self.inducing.scale).to(features.dtype)

    def _key_projection(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias that take inducing locations to the projected tokens."""
        return (self.query_weight, self.query_bias) if self.inducing_space == "input" else (None, None)

    def _kernel_parameters(self) -> tuple[Tensor, Tensor]:
        return self.inducing.log_lengthscale.exp(), self.inducing.log_variance.exp()

    def _check_bias(self, tokens: Tokens) -> None:
        """That a floating mask only removes keys: more need not leave a positive semi-definite kernel."""
        mask = tokens.attn_mask
        if self.allow_indefinite or mask is None or mask.dtype == torch.bool or not may_look(mask):
            return
        if not ((mask == 0) | removes(mask)).all():
            raise ValueError(
                "attn_mask: expected 0 and -inf only in a floating mask: other numbers need not leave the kernel "
                "positive semi-definite. allow_indefinite=True accepts them and drops the claim of a posterior."
            )

    def extra_repr(self) -> str:
        """Options, as they stand in the printed model."""
        return (
            f"{super().extra_repr()}, kernel={self.kernel!r}, mode={self.mode!r}, covariance={self.covariance!r}, "
            f"sampling={self.sampling!r}"
        )

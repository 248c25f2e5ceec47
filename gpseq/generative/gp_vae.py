"""A variational autoencoder of sequences whose latent paths are Gaussian processes over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor, nn
from torch.nn import functional

from gpseq.checks import check_count, check_number
from gpseq.features.base import InducingFeatures
from gpseq.generative.draws import draw_normals
from gpseq.generative.geco import Geco
from gpseq.generative.markov import MarkovPrior
from gpseq.generative.observations import LIKELIHOODS, BernoulliObservations, GaussianObservations
from gpseq.generative.sparse import SparsePrior
from gpseq.predictive import Predictive
from gpseq.variational.belief import Belief

#: Draws of latent paths behind a prediction.
NUM_SAMPLES = 32
#: Least variance of a pseudo-observation.
MIN_VARIANCE = 1e-3


@dataclass(frozen=True, eq=False)
class GPPriorVAEOutput:
    r"""What :class:`GPPriorVAE` says of some series.

    Attributes:
        loss: what is to be small, a number with a graph.
        elbo: the bound on the log density of the data, summed over series, in nats, with beta one; an estimate of it
            where a window stands for more (``num_data``).
        recon: expected log density of the data given the latents, ``(*b,)``, in nats.
        kl: of the latent paths from their prior, ``(*b, L)``, in nats.
        error: mean squared error of the reconstruction over entries that were observed.
        posterior: the latent paths; it can ``predict`` and ``rsample`` at any times.
    """

    loss: Tensor
    elbo: Tensor
    recon: Tensor
    kl: Tensor
    error: Tensor
    posterior: Any


class GPPriorVAE(nn.Module):
    r"""A sequence VAE: L independent Gaussian processes over time, a decoder behind them, an encoder of each time.

    .. math::
        f^l \sim GP(0, k_l), \qquad y_t \mid f_t \sim p(y \mid \text{decoder}(f_t)).

    The encoder does not give a posterior but evidence, :math:`N(\tilde y_t^l \mid f_t^l, \tilde v_t^l)` for each time
    by itself, and the processes combine the evidence of all times; see :class:`~gpseq.generative.SparsePrior` and
    :class:`~gpseq.generative.MarkovPrior`. Training maximises

    .. math::
        \rho \sum_t \mathrm E_{q(f_t)} \log p(y_t \mid f_t) - \beta \sum_l \operatorname{KL}(q^l \,\|\, p^l),

    with one draw of each latent. What published objectives add to it, a cross-entropy of the evidence and a bound of
    the process on it, cancels.

    A series of one window out of many, ``num_data``, gives unbiased information but a biased posterior, as that is not
    linear in the information: predictions come from all data, which :meth:`update` gathers window by window.

    Args:
        encoder: ``(*b, n, *obs)`` to ``(*b, n, 2 L)``, mean and raw variance of the evidence.
        decoder: ``(*b, n, L)`` to ``(*b, n, *obs)``, means, or logits.
        features: inducing features of all channels, for a sparse prior.
        covar_module: their kernel, of batch shape ``(L,)``.
        num_latents: L.
        likelihood: ``"gaussian"``, ``"bernoulli"``, or a module with ``log_prob``, ``mean``, ``draw`` and ``noise``.
        beta: weight of the divergence.
        prior: instead of features and kernel, ``"matern12"``, ``"matern32"`` or ``"matern52"`` for exact paths in
            linear time, or a prior with the same methods.
        noise: variance of Gaussian noise at the start.
        geco: weighs reconstruction against divergence instead of ``beta``; see :class:`~gpseq.generative.Geco`.

    Attributes:
        state: what earlier tasks have left, with a sparse prior; empty at first.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an unknown likelihood or prior, or not exactly one of prior and features.

    Shape:
        x ``(*b, n)``, or ``(*b, n, d)`` for inputs of d columns; y ``(*b, n, *obs)``.

    Source:
        Jazbec et al. (2021), Scalable Gaussian process variational autoencoders, for amortised sparse posteriors; the
        form of the bound, and of its online version, are derived in the guide.

    Example:
        >>> import gpytorch, gpseq
        >>> kernel = gpytorch.kernels.RBFKernel(batch_shape=torch.Size([2]))
        >>> features = gpseq.features.HippoFeatures(8, horizon=5.0)
        >>> vae = GPPriorVAE(nn.Linear(6, 4), nn.Linear(2, 6), features, kernel, num_latents=2)
        >>> x, y = torch.linspace(0, 5, 30), torch.randn(30, 6)
        >>> out = vae(x, y)
        >>> out.loss.backward()
        >>> vae.update(x, y)
        >>> vae.predict(torch.tensor([2.5, 6.0])).mean.shape
        torch.Size([2, 6])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        features: InducingFeatures | None = None,
        covar_module: Kernel | None = None,
        num_latents: int = 1,
        likelihood: str | nn.Module = "gaussian",
        beta: float = 1.0,
        *,
        prior: str | nn.Module | None = None,
        noise: float = 0.01,
        geco: Geco | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(value, nn.Module):
                raise TypeError(f"{name}: expected a module, got {type(value).__name__}.")
        self.num_latents = check_count("num_latents", num_latents)
        self.beta = check_number("beta", beta, above=-1e-300, expected="a number that is not negative")
        if (prior is None) == (features is None):
            raise ValueError("features: expected either features with a kernel, or a prior, got both or neither.")
        if prior is None:
            if not isinstance(features, InducingFeatures) or not isinstance(covar_module, Kernel):
                raise TypeError(
                    f"features: expected inducing features and a kernel, got {type(features).__name__} and "
                    f"{type(covar_module).__name__}."
                )
            prior = SparsePrior(features, covar_module, num_latents)
        elif isinstance(prior, str):
            prior = MarkovPrior(prior, num_latents)
        self.encoder, self.decoder = encoder, decoder
        self.prior: Any = prior
        if isinstance(likelihood, str):
            if likelihood not in LIKELIHOODS:
                raise ValueError(f"likelihood: expected one of {', '.join(LIKELIHOODS)}, got {likelihood!r}.")
            likelihood = GaussianObservations(noise) if likelihood == "gaussian" else BernoulliObservations()
        self.likelihood: Any = likelihood
        self.geco: Any = geco
        self.belief = Belief(prior.initial_state(frozen=True)) if isinstance(prior, SparsePrior) else None

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        missing: Tensor | None = None,
        num_data: int | None = None,
        generator: torch.Generator | None = None,
    ) -> GPPriorVAEOutput:
        r"""The loss of some series, and what it consists of.

        Where :meth:`update` has been called, these data are a new task: the old posterior stands in the place of the
        prior, as in streaming sparse processes.

        Args:
            x: times or inputs, in any order.
            y: data; what is missing may be NaN.
            missing: bool, ``True`` for what was not observed: of x's times, ``(*b, n)``, or of the shape of y.
            num_data: N, observed times of each series, of which these are some; rho is N over their number.
            generator: of the latents' draws; ``None`` is torch's default generator.

        Raises:
            TypeError: a tensor is of another kind.
            ValueError: shapes that do not fit, values that are not finite, or a mask that leaves nothing.
        """
        posterior, seen, _, scale = self._posterior(x, y, missing, num_data)
        noise = draw_normals(posterior.mean.shape, posterior.mean, generator)
        latents = posterior.mean + posterior.variance.clamp_min(0).sqrt() * noise
        output = self._decode(latents.mT, y)
        filled = torch.where(seen, y, output.detach() if output.shape == y.shape else 0.0)
        values = torch.where(seen, self.likelihood.log_prob(output, filled), 0.0)
        lead = posterior.mean.dim() - 2
        recon = scale * values.flatten(lead).sum(-1).double()
        kl = posterior.kl
        error = torch.where(seen, (self.likelihood.mean(output) - filled).square(), 0.0).sum() / seen.sum()
        elbo = recon.sum() - kl.sum()
        if self.geco is None:
            loss = self.beta * kl.sum() - recon.sum()
        else:
            loss = self.geco(kl.sum(), error, self.training)
        loss = loss.to(torch.promote_types(output.dtype, torch.float32))
        return GPPriorVAEOutput(loss, elbo, recon, kl, error, posterior)

    def predict(
        self,
        x_new: Tensor,
        x: Tensor | None = None,
        y: Tensor | None = None,
        missing: Tensor | None = None,
        num_samples: int = NUM_SAMPLES,
        generator: torch.Generator | None = None,
    ) -> Predictive:
        r"""Data at any times, given series, or given what :meth:`update` has gathered.

        Args:
            x_new: m times or inputs.
            x: times of given series; ``None``: none are given.
            y: their data.
            missing: as for :meth:`forward`.
            num_samples: joint draws of the latent paths.
            generator: of them.

        Returns:
            Draws. An event is what is observed at one time, flattened, and the batch is ``(*b, m)``. With Gaussian
            observations ``noise`` is their variance.

        Raises:
            ValueError: as for :meth:`forward`; x without y; or nothing is known, as there is an exact prior and no
                series.
        """
        check_count("num_samples", num_samples)
        if (x is None) != (y is None):
            raise ValueError("x: expected both x and y, or neither, got one of them.")
        with torch.no_grad():
            if x is not None and y is not None:
                posterior, _, frames, _ = self._posterior(x, y, missing, None)
                axes = frames.dim()
            elif isinstance(self.prior, SparsePrior) and self.belief is not None:
                posterior, axes = self.prior.at(self.belief.state), 1
            else:
                raise ValueError("x: expected series to predict from, as this prior keeps none, got None.")
            inputs = self._arranged(x_new, self._has_columns(x_new, axes))
            output = self._draws_of_output(posterior, inputs, num_samples, generator)
            draws = self.likelihood.mean(output).flatten(axes + 1)
        return Predictive.from_samples(draws, self._noise_like(draws))

    def impute(
        self,
        x: Tensor,
        y: Tensor,
        missing: Tensor,
        num_samples: int = NUM_SAMPLES,
        generator: torch.Generator | None = None,
    ) -> Predictive:
        """What is missing from series, given the rest of them.

        Args:
            x: times or inputs.
            y: data; what is missing may be NaN.
            missing: as for :meth:`forward`.
            num_samples: joint draws of the latent paths.
            generator: of them.

        Returns:
            As of :meth:`predict`, at the times of x; what was observed is as it was, without noise.
        """
        p = self.predict(x, x, y, missing, num_samples, generator)
        assert p.samples is not None
        seen = self._seen(x, y, missing)[0].expand(y.shape).reshape(p.samples.shape[1:])
        samples = torch.where(seen, y.reshape(seen.shape).to(p.samples), p.samples)
        noise = None if p.noise is None else torch.where(seen, 0.0, p.noise)
        return Predictive.from_samples(samples, noise)

    def sample(self, x: Tensor, n: int = 1, generator: torch.Generator | None = None, noise: bool = False) -> Tensor:
        """Series from the prior.

        Args:
            x: times or inputs.
            n: how many.
            generator: of the draws.
            noise: draws of the data, and not their means.

        Returns:
            ``(n, *b, m, *obs)``.
        """
        check_count("n", n)
        with torch.no_grad():
            paths = self.prior.rsample(x.to(self._dtype), (n,), generator)
            output = self.decoder(paths.mT.to(self._dtype))
            return self.likelihood.draw(output, generator) if noise else self.likelihood.mean(output)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, missing: Tensor | None = None, batch_size: int | None = None) -> None:
        r"""Fold a task into what is known, exactly: information is summed over windows, and only then a posterior.

        Features that follow their data move first, and carry what they know along.

        Args:
            x: times ``(n,)`` or inputs ``(n, d)`` of one series.
            y: ``(n, *obs)``.
            missing: as for :meth:`forward`.
            batch_size: times at once; ``None`` is all.

        Raises:
            TypeError: the prior is exact, and keeps no state.
            ValueError: as for :meth:`forward`, or several series. Then all is as it was.
        """
        if self.belief is None or not isinstance(self.prior, SparsePrior):
            raise TypeError(f"prior: expected a sparse one to be updated, got {type(self.prior).__name__}.")
        seen, frames = self._seen(x, y, missing)
        if frames.dim() != 1:
            raise ValueError(f"x: expected one series, got shape {tuple(x.shape)}.")
        x = self._arranged(x, x.dim() > 1)
        mean, variance = self._encode(y, seen)
        prior = self.prior.following(x)
        state = prior.absorb(self.belief.state, x, mean, variance, ~frames, batch_size)
        self.prior.features = prior.features
        self.belief.state = state.detach()

    # --- parts --------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """What is known from earlier tasks, as a value; ``None`` with an exact prior."""
        return None if self.belief is None else self.belief.state

    @property
    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.decoder.parameters()), torch.get_default_dtype())

    @property
    def _columns(self) -> int:
        return self.prior.features.num_dims if isinstance(self.prior, SparsePrior) else 1

    def _arranged(self, x: Tensor, has_columns: bool) -> Tensor:
        """Inputs as the prior takes them, so that no one has to guess whether the last axis counts times or columns."""
        if isinstance(self.prior, SparsePrior):
            return x if has_columns else x.unsqueeze(-1)
        return x.squeeze(-1) if has_columns else x

    def _axes(self, x: Tensor, y: Tensor) -> int:
        """How many axes of x count series and times, by the shape of the data beside it."""
        times = self._columns == 1 and x.shape == y.shape[: x.dim()]
        columns = x.dim() > 1 and x.shape[-1] == self._columns and x.shape[:-1] == y.shape[: x.dim() - 1]
        if not times and not columns:
            lead = x.shape if self._columns == 1 else x.shape[:-1]
            raise ValueError(f"y: expected shape {(*lead, '*obs')} beside x of {tuple(x.shape)}, got {tuple(y.shape)}.")
        # One number at each time has no axis of its own only where there is no other way to read it.
        return x.dim() - (columns and (not times or y.dim() == x.dim()))

    def _has_columns(self, x_new: Tensor, axes: int) -> bool:
        """Whether inputs without data have an axis of columns, beside series with so many axes before it."""
        if self._columns == 1 and 0 < x_new.dim() <= axes:
            return False
        if 1 < x_new.dim() <= axes + 1 and x_new.shape[-1] == self._columns:
            return True
        shape = ("*b", "m") if self._columns == 1 else ("*b", "m", self._columns)
        raise ValueError(f"x_new: expected shape {shape} with {axes - 1} axes b, got {tuple(x_new.shape)}.")

    def _posterior(
        self, x: Tensor, y: Tensor, missing: Tensor | None, num_data: int | None
    ) -> tuple[Any, Tensor, Tensor, Tensor | float]:
        seen, frames = self._seen(x, y, missing)
        if num_data is not None:
            check_count("num_data", num_data)
        x = self._arranged(x, x.dim() > frames.dim())
        mean, variance = self._encode(y, seen)
        scale: Tensor | float = 1.0
        if num_data is not None:
            scale = num_data / frames.sum(-1)
        options: dict[str, Any] = {}
        if isinstance(self.prior, SparsePrior):
            assert self.belief is not None
            state = self.belief.state
            if bool(state.count.any()):
                options["before"] = state
            if num_data is not None:
                options["scale"] = (num_data / frames.sum(-1))[..., None, None]
            prior = self.prior.following(x)
        else:
            if num_data is not None:
                raise ValueError("num_data: expected None with an exact prior, which needs the whole series.")
            prior = self.prior
        return prior.posterior(x, mean, variance, ~frames, **options), seen, frames, scale

    def _seen(self, x: Tensor, y: Tensor, missing: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which entries of y were observed, broadcastable to it, and at which times any was."""
        if not isinstance(y, Tensor) or not y.is_floating_point():
            raise TypeError(f"y: expected a floating-point tensor, got {getattr(y, 'dtype', type(y).__name__)}.")
        lead = x.shape[: self._axes(x, y)]
        if not lead or not lead[-1]:
            raise ValueError(f"x: expected at least one time, got shape {tuple(x.shape)}.")
        if not bool(x.isfinite().all()):
            raise ValueError("x: expected finite times, got some that are not.")
        columns = (1,) * (y.dim() - len(lead))
        if missing is None:
            seen = torch.ones(*lead, *columns, dtype=torch.bool, device=y.device)
        else:
            if missing.dtype != torch.bool:
                raise TypeError(f"missing: expected bool, True for what was not observed, got {missing.dtype}.")
            if missing.shape not in (lead, y.shape):
                raise ValueError(
                    f"missing: expected shape {tuple(lead)} or {tuple(y.shape)}, got {tuple(missing.shape)}."
                )
            seen = ~(missing.reshape(*lead, *columns) if missing.shape == lead else missing)
        seen = seen.expand(y.shape)
        frames = seen.reshape(*lead, -1).any(-1)
        if not bool(frames.any(-1).all()):
            raise ValueError("missing: expected some observed data in each series, got one with none.")
        if not bool((y.isfinite() | ~seen).all()):
            raise ValueError("y: expected finite data where nothing is missing, got some that are not.")
        return seen, frames

    def _encode(self, y: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Evidence, ``(*b, L, n)`` each."""
        codes = self.encoder(torch.where(seen, y, 0.0))
        lead = codes.shape[:-1]
        if codes.shape[-1] != 2 * self.num_latents or lead != y.shape[: len(lead)]:
            raise ValueError(
                f"encoder: expected output {(*y.shape[: len(lead)], 2 * self.num_latents)}, got {tuple(codes.shape)}."
            )
        # Under autocast codes come short. Evidence does not stay so: the posterior and its divergence have its dtype.
        mean, raw = codes.to(torch.promote_types(codes.dtype, torch.float32)).chunk(2, -1)
        return mean.mT, functional.softplus(raw).mT + MIN_VARIANCE

    def _decode(self, latents: Tensor, y: Tensor) -> Tensor:
        output = self.decoder(latents.to(self._dtype))
        if output.shape != y.shape:
            raise ValueError(
                f"decoder: expected output of the shape of y, {tuple(y.shape)}, got {tuple(output.shape)}."
            )
        return output

    def _draws_of_output(
        self, posterior: Any, x_new: Tensor, num_samples: int, generator: torch.Generator | None
    ) -> Tensor:
        paths = posterior.rsample(x_new, (num_samples,), generator)
        return self.decoder(paths.mT.to(self._dtype))

    def _noise_like(self, draws: Tensor) -> Tensor | None:
        noise = self.likelihood.noise
        return None if noise is None else noise.detach().to(draws).expand(draws.shape)

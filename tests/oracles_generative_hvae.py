"""Slow and obvious: a hierarchical VAE by torch's own distributions, and its evidence by sums over a grid."""

import math

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from gpseq.generative.hvae import HVAE


def pixels(model: HVAE, t: int, latent: Tensor) -> Independent:
    """What the decoder of stage t says about the pixels."""
    output = model.stages[t].decoder(latent)
    law = Bernoulli(logits=output) if model.likelihood[t] == "bernoulli" else Normal(output, model.noise[t])
    return Independent(law, 3)


def conditionals(model: HVAE, t: int, state: Tensor, encoding: Tensor) -> tuple[Normal, Normal]:
    """Prior and posterior of a latent given the state of its path."""
    stage, size = model.stages[t], model.latent_dim

    def moments(raw: Tensor) -> tuple[Tensor, Tensor]:
        return raw[..., :size], (6 * torch.tanh(raw[..., size:] / 6)).exp()

    mean, scale = moments(stage.prior(state))
    shift, ratio = moments(stage.posterior(torch.cat([state, encoding], -1)))
    return Normal(mean, scale), Normal(mean + scale * shift, scale * ratio)


def terms(model: HVAE, video: Tensor, latents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Log likelihoods and divergences of all stages on a given path, both (B, T)."""
    state, encoding = model.start.expand(len(video), -1), model.encoder(video[:, -1])
    likelihoods, divergences = [], []
    for t, latent in enumerate(latents):
        prior, posterior = conditionals(model, t, state, encoding)
        divergences.append(kl_divergence(posterior, prior).sum(-1))
        likelihoods.append(pixels(model, t, latent).log_prob(video[:, t]))
        state = model.stages[t].advance(state, latent)
    return torch.stack(likelihoods, -1), torch.stack(divergences, -1)


def evidence(model: HVAE, images: Tensor, points: int = 81, reach: float = 6.0) -> Tensor:
    """``log p(x_T)`` of a model with one or two stages and latents of one number, by the trapezoidal rule."""
    unit = torch.linspace(-reach, reach, points, dtype=images.dtype)
    step = math.log(unit[1] - unit[0])
    state = model.start.expand(1, -1)
    prior, _ = conditionals(model, 0, state, torch.zeros_like(state))
    latent = (prior.mean + prior.stddev * unit[:, None]).detach()
    weight = Normal(0.0, 1.0).log_prob(unit) + step  # in units of the prior, whose scale cancels
    if model.num_stages == 2:
        state = model.stages[0].advance(state.expand(points, -1), latent)
        prior, _ = conditionals(model, 1, state, torch.zeros_like(state))
        latent = (prior.mean + prior.stddev * unit).reshape(-1, 1)  # the second one for every first one
        weight = (weight[:, None] + weight).reshape(-1)
    found = [torch.logsumexp(weight + pixels(model, model.num_stages - 1, latent).log_prob(x), 0) for x in images]
    return torch.stack(found)

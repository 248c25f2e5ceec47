"""Brazil's daily deaths as a stream of counts: coverage, distance to a batch fit, and time beside gradient steps."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import gpytorch
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.priors import LogNormalPrior
from torch import Tensor

from gpseq import datasets
from gpseq.features import HippoFeatures
from gpseq.likelihoods import NegativeBinomialLikelihood
from gpseq.mlls import StreamingELBO
from gpseq.models import StreamingGP
from gpseq.variational import InterdomainVariationalStrategy

DAYS = 365
TASKS = 5
SIZES = (15, 30)
ADAM_STEPS = 2000
#: Medians and spreads of the log-normal priors: days, variance of the log rate, dispersion (3.5 % beyond Poisson).
PRIORS = {"lengthscale": (60.0, 0.3), "outputscale": (2.0, 0.3), "dispersion": (800.0, 0.3)}


def run(smoke: bool) -> dict[str, Any]:
    """Seeds of held-out days for each size; the first seed is also timed against Adam."""
    series = datasets.load_covid_deaths()
    y = series.target.double()[:DAYS]
    rows = []
    for size in SIZES:
        for seed in range(1 if smoke else 5):
            adam = (50 if smoke else ADAM_STEPS) if seed == 0 else 0
            rows.append({"size": size, "seed": seed} | _follow(y, size, seed, adam))
    return {"series": series.name, "days": DAYS, "adam_steps": ADAM_STEPS, "rows": rows}


def model_of(size: int, horizon: float) -> StreamingGP:
    """The model of this benchmark, before anything is learnt."""
    priors = {name: LogNormalPrior(math.log(median), spread) for name, (median, spread) in PRIORS.items()}
    base = MaternKernel(nu=2.5, lengthscale_prior=priors["lengthscale"])
    kernel = ScaleKernel(base, outputscale_prior=priors["outputscale"]).double()
    likelihood = NegativeBinomialLikelihood(dispersion_prior=priors["dispersion"]).double()
    mean = gpytorch.means.ConstantMean().double()
    base.lengthscale, kernel.outputscale = PRIORS["lengthscale"][0], PRIORS["outputscale"][0]
    likelihood.dispersion, mean.constant = PRIORS["dispersion"][0], 5.0
    features = HippoFeatures(size, horizon)
    return StreamingGP(features, kernel, likelihood, mean, horizon_growth=1.1, learn="basis_change").eval()


def _follow(y: Tensor, size: int, seed: int, adam_steps: int) -> dict[str, Any]:
    days = torch.arange(DAYS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(DAYS, dtype=torch.bool)
    out[torch.randperm(DAYS, generator=generator)[: DAYS // 5]] = True
    tasks = torch.arange(DAYS).tensor_split(TASKS)
    model = model_of(size, DAYS / TASKS)
    first = tasks[0][~out[tasks[0]]]
    begun = time.perf_counter()
    model.fit_hyperparameters(days[first], y[first])
    fit_seconds, seconds, update_seconds, steps, just_learnt, adam = time.perf_counter() - begun, [], [], [], [], []
    for number, task in enumerate(tasks):
        train, test = task[~out[task]], task[out[task]]
        if number > 0:  # what one update costs that takes the task at once, beside Adam on the same task
            update_seconds.append(_one_update(model, days[train], y[train]))
            if adam_steps:
                adam.append(_adam(model, days[train], y[train], adam_steps))
        begun = time.perf_counter()
        for week in task.split(7):
            week = week[~out[week]]
            model.update(days[week], y[week])
            steps.append(model.convergence.steps)
        seconds.append(time.perf_counter() - begun)
        just_learnt.append(_score(model, days[test], y[test]))
    batch = StreamingGP(model.features, model.covar_module, model.likelihood, model.mean_module).eval()
    batch.update(days[~out], y[~out])
    frozen = StreamingGP(
        HippoFeatures(size, DAYS / TASKS), model.covar_module, model.likelihood, model.mean_module
    ).eval()
    frozen.horizon_growth = model.horizon_growth
    for task in tasks:
        frozen.update(days[task[~out[task]]], y[task[~out[task]]])
    return {
        "just_learnt": just_learnt,
        "at_end": [_score(model, days[t[out[t]]], y[t[out[t]]]) for t in tasks],
        "nlpd": _score(model, days[out], y[out])["nlpd"],
        "nlpd_frozen": _score(frozen, days[out], y[out])["nlpd"],
        "nlpd_batch": _score(batch, days[out], y[out])["nlpd"],
        "fit_seconds": fit_seconds,
        "seconds": seconds,
        "update_seconds": update_seconds,
        "steps": steps,
        "adam_seconds": adam,
        "lengthscale": model.covar_module.base_kernel.lengthscale.item(),
        "outputscale": model.covar_module.outputscale.item(),
        "mean": model.mean_module.constant.item(),
        "dispersion": model.likelihood.dispersion.item(),
        "residual": model.residual_variance().item(),
    }


@torch.no_grad()
def _score(model: StreamingGP, x: Tensor, y: Tensor) -> dict[str, float]:
    f, likelihood = model(x), model.likelihood
    low, high = likelihood.quantile(f, 0.025), likelihood.quantile(f, 0.975)
    inside = (y >= low) & (y <= high)
    return {"inside": inside.sum().item(), "count": len(y), "nlpd": -likelihood.log_marginal(y, f).mean().item()}


def _one_update(model: StreamingGP, x: Tensor, y: Tensor) -> float:
    frozen = copy.deepcopy(model)
    frozen.learn = "never"
    begun = time.perf_counter()
    frozen.update(x, y)
    return time.perf_counter() - begun


class _Trained(gpytorch.models.ApproximateGP):
    """The same model as an ordinary one: q by Adam, on the horizon that the stream has now."""

    def __init__(self, stream: StreamingGP) -> None:
        q = gpytorch.variational.CholeskyVariationalDistribution(stream.features.num_features)
        super().__init__(InterdomainVariationalStrategy(self, stream.features, q))
        self.mean_module, self.covar_module = stream.mean_module, stream.covar_module

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def _adam(stream: StreamingGP, x: Tensor, y: Tensor, steps: int) -> float:
    """Seconds that Adam takes for one task on the same bound with frozen hyperparameters."""
    stream = copy.deepcopy(stream)
    model = _Trained(stream).double().train()
    model.variational_strategy.advance()
    bound = StreamingELBO(stream.likelihood, model)
    optimiser = torch.optim.Adam(model.variational_parameters(), lr=0.01)
    begun = time.perf_counter()
    for _ in range(steps):
        optimiser.zero_grad()
        (-bound(model(x.unsqueeze(-1)), y)).backward()
        optimiser.step()
    return time.perf_counter() - begun

"""Acquisition functions of BoTorch run on a streaming model, and their gradients are right."""

from collections.abc import Callable

import pytest
import torch
from gpytorch.mlls import ExactMarginalLogLikelihood, SumMarginalLogLikelihood
from torch import Tensor

pytest.importorskip("botorch")

from botorch.acquisition import (
    AcquisitionFunction,
    LogExpectedImprovement,
    qKnowledgeGradient,
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
    qMaxValueEntropy,
    qNegIntegratedPosteriorVariance,
    qUpperConfidenceBound,
)
from botorch.acquisition.multi_objective.logei import qLogExpectedHypervolumeImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import ModelListGP
from botorch.models.transforms.input import Normalize
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from botorch.utils.multi_objective.box_decompositions import NondominatedPartitioning

from gpseq.integrations.botorch import FixedStandardize, StreamingSingleTaskGP

F64 = torch.float64
BOUNDS = torch.tensor([[0.0, 0.0], [2.0, 3.0]], dtype=F64)


def objective(X: Tensor) -> Tensor:
    """Smooth, with one maximum at (1.2, 1)."""
    return 5.0 - ((X - torch.tensor([1.2, 1.0], dtype=X.dtype)) ** 2).sum(-1, keepdim=True)


def make_model(num: int = 15, noise: float | None = None) -> tuple[StreamingSingleTaskGP, Tensor]:
    """Both transforms are in use."""
    X = BOUNDS[0] + (BOUNDS[1] - BOUNDS[0]) * torch.rand(num, 2, dtype=F64)
    Y = objective(X) + 0.1 * torch.randn(num, 1, dtype=F64)
    model = StreamingSingleTaskGP(
        X,
        Y,
        None if noise is None else torch.full_like(Y, noise),
        input_transform=Normalize(2, bounds=BOUNDS),
        outcome_transform=FixedStandardize(3.0, 1.5),
    )
    return model, X


def sampler(num: int) -> SobolQMCNormalSampler:
    return SobolQMCNormalSampler(torch.Size([num]), seed=1)


MAKE: dict[str, Callable[[StreamingSingleTaskGP, Tensor], AcquisitionFunction]] = {
    "LogEI": lambda m, X: LogExpectedImprovement(m, best_f=4.0),
    "qLogEI": lambda m, X: qLogExpectedImprovement(m, best_f=4.0, sampler=sampler(32)),
    "qLogNEI": lambda m, X: qLogNoisyExpectedImprovement(m, X, sampler=sampler(32)),
    "qLogNEI, no cache": lambda m, X: qLogNoisyExpectedImprovement(m, X, sampler=sampler(32), cache_root=False),
    "qUCB": lambda m, X: qUpperConfidenceBound(m, beta=0.2, sampler=sampler(32)),
    "qKG": lambda m, X: qKnowledgeGradient(m, num_fantasies=4, sampler=sampler(4), inner_sampler=None),
    "qNIPV": lambda m, X: qNegIntegratedPosteriorVariance(m, mc_points=X[:10], sampler=sampler(1)),
    "qMES": lambda m, X: qMaxValueEntropy(m, candidate_set=X, num_fantasies=2, num_mv_samples=4, num_y_samples=8),
}


@pytest.mark.parametrize("noise", [None, 0.01], ids=["inferred noise", "known noise"])
@pytest.mark.parametrize("name", MAKE)
def test_optimize_acqf_runs(name: str, noise: float | None) -> None:
    model, X = make_model(noise=noise)
    acquisition = MAKE[name](model, X)
    q = 1 if name in ("LogEI", "qMES") else 2
    candidates, value = optimize_acqf(
        acquisition, BOUNDS, q=q, num_restarts=2, raw_samples=8, options={"maxiter": 5, "batch_limit": 2}
    )
    assert candidates.shape == (q, 2) and value.isfinite().all()
    assert (candidates >= BOUNDS[0] - 1e-9).all() and (candidates <= BOUNDS[1] + 1e-9).all()
    # What the optimiser found is better than a typical point.
    if name not in ("qKG", "qNIPV"):
        with torch.no_grad():
            random = acquisition(BOUNDS[0] + (BOUNDS[1] - BOUNDS[0]) * torch.rand(20, q, 2, dtype=F64))
        assert value >= random.median()


def test_the_loop_finds_the_maximum() -> None:
    model, _ = make_model(6)
    for _ in range(8):
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        acquisition = qUpperConfidenceBound(model, beta=1.0, sampler=sampler(32))
        x, _ = optimize_acqf(acquisition, BOUNDS, q=1, num_restarts=2, raw_samples=16, options={"maxiter": 20})
        model.update(x, objective(x))
    assert model.model.num_observations == 14
    assert (x - torch.tensor([1.2, 1.0], dtype=F64)).abs().max() < 0.25


@pytest.mark.parametrize("name", MAKE)
def test_gradients_in_x_equal_finite_differences(name: str) -> None:
    """Through the fantasies, in those that make them."""
    model, baseline = make_model()
    acquisition = MAKE[name](model, baseline)
    q = {"qKG": 5}.get(name, 1)  # one candidate and its four fantasy solutions
    X = (BOUNDS[0] + (BOUNDS[1] - BOUNDS[0]) * torch.rand(3, q, 2, dtype=F64)).requires_grad_()
    (gradient,) = torch.autograd.grad(acquisition(X).sum(), X)
    step, expected = 1e-5, torch.zeros_like(X)
    with torch.no_grad():
        for index in range(X.numel()):
            shift = torch.zeros(X.numel(), dtype=F64)
            shift[index] = step
            up, down = acquisition(X + shift.view_as(X)).sum(), acquisition(X - shift.view_as(X)).sum()
            expected.view(-1)[index] = (up - down) / (2 * step)
    assert gradient.abs().max() > 0
    assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_two_objectives_in_a_model_list() -> None:
    X = torch.rand(12, 2, dtype=F64)
    Y = torch.stack([X.sin().sum(-1), (3 * X).cos().sum(-1)], -1)
    transform = FixedStandardize(0.5, 2.0)
    models = [
        StreamingSingleTaskGP(X, Y[:, :1], outcome_transform=transform),
        StreamingSingleTaskGP(X[:8], Y[:8, 1:]),
    ]
    together = ModelListGP(*models)
    fit_gpytorch_mll(SumMarginalLogLikelihood(together.likelihood, together))
    posterior = together.posterior(X[:5])
    for k, model in enumerate(models):
        assert torch.allclose(posterior.mean[:, k : k + 1], model.posterior(X[:5]).mean)
    acquisition = qLogExpectedHypervolumeImprovement(
        together,
        ref_point=[0.0, 0.0],
        partitioning=NondominatedPartitioning(torch.zeros(2, dtype=F64), Y),
        sampler=sampler(16),
    )
    unit = torch.stack([torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)])
    x, value = optimize_acqf(acquisition, unit, q=2, num_restarts=2, raw_samples=8, options={"maxiter": 5})
    assert x.shape == (2, 2) and value.isfinite()
    fantasies = together.fantasize(x, sampler(4))
    assert fantasies.posterior(X[:5]).mean.shape == (4, 5, 2)


def test_a_model_list_is_conditioned_on_both_outputs() -> None:
    X = torch.rand(12, 2, dtype=F64)
    Y = torch.stack([X.sin().sum(-1), (3 * X).cos().sum(-1)], -1)
    models = [StreamingSingleTaskGP(X, Y[:, k : k + 1]) for k in range(2)]
    child = ModelListGP(*models).condition_on_observations([X[:3], X[:3]], Y[:3] + 0.5)
    for k, model in enumerate(models):
        expected = model.condition_on_observations(X[:3], Y[:3, k : k + 1] + 0.5).posterior(X).mean
        assert torch.equal(child.posterior(X).mean[:, k : k + 1], expected)

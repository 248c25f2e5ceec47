"""Many beliefs at once are the beliefs one by one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gpseq.features import HippoFeatures
from gpseq.variational import Prior, independent, online
from tests.oracles_streaming import F64, gpytorch_kernel


def data(num: int, n: int, seed: int = 0, low: float = 0.0, high: float = 10.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = low + (high - low) * torch.rand(num, n, dtype=F64, generator=generator)
    phase = torch.arange(num, dtype=F64)[:, None]
    return x, torch.sin(1.3 * x + phase) + 0.2 * torch.randn(num, n, dtype=F64, generator=generator)


@pytest.mark.parametrize("form", ["own", "shared", "masked", "scalar noise", "noise of each"])
@pytest.mark.parametrize("n", [1, 3])
def test_the_fast_formula_is_the_plain_one(n: int, form: str) -> None:
    """`update_each` against `online.update`, in one block and in many."""
    prior = Prior(gpytorch_kernel(1.2, 1.5))
    state = online.initial_state(HippoFeatures(9, 10.0), prior)
    x, y = data(7, n)
    own = {name: getattr(state, name).expand(7, *getattr(state, name).shape) for name in independent.OWN}
    state = online.update(replace(state, **own), prior, x[0], y, torch.tensor(0.3))
    inputs = x[0].unsqueeze(-1) if form == "shared" else x.unsqueeze(-1)
    observed = torch.rand(7, n) < 0.5 if form == "masked" else None
    noise = {"noise of each": 0.1 + torch.rand(7, n, dtype=F64), "scalar noise": torch.tensor(0.2, dtype=F64)}.get(
        form, torch.full((1,), 0.2, dtype=F64)
    )
    expected = online.update(state, prior, inputs, y, noise, observed)
    for block in (1, independent.BLOCK):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(independent, "BLOCK", block)
            actual = independent.update_each(state, prior, inputs, y, noise, observed)
        for name in independent.OWN:
            torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
        assert torch.equal(actual.G, actual.G.mT) or n > 1
    if observed is not None:
        idle = ~observed.any(-1)
        for name in independent.OWN:
            assert torch.equal(getattr(actual, name)[idle], getattr(state, name)[idle])

"""Tangents by difference quotients, against those of forward mode; what comes before is computed once."""

import copy

import pytest
import torch
from torch import nn

from gpseq.nn import SGPATransformerEncoderLayer
from gpseq.propagation import from_columns, from_variances, linearised
from gpseq.propagation.differences import Prefix, step_size


def encoder(depth=3):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.Linear(8, 3)).eval()


def variances(model, relative, *starts):
    return {
        name: (relative * value.detach().square().mean().sqrt()).square().expand_as(value).clone()
        for name, value in model.named_parameters()
        if name.startswith(starts) and value.dim() > 1
    }


def generator():
    return torch.Generator().manual_seed(0)


CALLS = []  # outside of modules, whose attributes are brought back


class Counting(nn.Module):
    """A linear layer whose calls are counted."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, shift=None):
        CALLS.append(len(x))
        return self.linear(x) if shift is None else self.linear(x) + shift


@pytest.mark.parametrize("starts", [("0.layers.2", "1"), ("",), ("0.layers.0",)], ids=["last", "all", "first"])
@pytest.mark.parametrize("relative", [0.3, 0.05, 1e-4])
def test_tangents_of_forward_mode(starts, relative, dtype):
    model = encoder().to(dtype)
    posterior = from_variances(variances(model, relative, *starts))
    x = torch.randn(4, 5, 8, dtype=dtype)
    want = linearised(model, posterior, x, 6, generator=generator())
    found = linearised(model, posterior, x, 6, generator=generator(), method="differences")
    torch.testing.assert_close(found.mean, want.mean)
    size = want.variance.sqrt().mean()
    error = (found.covariance.to_dense() - want.covariance.to_dense()).abs().max() / size.square()
    assert error < (0.05 if dtype == torch.float32 else 1e-4)


def test_columns_that_are_no_draws_come_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    columns = {
        name: 0.1 * torch.randn(4, *model.get_parameter(name).shape).double() for name in ("0.weight", "2.weight")
    }
    posterior = from_columns(columns)
    x = torch.randn(3, 3, dtype=torch.float64)
    want = linearised(model, posterior, x, 7, generator=generator())
    found = linearised(model, posterior, x, 7, generator=generator(), method="differences")
    torch.testing.assert_close(found.covariance.to_dense(), want.covariance.to_dense(), rtol=1e-4, atol=1e-8)


def test_chunks_change_nothing():
    model = encoder().double()
    posterior = from_variances(variances(model, 0.1, "0.layers.2"))
    x = torch.randn(5, 4, 8, dtype=torch.float64)
    want = linearised(model, posterior, x, 4, generator=generator(), method="differences")
    found = linearised(model, posterior, x, 4, 2, generator=generator(), method="differences")
    torch.testing.assert_close(found.variance, want.variance, rtol=1e-6, atol=1e-12)


def test_nothing_uncertain():
    model = encoder()
    found = linearised(model, from_variances({}), torch.randn(2, 4, 8), 3, method="differences")
    assert found.variance.eq(0).all()


def test_what_comes_before_is_called_once():
    first, last = Counting(), nn.Linear(3, 2)
    model = nn.Sequential(first, nn.ReLU(), last).eval()
    posterior = from_variances({"2.weight": torch.full((2, 3), 0.1)})
    x = torch.randn(4, 3)
    counts = []
    for number in (2, 20):
        CALLS.clear()
        linearised(model, posterior, x, number, method="differences")
        counts.append(len(CALLS))
    assert 1 <= counts[0] == counts[1]
    assert "forward" not in first.__dict__


def test_what_comes_behind_is_called_each_time():
    first, last = nn.Linear(3, 3), Counting()
    model = nn.Sequential(first, last).eval()
    posterior = from_variances({"0.weight": torch.full((3, 3), 0.1)})
    CALLS.clear()
    linearised(model, posterior, torch.randn(4, 3), 3, method="differences")
    assert len(CALLS) >= 4


class Twice(nn.Module):
    """Calls one layer twice, with the uncertain one in between, and changes what it gets in place."""

    def __init__(self):
        super().__init__()
        self.shared, self.between = Counting(), nn.Linear(3, 3)

    def forward(self, x):
        x = self.shared(x, shift=1.0)
        x += 1.0
        return self.shared(self.between(x).tanh_())


def test_a_layer_that_is_called_twice_and_values_that_change_in_place():
    model = Twice().double().eval()
    posterior = from_variances({"between.weight": torch.full((3, 3), 0.1, dtype=torch.float64)})
    x = torch.randn(4, 3, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    want = linearised(model, posterior, x, 5, generator=generator())
    found = linearised(model, posterior, x, 5, generator=generator(), method="differences")
    torch.testing.assert_close(found.variance, want.variance, rtol=1e-4, atol=1e-12)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_prefix_gives_what_plain_runs_give():
    model = encoder()
    names = ["0.layers.1.linear1.weight", "1.bias"]
    prefix = Prefix(model, names)
    x = torch.randn(2, 4, 8)

    def run(weights):
        return torch.func.functional_call(model, weights, (x,))

    for _ in range(3):
        weights = {name: torch.randn_like(model.get_parameter(name)) for name in names}
        torch.testing.assert_close(prefix(run, weights), run(weights))
    x = x + 1  # other inputs: nothing that is remembered fits
    torch.testing.assert_close(prefix(run, weights), run(weights))


def test_forward_is_as_it_was_after_an_error():
    model = nn.Sequential(Counting(), nn.Linear(3, 2)).eval()
    prefix = Prefix(model, ["1.weight"])
    with pytest.raises(RuntimeError, match="broken"):
        prefix(lambda weights: (_ for _ in ()).throw(RuntimeError("broken")), {})
    assert all("forward" not in part.__dict__ for part in model.modules())


def test_modules_with_hooks_are_left_alone():
    model = nn.Sequential(Counting(), nn.Linear(3, 2)).eval()
    seen = []
    model[0].linear.register_forward_hook(lambda module, args, output: seen.append(output))
    linearised(model, from_variances({"1.weight": torch.full((2, 3), 0.1)}), torch.randn(4, 3), 5, method="differences")
    assert len(seen) >= 6


def test_the_step_is_a_small_part_of_the_weights(dtype):
    means, direction = {"a": torch.full((4,), 2.0, dtype=dtype)}, {"a": torch.full((4,), 0.5, dtype=dtype)}
    step = step_size(means, direction)
    assert step / 4 == pytest.approx({torch.float32: 3e-3, torch.float64: 1e-6}[dtype])
    assert step_size(means, {"a": torch.zeros(4, dtype=dtype)}) == 1.0
    assert step_size({"a": torch.zeros(4, dtype=dtype)}, direction) > 0


def test_networks_that_draw_are_refused():
    layer = SGPATransformerEncoderLayer(8, 2, 16, batch_first=True, num_inducing=3).eval()
    model = nn.Sequential(layer, nn.Linear(8, 2)).eval()
    posterior = from_variances({"1.weight": torch.full((2, 8), 0.1)})
    with pytest.raises(RuntimeError, match="answers alike each time for 'differences'"):
        linearised(model, posterior, torch.randn(2, 3, 8), method="differences")

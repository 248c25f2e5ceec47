"""Monte Carlo over weights: draws, the comparison with a propagation, and what it says of its own error."""

import math

import pytest
import torch
from torch import nn

from gpseq.propagation import from_columns, from_covariance, from_factors, from_variances
from gpseq.propagation.checking import Comparison, check, sample
from gpseq.propagation.laws import Diagonal, KroneckerLaplace, Law
from gpseq.propagation.linearisation import linearised
from gpseq.propagation.posteriors import WeightPosterior
from gpseq.propagation.quadratic import draw_weights
from tests.oracles_propagation import enumerate_moments, posterior


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()


def spd(size):
    root = torch.randn(size, size)
    return root @ root.mT / size + 0.1 * torch.eye(size)


def all_laws():
    """One posterior of a network for each way to write one."""
    values_b, vectors_b = torch.linalg.eigh(spd(2))
    values_a, vectors_a = torch.linalg.eigh(spd(4))
    own = {"0.weight": torch.rand(4, 3), "1.bias": torch.rand(2)}
    columns = {"0.weight": torch.randn(2, 4, 3), "1.bias": torch.randn(2, 2)}
    return {
        "variances": from_variances(own, {"1.bias": torch.tensor([3.0, -3.0])}),
        "factors": from_factors({"1.weight": (spd(2), spd(4))}),
        "laplace": WeightPosterior(
            {"1.weight": KroneckerLaplace(vectors_b, values_b, vectors_a, values_a, torch.tensor(0.5))}
        ),
        "covariance": from_covariance(["1.bias", "1.weight"], spd(10)),
        "columns": from_columns(columns, own),
        "columns alone": from_columns(columns) | from_factors({"1.weight": (spd(2), spd(4))}),
    }


@pytest.mark.parametrize("name", list(all_laws()))
def test_draws_have_the_moments_of_every_law(name):
    """Through a network that is linear in what is uncertain, whose tangent is exact."""
    torch.manual_seed(1)
    network, weights, x = linear(), all_laws()[name], torch.randn(3, 3)
    if name == "columns alone":  # a product of what is uncertain has more than a tangent
        weights = from_columns({"0.weight": torch.randn(2, 4, 3)})
    found = sample(network, weights, x, 20_000, seeded())
    expected = linearised(network, weights, x, method="exact")
    deviation = expected.variance.sqrt()
    torch.testing.assert_close((found.mean - expected.mean) / deviation, torch.zeros_like(deviation), atol=0.03, rtol=0)
    scale = deviation.unsqueeze(-1) * deviation.unsqueeze(-2)
    error = (found.covariance.to_dense() - expected.covariance.to_dense()) / scale
    assert error.abs().max() < 0.05


def test_draws_of_all_weights_are_of_their_shapes():
    network = linear().double()
    for weights in all_laws().values():
        bound = weights.bind(network)
        drawn = draw_weights(bound, 5, seeded())
        assert set(drawn) == set(weights.names)
        for name, value in drawn.items():
            assert value.shape == (5, *network.get_parameter(name).shape) and value.dtype == torch.float64


def test_sample_agrees_with_enumeration():
    """Signs and Gaussians have the same two moments in a network that is linear in each weight."""
    torch.manual_seed(2)
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    x = torch.randn(2, 2, dtype=torch.float64)
    deviations = {"0.weight": torch.rand(2, 2).double(), "1.weight": torch.rand(2, 2).double()}
    mean, covariance = enumerate_moments(network, deviations, x)
    found = sample(network, from_variances({n: d.square() for n, d in deviations.items()}), x, 40_000, seeded())
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((found.mean - mean) / scale).abs().max() < 0.02
    error = (found.covariance.to_dense() - covariance) / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    assert error.abs().max() < 0.06


def test_sample_is_a_prediction_by_draws():
    network = linear()
    weights, x = posterior(network, 0.1), torch.randn(5, 3)
    found = sample(network, weights, x, 7, seeded(), noise=0.1)
    assert found.samples.shape == (7, 5, 2) and found.noise is not None and found.notes["covariance"] == "sampled"
    again = sample(network, weights, x, 7, seeded(), chunk_size=2)  # chunks of the batch change nothing
    torch.testing.assert_close(again.samples, found.samples)
    assert not torch.equal(sample(network, weights, x, 7, seeded(1)).samples, found.samples)
    mapping = sample(nn.Bilinear(3, 3, 2), WeightPosterior(), {"input1": x, "input2": x}, 2)
    assert torch.equal(mapping.samples[0], mapping.samples[1])


def test_tokens_and_batch_dim():
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0).eval()
    found = sample(layer, posterior(layer, 0.1), torch.randn(3, 2, 4), 3, batch_dim=1, outputs=torch.tensor([0, 2]))
    assert found.samples.shape == (3, 2, 3, 2) and found.event_dim == 2


class Looks(nn.Module):
    """Cannot be mapped over many weights."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        h = self.linear(x)
        return h if h.sum() > 0 else 2 * h


def test_what_cannot_be_mapped_runs_one_by_one():
    network, x = Looks().eval(), torch.randn(4, 3)
    weights = posterior(network, 0.5)
    found = sample(network, weights, x, 6, seeded())
    drawn = draw_weights(weights.bind(network), 6, seeded())
    for number in range(6):
        h = x @ drawn["linear.weight"][number].mT + drawn["linear.bias"][number]
        torch.testing.assert_close(found.samples[number], h if h.sum() > 0 else 2 * h)


def test_large_networks_run_one_by_one(monkeypatch):
    monkeypatch.setattr("gpseq.propagation.checking._DRAWN", 60)
    network, x = linear(), torch.randn(4, 3)
    weights = posterior(network, 0.5)
    found = sample(network, weights, x, 5, seeded())
    assert found.samples.shape == (5, 4, 2) and found.samples.std(0).min() > 0


def test_errors_of_the_model_come_through():
    network = linear()
    with pytest.raises(RuntimeError, match="shapes"):
        sample(network, posterior(network, 0.1), torch.randn(4, 5), 3)


# The comparison


def test_a_linear_network_is_right():
    torch.manual_seed(3)
    network, x = linear(), torch.randn(3, 3)
    found = check(network, posterior(network, 0.3), x, 20_000, generator=seeded(), quiet=True)
    assert isinstance(found, Comparison) and found.ratio.shape == (3, 2) and found.num_samples == 20_000
    assert ((found.ratio - 1) / found.ratio_standard_error).abs().max() < 4
    assert found.mean_error.abs().max() < 4 * found.mean_standard_error
    assert found.correlation_error.shape == (3,) and found.correlation_error.max() < 0.03
    # A Gaussian's sd has a relative error of one by the root of 2 S; products of weights have heavier tails.
    assert (found.ratio_standard_error > 0.9 / math.sqrt(2 * 20_000)).all()
    assert (found.ratio_standard_error < 0.015).all()


def test_what_is_wrong_is_seen():
    """Independent tokens: the published rules, and ours without what tokens share."""
    torch.manual_seed(4)
    network = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(20, 2)).eval()
    x = torch.ones(2, 5, 3)
    right = check(network, posterior(network, 0.1, ["0"]), x, 3000, generator=seeded(), quiet=True)
    wrong = check(network, posterior(network, 0.1, ["0"]), x, 3000, "diag", seeded(), quiet=True)
    assert (right.ratio - 1).abs().max() < 0.06
    assert (wrong.ratio - 1).abs().max() > 0.2
    assert wrong.correlation_error.mean() > 5 * right.correlation_error.mean()


def test_it_prints_a_table_unless_it_is_quiet(capsys):
    network, x = linear(), torch.randn(3, 3)
    weights = posterior(network, 0.1)
    found = check(network, weights, x, 300, generator=seeded())
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    lines = printed.splitlines()
    assert "300 samples" in lines[0] and "'full'" in lines[0]
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "all"]
    assert "standard error" in printed and "correlations" in printed
    steps = []
    check(network, weights, x, 300, quiet=True, progress=lambda done, total: steps.append((done, total)))
    assert capsys.readouterr().out == "" and steps[-1] == (300, 300)


def test_a_long_table_is_cut():
    network = nn.Linear(3, 30)
    found = check(network, posterior(network, 0.1), torch.randn(2, 3), 50, quiet=True)
    assert len(str(found).splitlines()) < 30 and "..." in str(found)


def test_the_propagation_has_its_options():
    network, x = linear(), torch.randn(3, 3)
    weights = posterior(network, 0.1)
    low = check(network, weights, x, 50, "lowrank", seeded(), quiet=True, num_tangents=4)
    assert low.propagated.notes["covariance"] == "lowrank"
    streamlined = check(network, weights, x, 50, generator=seeded(), quiet=True, preset="streamlined")
    assert streamlined.propagated.notes["covariance"] == "diag"
    with pytest.raises(ValueError, match="dropout: expected 'off'"):
        check(network, weights, x, 50, quiet=True, dropout="variance")
    with pytest.raises(ValueError, match="num_samples"):
        check(network, weights, x, 1, quiet=True)
    with pytest.raises(TypeError, match="generator"):
        check(network, weights, x, 10, generator=3, quiet=True)


def test_masks_go_to_both():
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True).eval()
    x, padding = torch.randn(2, 3, 4), torch.tensor([[False, False, True], [False, False, False]])
    found = check(layer, posterior(layer, 0.05), x, 2000, generator=seeded(), quiet=True, src_key_padding_mask=padding)
    assert (found.ratio[1] - 1).abs().max() < 0.12 and (found.ratio[0, :2] - 1).abs().max() < 0.12


def test_outputs_without_variance():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def propagate_moments(self, state, walk):
            wide = walk(self.linear, state)
            return wide.move(lambda x: x.expand(-1, 2)).scale(torch.tensor([1.0, 0.0]).expand(len(state.mean), 2))

        def forward(self, x):
            return self.linear(x) * torch.tensor([1.0, 0.0])

    network = Half().eval()
    found = check(network, posterior(network, 0.1), torch.randn(2, 3), 500, generator=seeded(), quiet=True)
    assert (found.ratio[:, 1] == 1).all() and (found.mean_error[:, 1] == 0).all()
    assert (found.ratio_standard_error[:, 1] == 0).all() and found.correlation_error.isfinite().all()
    str(found)
    one = check(nn.Linear(3, 1), from_variances({"weight": torch.ones(1, 3)}), torch.ones(2, 3), 50, quiet=True)
    assert one.correlation_error is None and "correlations" not in str(one)


def test_laws_that_are_not_known_are_named():
    class Other(Diagonal):
        pass

    class Foreign(Law):
        shape = (2, 4)
        variance = blocks = tokens = marginals = between = draw = rows = transposed = scaled = None

        def to(self, like):
            return self

    network = linear()
    drawn = draw_weights(WeightPosterior({"1.weight": Other(torch.ones(2, 4))}).bind(network), 3, seeded())
    assert drawn["1.weight"].shape == (3, 2, 4)  # a kind of a known one
    posterior = WeightPosterior({"1.weight": Foreign()})
    with pytest.raises(NotImplementedError, match="draws from Foreign"):
        draw_weights(posterior.bind(network), 3)
    with pytest.raises(NotImplementedError, match="products with the covariance of Foreign"):
        linearised(network, posterior, torch.ones(1, 3), method="exact")


@pytest.mark.cuda
def test_everything_on_a_device():
    network, x = linear().cuda(), torch.randn(3, 3, device="cuda")
    weights = posterior(network, 0.1)
    assert sample(network, weights, x, 5).device.type == "cuda"
    assert linearised(network, weights, x, 5).device.type == "cuda"
    assert check(network, weights, x, 500, quiet=True).ratio.device.type == "cuda"

"""Which rule is for which module: what a module computes is said by its own methods and parameters, or it has none."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from gpseq.propagation import from_variances, propagate
from gpseq.propagation.linearisation import linearised
from gpseq.propagation.registry import find, register
from tests.oracles_propagation import posterior


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def assert_linearised(network, x, **options):
    """A propagation has the mean of the network and the covariance of its tangent."""
    network.eval()
    weights = posterior(network, 1e-4)
    plain = network(x).detach()  # with gradients: torch's fused layers know nothing of methods
    with torch.no_grad():
        expected = linearised(network, weights, x, method="exact")
        found = propagate(network, weights, x, covariance="full", activations="tangent", **options)
    torch.testing.assert_close(found.mean, plain)
    torch.testing.assert_close(found.covariance.to_dense(), expected.covariance.to_dense(), rtol=1e-5, atol=1e-14)


def test_a_forward_of_its_own_for_one_module():
    network, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    plain = network[0].forward
    network[0].forward = lambda x: 2 * plain(x)
    assert find(network[0]) is None
    with pytest.raises(NotImplementedError, match="0, a Linear, and its forward cannot be followed"):
        propagate(network.eval(), posterior(network, 0.1), x)
    assert_linearised(network, x, on_unknown="linearise")


class Doubled(nn.TransformerEncoderLayer):
    """The forward of its base calls what is another one here."""

    def _ff_block(self, x):
        return 2 * super()._ff_block(x)


class Standardised(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Renamed(nn.Linear):
    def extra_repr(self):
        return "mine"


def test_rules_of_a_base_are_for_classes_that_keep_its_methods():
    assert_linearised(nn.Sequential(nn.Linear(3, 4), Doubled(4, 2, 6, batch_first=True)), torch.randn(2, 5, 3))
    assert find(Standardised(2, 2, 1)) is None
    assert find(Renamed(2, 2)) is find(nn.Linear(2, 2))


def test_the_order_of_rules():
    class Base(nn.Module):
        def forward(self, x):
            return x

    class Same(Base):
        pass

    class Other(Base):
        def forward(self, x):
            return -x

    class Own(Base):
        def propagate_moments(self, state, walk):
            return state.shift(1.0)

    @register(lambda module: isinstance(module, Base) and module.training)
    def first(module, state, walk):
        return state

    assert find(Same()) is first and find(Same().eval()) is None

    @register(Base)
    def second(module, state, walk):
        return state

    assert find(Base()) is second and find(Same()) is second
    assert find(Other()) is first and find(Other().eval()) is None
    x = torch.ones(2, 3)
    assert propagate(Own().eval(), from_variances({}), x).mean.equal(x + 1.0)
    with pytest.raises(TypeError, match="types of modules"):
        register(torch.Tensor)


def test_uncertainty_behind_a_weight():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).eval()

    x = torch.randn(2, 3)
    with pytest.raises(NotImplementedError, match="0, a ParametrizedLinear"):
        propagate(network(), posterior(network(), 0.1), x)
    assert_linearised(network(), x, on_unknown="linearise")
    # A weight that is certain may be computed however it is.
    last = posterior(network(), 0.1, ["0.bias", "2."])
    with torch.no_grad():
        plain = network()
        nn.utils.parametrize.remove_parametrizations(plain[0], "weight")
        expected, found = propagate(plain, last, x), propagate(network(), last, x)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.variance, expected.variance)

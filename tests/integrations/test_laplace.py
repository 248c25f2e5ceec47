"""Posteriors of laplace-torch, the real package: the same weights' covariances, and the same predictions."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from gpseq.integrations.laplace import from_laplace
from gpseq.propagation import fit_laplace, propagate
from gpseq.propagation.laws import Dense, Diagonal, Kronecker, KroneckerLaplace
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.walk import Options, Walk

# Not importorskip: where it is installed, a fault of the import is a failure.
if find_spec("laplace") is None:
    pytest.skip(
        "laplace-torch is not installed; 'make setup' does so, without its dependencies", allow_module_level=True
    )

from laplace import Laplace
from laplace.utils import KronDecomposed

STRUCTURES = ["diag", "kron", "full"]
LIKELIHOODS = ["classification", "regression"]
TANGENT = {"activations": "tangent", "covariance": "full"}


def data(likelihood, inputs=3, outputs=4, number=20):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number, inputs, generator=generator, dtype=torch.float64)
    y = torch.randint(outputs, (number,), generator=generator)
    if likelihood == "regression":
        y = torch.randn(number, outputs, generator=generator, dtype=torch.float64)
    return x, y


def network(activation=nn.Tanh):
    return nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 4)).double().eval()


def fitted(model, likelihood, batch_size=8, **options):
    settings = {"prior_precision": 2.0, "temperature": 0.7, **options}
    if likelihood == "regression":
        settings = {"sigma_noise": 0.4, **settings}
    la = Laplace(model, likelihood, **settings)
    la.fit(DataLoader(TensorDataset(*data(likelihood)), batch_size=batch_size))
    return la


def linearised(model, posterior, x):
    """Tangents, and no products of the noise of two layers: the linearised network."""
    walk = Walk(model, posterior.bind(model), Options(form="full", activations="tangent", products=False))
    with torch.no_grad():
        state = walk(model, GaussianState(x))
    return state.mean, state.covariance.entries


def variances(posterior, model):
    """Of all weights, in the order of the model, zero where they are certain."""
    bound = posterior.bind(model)
    found = []
    for name, parameter in model.named_parameters():
        laws = bound.law(parameter, None, parameter) if name in posterior.names else []
        found.append(sum((law.marginals().flatten() for law, _ in laws), torch.zeros(parameter.numel()).to(parameter)))
    return torch.cat(found)


def same_predictions(la, model, posterior, x, whole=False):
    """``la``'s linearised prediction is ours."""
    mean, covariance = la._glm_predictive_distribution(x)
    if whole:
        own_mean, own = linearised(model, posterior, x)
    else:
        p = propagate(model, posterior, x, **TANGENT)
        own_mean, own = p.mean, p.covariance.to_dense()
    torch.testing.assert_close(own_mean, mean)
    torch.testing.assert_close(own, covariance)


# The last layer: exact


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_last_layer_gives_the_same_prediction(structure, likelihood):
    model = network()
    la = fitted(model, likelihood, subset_of_weights="last_layer", hessian_structure=structure)
    posterior = from_laplace(la)
    assert set(posterior.names) == {"2.weight", "2.bias"}
    x = torch.randn(6, 3, dtype=torch.float64)
    same_predictions(la, model, posterior, x)
    # Nothing but the last layer is uncertain: exact with moments too, and in any form that keeps outputs together.
    _, covariance = la._glm_predictive_distribution(x)
    torch.testing.assert_close(propagate(model, posterior, x, covariance="blockdiag").covariance.to_dense(), covariance)
    diagonal = propagate(model, posterior, x, covariance="diag").variance
    torch.testing.assert_close(diagonal, covariance.diagonal(dim1=-2, dim2=-1))


def test_the_last_layer_inside_of_a_model_has_its_name():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(3, 5), nn.ReLU()), nn.Sequential(nn.Linear(5, 4, bias=False))

        def forward(self, x):
            return self.head(self.body(x))

    la = fitted(Wrapped().double(), "classification", subset_of_weights="last_layer", hessian_structure="kron")
    assert from_laplace(la).names == ("head.0.weight",)
    assert from_laplace(la, prefix="head.").names == ("0.weight",)
    with pytest.raises(ValueError, match=r"prefix: expected the beginning of all names, got 'body.' for head.0.weight"):
        from_laplace(la, prefix="body.")


# All weights


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["diag", "kron"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Identity, nn.ReLU])
def test_a_network_without_products_is_the_linearised_one(structure, likelihood, activation):
    model = network(activation)
    la = fitted(model, likelihood, subset_of_weights="all", hessian_structure=structure)
    posterior = from_laplace(la)
    assert posterior.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    same_predictions(la, model, posterior, torch.randn(6, 3, dtype=torch.float64), whole=True)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_variances_of_weights(subset, structure, likelihood):
    model = network()
    la = fitted(model, likelihood, subset_of_weights=subset, hessian_structure=structure)
    if structure == "diag":
        expected = la.posterior_variance
    elif structure == "full":
        expected = la.posterior_covariance.diagonal()
    else:
        expected = la.posterior_precision.diag(exponent=-1)
    found = variances(from_laplace(la), model)
    torch.testing.assert_close(found[-len(expected) :], expected)
    assert (found[: -len(expected)] == 0).all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_full_covariance_keeps_what_layers_have_in_common(likelihood):
    model = network()
    la = fitted(model, likelihood, subset_of_weights="all", hessian_structure="full")
    posterior = from_laplace(la)
    assert posterior.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    torch.testing.assert_close(posterior.joints[0].covariance, la.posterior_covariance)
    x = torch.randn(6, 3, dtype=torch.float64)
    options = Options(form="lowrank", activations="tangent", products=False, rescale=False)
    walk = Walk(model, posterior.bind(model), options, 20_000, torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = walk(model, GaussianState(x)).covariance.operator().to_dense()
    _, expected = la._glm_predictive_distribution(x)
    scale = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((found - expected) / (scale.unsqueeze(-1) * scale.unsqueeze(-2))).abs().max() < 0.06
    with pytest.warns(UserWarning, match="covariances between layers are left out"):
        propagate(model, posterior, x, covariance="full")


def test_one_linear_layer_with_a_full_covariance():
    model = nn.Linear(3, 4).double().eval()
    la = fitted(model, "classification", subset_of_weights="all", hessian_structure="full")
    same_predictions(la, model, from_laplace(la), torch.randn(6, 3, dtype=torch.float64))


# Subnetworks


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["diag", "full"])
@pytest.mark.parametrize("indices", [[39, 3, 22, 41], [15, 19, 16, 18, 17], list(range(20, 44))])
def test_a_subnetwork(structure, likelihood, indices):
    """Some entries of some parameters, one parameter in another order, and a whole layer."""
    model = network()
    chosen = torch.tensor(indices)
    la = fitted(
        model, likelihood, subset_of_weights="subnetwork", hessian_structure=structure, subnetwork_indices=chosen
    )
    posterior = from_laplace(la)
    expected = torch.zeros(44, dtype=torch.float64)
    expected[chosen] = la.posterior_variance if structure == "diag" else la.posterior_covariance.diagonal()
    torch.testing.assert_close(variances(posterior, model), expected)
    touched = {"0.weight", "2.weight", "2.bias"} if 39 in indices else {"0.bias"}
    touched = {"2.weight", "2.bias"} if len(indices) == 24 else touched
    assert set(posterior.names) == touched
    x = torch.randn(6, 3, dtype=torch.float64)
    if structure == "diag" or len(touched) == 1 or len(indices) == 24:
        same_predictions(la, model, posterior, x, whole=True)
        return
    options = Options(form="lowrank", activations="tangent", products=False)
    with torch.no_grad():
        state = Walk(model, posterior.bind(model), options, 1)(model, GaussianState(x))
    assert posterior.num_columns == len(indices)
    _, covariance = la._glm_predictive_distribution(x)
    torch.testing.assert_close(state.covariance.operator().to_dense(), covariance)


# Priors, noise, temperature, damping


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_a_prior_precision_for_each_parameter(structure):
    model = network()
    precisions = torch.tensor([0.3, 1.0, 4.0, 9.0], dtype=torch.float64)
    la = fitted(model, "regression", subset_of_weights="all", hessian_structure=structure, prior_precision=precisions)
    same_predictions(la, model, from_laplace(la), torch.randn(6, 3, dtype=torch.float64), whole=True)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_was_optimised_later_counts(structure):
    model = network()
    la = fitted(model, "regression", subset_of_weights="last_layer", hessian_structure=structure)
    before = variances(from_laplace(la), model)
    la.optimize_prior_precision(pred_type="glm", method="marglik", n_steps=5)
    la.temperature = 3.0
    assert (variances(from_laplace(la), model) != before)[20:].all()
    same_predictions(la, model, from_laplace(la), torch.randn(6, 3, dtype=torch.float64))


def test_factors_are_kept_as_eigenbases():
    la = fitted(network(), "classification", subset_of_weights="all", hessian_structure="kron")
    posterior = from_laplace(la)
    dense = la.posterior_precision.to_matrix(exponent=-1)
    start = 0
    for name, law in posterior.laws.items():
        assert isinstance(law, KroneckerLaplace)
        rows, columns = law.shape
        size = rows * columns
        eye = torch.eye(columns, dtype=torch.float64).unsqueeze(0)
        found = law.tokens(eye)[0].permute(1, 0, 3, 2).reshape(size, size)
        torch.testing.assert_close(found, dense[start : start + size, start : start + size], rtol=0, atol=1e-12)
        assert float(law.precision) == 2.0, name
        start += size


class Damped:
    """A Laplace approximation whose precision is damped, or has one factor for all entries of a parameter."""

    def __init__(self, la, precision):
        self.__dict__.update(la.__dict__)
        self._key, self.la, self.precision = la._key, la, precision

    @property
    def posterior_precision(self):
        return self.precision


def test_damping():
    """The precision is asked, since an approximation may be made with ``damping`` and predict without it."""
    model = network()
    la = fitted(model, "classification", subset_of_weights="all", hessian_structure="kron", damping=True)
    same_predictions(la, model, from_laplace(la), torch.randn(6, 3, dtype=torch.float64), whole=True)
    plain = la.posterior_precision
    damped = KronDecomposed(plain.eigenvectors, plain.eigenvalues, plain.deltas, damping=True)
    posterior = from_laplace(Damped(la, damped))
    assert isinstance(posterior.laws["0.weight"], Kronecker)
    torch.testing.assert_close(variances(posterior, model), damped.diag(exponent=-1))
    dense = damped.to_matrix(exponent=-1)[:15, :15]
    law = posterior.laws["0.weight"]
    torch.testing.assert_close(torch.kron(law.outputs, law.inputs), dense)


def test_one_factor_for_all_entries_of_a_matrix():
    model = nn.Linear(3, 4, bias=False).double()
    la = fitted(model, "classification", subset_of_weights="all", hessian_structure="kron")
    root = torch.randn(12, 12, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(root @ root.mT)
    single = KronDecomposed([[vectors]], [[values]], torch.tensor([0.5], dtype=torch.float64))
    posterior = from_laplace(Damped(la, single))
    assert isinstance(posterior.laws["weight"], Dense)
    torch.testing.assert_close(posterior.laws["weight"].entries.reshape(12, 12), single.to_matrix(exponent=-1))
    short = KronDecomposed([[vectors], [vectors]], [[values], [values]], torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="la: expected factors for 1 parameters, got 2"):
        from_laplace(Damped(la, short))
    wrong = KronDecomposed([[vectors, vectors]], [[values, values]], torch.ones(1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"la: expected factors for weight of shape \(4, 3\), got \(12, 12\)"):
        from_laplace(Damped(la, wrong))


# Means and names


def test_means_are_those_at_the_time_of_the_fit():
    model = network()
    for subset in ("all", "last_layer"):
        la = fitted(model, "regression", subset_of_weights=subset, hessian_structure="diag")
        posterior = from_laplace(la)
        before = copy.deepcopy(model)
        with torch.no_grad():
            model[2].weight.add_(1.0)
        x = torch.randn(6, 3, dtype=torch.float64)
        torch.testing.assert_close(propagate(model, posterior, x, **TANGENT).mean, before(x).detach())
        assert torch.equal(parameters_to_vector(posterior.means.values()), la.mean)
        model = before


def test_frozen_parameters_are_certain():
    model = network()
    model[0].weight.requires_grad_(False)
    la = fitted(model, "classification", subset_of_weights="all", hessian_structure="diag")
    posterior = from_laplace(la)
    assert posterior.names == ("0.bias", "2.weight", "2.bias")
    torch.testing.assert_close(variances(posterior, model)[15:], la.posterior_variance)


def test_a_wrapper_around_the_model_goes_away():
    class Wrapper(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

    model = network()
    la = fitted(Wrapper(model), "classification", subset_of_weights="all", hessian_structure="kron")
    assert from_laplace(la).names[0] == "net.0.weight"
    same_predictions(la, model, from_laplace(la, prefix="net."), torch.randn(6, 3, dtype=torch.float64), whole=True)


def test_convolutions():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4)).double().eval()
    x, y = torch.randn(10, 1, 3, 3, dtype=torch.float64), torch.randint(4, (10,))
    la = Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron")
    la.fit(DataLoader(TensorDataset(x, y), batch_size=5))
    posterior = from_laplace(la)
    torch.testing.assert_close(variances(posterior, model), la.posterior_precision.diag(exponent=-1))
    assert posterior.laws["0.weight"].shape == (2, 4)


# The built-in approximation is the same


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_the_built_in_approximation_agrees(structure, likelihood):
    model = network()
    la = fitted(model, likelihood, subset_of_weights="all", hessian_structure=structure, temperature=1.0)
    loader = DataLoader(TensorDataset(*data(likelihood)), batch_size=7)
    own = fit_laplace(model, loader, likelihood, structure, prior_precision=2.0, noise=0.4**2)
    torch.testing.assert_close(variances(own, model), variances(from_laplace(la), model))
    if structure == "kron":
        x = torch.randn(6, 3, dtype=torch.float64)
        torch.testing.assert_close(linearised(model, own, x), linearised(model, from_laplace(la), x))
    else:
        assert all(isinstance(law, Diagonal) for law in own.laws.values())


# What is refused


@pytest.mark.parametrize(
    "options",
    [
        {"subset_of_weights": "all", "hessian_structure": "kron"},
        {"subset_of_weights": "all", "hessian_structure": "full"},
        {"subset_of_weights": "last_layer", "hessian_structure": "diag"},
        {"subset_of_weights": "last_layer", "hessian_structure": "kron", "last_layer_name": "2"},
    ],
)
def test_what_is_not_fitted_is_refused(options):
    with pytest.raises(ValueError, match="la: expected it fitted"):
        from_laplace(Laplace(network(), "classification", **options))


def test_other_objects_are_refused():
    with pytest.raises(
        TypeError, match="la: expected a Laplace approximation of structure diag, kron, full, got Linear"
    ):
        from_laplace(nn.Linear(2, 2))
    la = Laplace(network(), "regression", subset_of_weights="all", hessian_structure="gp", n_subset=5)
    with pytest.raises(TypeError, match="got FunctionalLaplace of structure 'gp'"):
        from_laplace(la)

"""Posteriors of weights: what is refused, and what reaches the network's outputs."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from gpseq.propagation import (
    WeightPosterior,
    check,
    fit_laplace,
    from_columns,
    from_covariance,
    from_factors,
    from_variances,
    layer_contributions,
    linearised,
    plan,
    propagate,
    sample,
    streamline,
)
from gpseq.propagation.laws import Dense, Diagonal, Kronecker, KroneckerLaplace, LowRank
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.posteriors import Joint
from gpseq.propagation.walk import Options, Walk

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()


@pytest.fixture
def x():
    return torch.randn(5, 3, dtype=torch.float64)


def full_covariance(size, seed=0):
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.01 * root @ root.mT


def jacobian(model, x, names):
    """d outputs / d parameters, ``(B, K, n)``, parameters one after the other."""
    weights = {name: p.detach() for name, p in model.named_parameters() if name in names}
    found = jacrev(lambda w: functional_call(model, w, (x,)))(weights)
    return torch.cat([found[name].flatten(2) for name in names], -1)


def glm(model, x, names, covariance):
    """The linearised predictive covariance, ``(B, K, K)``."""
    j = jacobian(model, x, names)
    return j @ covariance @ j.mT


# What fits


def test_unknown_names_are_refused(model, x):
    with pytest.raises(ValueError, match=r"expected names of parameters \(0.weight, .*\), got nonsense"):
        propagate(model, from_variances({"nonsense": torch.ones(2)}), x)
    with pytest.raises(ValueError, match="got nonsense"):
        from_variances({"0.bias": torch.ones(4)}, {"nonsense": torch.ones(2)}).bind(model)


@pytest.mark.parametrize(
    ("posterior", "message"),
    [
        (from_variances({"0.weight": torch.ones(4, 2)}), r"shape \(4, 3\) for 0.weight.* got \(4, 2\)"),
        (from_variances({"0.bias": torch.ones(3)}), r"shape \(4, 1\) for 0.bias, which has shape \(4,\), got \(3, 1\)"),
        (from_factors({"0.weight": (torch.eye(3), torch.eye(4))}), r"shape \(4, 3\) for 0.weight"),
        (from_covariance(["0.bias", "2.bias"], torch.eye(5)), "expected 6 entries for 0.bias, 2.bias, got 5"),
        (from_columns({"0.bias": torch.ones(2, 3)}), r"a law for 0.bias of shape \(4,\), got one for \(3,\)"),
        # As many entries as the parameter has, in another order.
        (
            from_columns({"0.weight": torch.ones(2, 3, 4)}),
            r"a law for 0.weight of shape \(4, 3\), got one for \(3, 4\)",
        ),
        (
            WeightPosterior(joints=(Joint(("0.bias",), columns=torch.ones(2, 3)),)),
            "expected 4 entries for 0.bias, got 3",
        ),
        (from_variances({"0.bias": torch.ones(4)}, {"0.bias": torch.ones(3)}), r"mean of shape \(4,\) for 0.bias"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(model, posterior, message):
    with pytest.raises(ValueError, match=message):
        posterior.bind(model)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: from_variances({"w": torch.tensor([1.0, -0.5])}), ValueError, "not negative, got -0.5"),
        (lambda: from_variances({"w": torch.tensor([1.0, torch.nan])}), ValueError, "finite numbers, got 1"),
        (lambda: from_variances({"w": torch.tensor([1, 2])}), TypeError, "floating-point tensor, got torch.int64"),
        (lambda: from_variances({"w": 0.1}), TypeError, "got float"),
        (lambda: from_variances({"w": torch.ones(2)}, {"w": torch.tensor([0.0, torch.inf])}), ValueError, "means"),
        (lambda: from_variances({"w": torch.ones(2)}, {"w": [0.0, 1.0]}), TypeError, "means.*got list"),
        (lambda: from_factors({"w": (torch.ones(2, 3), torch.eye(2))}), ValueError, r"B: expected a square .*\(2, 3\)"),
        (lambda: from_factors({"w": (torch.eye(2), -torch.eye(2))}), ValueError, "A: expected variances .* got -1"),
        (lambda: from_factors({"w": (torch.eye(2), torch.ones(2, 2).triu())}), ValueError, "A: expected a symmetric"),
        (lambda: from_covariance(["w"], torch.ones(2)), ValueError, r"expected a square matrix, got \(2,\)"),
        (lambda: from_covariance(["w"], -torch.eye(2)), ValueError, "not negative, got -1"),
        (lambda: from_covariance(["w"], torch.ones(2, 2).triu()), ValueError, "symmetric matrix, got .* by 1"),
        (lambda: from_covariance(["w"], torch.full((2, 2), torch.nan)), ValueError, "finite numbers, got 4"),
        (lambda: from_covariance("w", 2 - torch.eye(2)), ValueError, "expected a covariance, got .* eigenvalue below"),
        (lambda: from_factors({"w": (2 - torch.eye(2), torch.eye(2))}), ValueError, "B: expected a covariance"),
        (lambda: from_factors({"w": torch.eye(2)}), TypeError, r"factors\['w'\]: expected a pair \(B, A\), got Tensor"),
        (lambda: from_variances([torch.ones(2)]), TypeError, "variances: expected a mapping .*, got list"),
        (lambda: from_factors([torch.ones(2)]), TypeError, "factors: expected a mapping .*, got list"),
        (lambda: from_columns(torch.ones(2)), TypeError, "columns: expected a mapping .*, got Tensor"),
        (lambda: from_variances({"w": torch.ones(2)}, torch.ones(2)), TypeError, "means: expected a mapping"),
        (lambda: WeightPosterior({"w": torch.ones(2, 1)}), TypeError, "a law for w, such as Diagonal, got Tensor"),
        (lambda: WeightPosterior({"w": Diagonal(-torch.ones(2, 1))}), ValueError, "not negative for w, got -1"),
        (lambda: WeightPosterior({"w": Diagonal(torch.ones(2, 1) * torch.nan)}), ValueError, "for w, got nan"),
        (lambda: WeightPosterior({"w": LowRank(torch.ones(1, 2, 1), -torch.ones(2, 1))}), ValueError, "for w, got -1"),
        (lambda: WeightPosterior({"w": Kronecker(torch.eye(2), -torch.eye(1))}), ValueError, "for w, got -1"),
        (lambda: WeightPosterior({"w": Dense(-torch.ones(2, 1, 2, 1))}), ValueError, "for w, got -1"),
        (
            lambda: WeightPosterior(
                {"w": KroneckerLaplace(torch.eye(1), torch.ones(1), torch.eye(1), torch.ones(1), torch.tensor(-2.0))}
            ),
            ValueError,
            "not negative for w, got -1",
        ),
        (lambda: from_covariance(["w", "w"], torch.eye(2)), ValueError, "expected each parameter once, got w"),
        (lambda: from_columns({"a": torch.ones(2, 3), "b": torch.ones(3, 3)}), ValueError, r"got \[2, 3\]"),
        (lambda: from_columns({}), ValueError, "at least one"),
        (lambda: from_columns({"a": torch.ones(2, 3)}, {"b": torch.ones(3)}), ValueError, "names of columns"),
        (lambda: from_columns({"a": torch.ones(2, 3)}, {"a": -torch.ones(3)}), ValueError, "not negative"),
        (lambda: from_columns({"a": torch.full((2, 3), torch.nan)}), ValueError, "finite"),
        (
            lambda: from_columns(
                {"a": torch.ones(2, 3), "b": torch.ones(2, 1)}, {"a": torch.ones(1), "b": torch.ones(3)}
            ),
            ValueError,
            r"variances\['a'\]: expected shape \(3,\), as columns, got \(1,\)",
        ),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_parameter_is_uncertain_in_one_way():
    one, other = from_variances({"0.bias": torch.ones(4)}), from_covariance(["0.bias", "2.bias"], torch.eye(6))
    with pytest.raises(ValueError, match=r"each parameter once, got 0.bias in both"):
        one | other
    with pytest.raises(ValueError, match=r"each parameter once, got 0.bias"):
        WeightPosterior(one.laws, other.joints)


@pytest.mark.parametrize("posterior", [None, {"0.bias": torch.ones(4)}])
def test_what_is_no_posterior_is_refused(model, x, posterior):
    for call in (propagate, plan, linearised, sample, layer_contributions, check):
        with pytest.raises(TypeError, match=r"posterior: expected a WeightPosterior, .* got (dict|NoneType)"):
            call(model, posterior, x)
    with pytest.raises(TypeError, match="posterior: expected a WeightPosterior"):
        streamline(model, posterior)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        propagate(lambda x: x, from_variances({"0.bias": torch.ones(4)}), x)


def test_a_parameter_that_is_tied_has_one_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"got 1.weight \(1.weight is 0.weight\)"):
        from_variances({"1.weight": torch.ones(3, 3)}).bind(model)


def test_a_single_name_is_one_name(model, x):
    one, other = (from_covariance(names, full_covariance(4)) for names in ("0.bias", ["0.bias"]))
    torch.testing.assert_close(propagate(model, one, x).variance, propagate(model, other, x).variance)


@pytest.mark.parametrize("names", ["outside", "inside"])
@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compiled", "dp"])
def test_models_in_wrappers_are_what_is_inside(model, x, wrap, names):
    wrapped = wrap(model)
    variances = {"0.weight": torch.full((4, 3), 0.1).double(), "2.bias": torch.full((2,), 0.2).double()}
    plain = from_variances(variances)
    known = {name.split(".", 1)[1]: name for name, _ in wrapped.named_parameters()}
    given = plain if names == "inside" else from_variances({known[name]: v for name, v in variances.items()})
    for call in (propagate, linearised, sample):
        found, expected = (
            call(m, p, x, generator=torch.Generator().manual_seed(0)) for m, p in ((wrapped, given), (model, plain))
        )
        torch.testing.assert_close(found.mean, expected.mean)
        torch.testing.assert_close(found.variance, expected.variance)
    torch.testing.assert_close(streamline(wrapped, given)(x).variance, propagate(model, plain, x).variance)
    fitted = fit_laplace(wrapped, [(x, torch.zeros(len(x)).long())], parameters="2.*")
    assert fitted.names == ("2.weight", "2.bias")


# What becomes of it


def test_side_by_side(model, x):
    first = from_variances({"0.weight": torch.full((4, 3), 0.01).double()}, {"0.weight": torch.ones(4, 3).double()})
    second = from_factors({"2.weight": (0.1 * torch.eye(2).double(), 0.2 * torch.eye(4).double())})
    both = first | second
    assert both.names == ("0.weight", "2.weight")
    assert set(both.means) == {"0.weight"}
    variance = propagate(model, both, x, covariance="full").variance
    assert (variance > propagate(model, second, x, covariance="full").variance).all()


@pytest.mark.parametrize("form", ["diag", "blockdiag", "full"])
def test_scaled(model, x, form):
    bias = torch.rand(2, dtype=torch.float64)
    posterior = (
        from_variances({"2.bias": bias})
        | from_covariance(["0.weight", "0.bias"], full_covariance(16))
        | from_columns(
            {"2.weight": 0.1 * torch.randn(3, 2, 4).double()}, {"2.weight": 0.01 * torch.rand(2, 4).double()}
        )
    )
    options = {"covariance": form, "activations": "tangent"}
    whole = propagate(model, posterior, x, **options).variance
    few = propagate(model, posterior.scaled(3.0, ["2.bias"]), x, **options).variance
    torch.testing.assert_close(few - whole, (2 * bias).expand(5, 2))
    # Products of two weights' noise are of second order: they grow by the square.
    for names in (["0.weight", "0.bias"], ["2.weight"]):
        small = propagate(model, posterior.scaled(0.5, names), x, **options).variance
        assert (small < whole).all()
    alone = from_covariance(["0.weight", "0.bias"], full_covariance(16))
    once, twice = (
        propagate(model, p, x, **options).variance for p in (alone, alone.scaled(torch.tensor(2.0).double()))
    )
    torch.testing.assert_close(twice, 2 * once)


def test_what_cannot_be_scaled(model):
    posterior = from_covariance(["0.weight", "0.bias"], full_covariance(16))
    with pytest.raises(ValueError, match=r"expected all of 0.weight, 0.bias or none, got 0.bias"):
        posterior.scaled(2.0, ["0.bias"])
    with pytest.raises(ValueError, match="expected uncertain parameters, got nonsense"):
        posterior.scaled(2.0, ["nonsense"])
    for factor in (0.0, -1.0, float("nan"), torch.tensor(-1.0), torch.ones(2)):
        with pytest.raises(ValueError, match="factor: expected a positive number"):
            posterior.scaled(factor)


@pytest.mark.parametrize("form", ["diag", "blockdiag", "full", "lowrank"])
def test_means_are_the_posteriors(model, x, form):
    """Of uncertain weights and of certain ones, in layers that noise reaches and in those that it does not."""
    means = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    expected = functional_call(model, means, (x,)).detach()
    for name in NAMES:
        posterior = from_variances({name: torch.full_like(means[name], 1e-6)}, means)
        mean = propagate(model, posterior, x, covariance=form, activations="tangent").mean
        torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(propagate(model, WeightPosterior(means=means), x, covariance=form).mean, expected)
    assert all((model.get_parameter(name) != mean).any() for name, mean in means.items())


@pytest.mark.parametrize("kind", ["covariance", "columns"])
@pytest.mark.parametrize("layer", ["0", "2"])
def test_weight_and_bias_together_are_the_linearised_network(model, x, kind, layer):
    names = [f"{layer}.weight", f"{layer}.bias"]
    shapes = {name: model.get_parameter(name).shape for name in names}
    size = sum(shape.numel() for shape in shapes.values())
    if kind == "covariance":
        covariance = full_covariance(size)
        posterior = from_covariance(names, covariance)
    else:
        columns = {name: 0.1 * torch.randn(3, *shape).double() for name, shape in shapes.items()}
        variances = {name: 0.01 * torch.rand(shape).double() for name, shape in shapes.items()}
        flat = torch.cat([value.flatten(1) for value in columns.values()], 1)
        covariance = flat.mT @ flat + torch.diag(torch.cat([value.flatten() for value in variances.values()]))
        posterior = from_columns(columns, variances)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = propagate(model, posterior, x, covariance="full", activations="tangent").covariance.to_dense()
    torch.testing.assert_close(found, glm(model, x, names, covariance))


def test_the_order_of_names_is_the_callers(model, x):
    covariance = full_covariance(16)
    order = torch.cat([torch.arange(12, 16), torch.arange(12)])
    one = from_covariance(["0.weight", "0.bias"], covariance)
    other = from_covariance(["0.bias", "0.weight"], covariance[order][:, order])
    first, second = (propagate(model, p, x, covariance="full").covariance.to_dense() for p in (one, other))
    torch.testing.assert_close(first, second)


def test_exact_columns_keep_the_covariance_between_layers(model, x):
    columns = {name: 0.05 * torch.randn(3, *model.get_parameter(name).shape).double() for name in NAMES}
    posterior = from_columns(columns)
    flat = torch.cat([value.flatten(1) for value in columns.values()], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = Walk(model, posterior.bind(model), Options(form="lowrank", activations="tangent", products=False), 1)(
            model, GaussianState(x)
        )
    found = state.covariance.operator().to_dense()
    torch.testing.assert_close(found, glm(model, x, NAMES, flat.mT @ flat))


@pytest.mark.parametrize("form", ["diag", "blockdiag", "full"])
def test_other_forms_say_once_that_they_leave_it_out(model, x, form):
    posterior = from_covariance(["0.weight", "2.weight"], full_covariance(20))
    with pytest.warns(UserWarning, match="covariances between layers are left out in the form") as caught:
        propagate(model, posterior, x, covariance=form, chunk_size=2)
    assert len(caught) == 1


@pytest.mark.parametrize("kind", ["variances", "columns", "covariance"])
@pytest.mark.parametrize("form", ["diag", "full", "lowrank"])
def test_weights_that_are_stored_the_other_way_round(kind, form):
    """Rows that are inputs, as in GPT-2: with a bias, also in a joint law."""
    straight, turned = nn.Linear(3, 2).double(), nn.Module()
    turned.weight = nn.Parameter(straight.weight.detach().mT.clone())
    turned.bias = straight.bias
    x = torch.randn(4, 3, dtype=torch.float64)
    scale = torch.rand(2, 3).double(), torch.rand(2).double()
    columns = torch.randn(2, 2, 3).double(), torch.randn(2, 2).double()
    order = torch.cat([torch.arange(6).view(2, 3).mT.flatten(), torch.arange(6, 8)])
    covariance = full_covariance(8)

    def make(transposed):
        weight, column = (scale[0].mT, columns[0].mT) if transposed else (scale[0], columns[0])
        if kind == "variances":
            return from_variances({"weight": weight, "bias": scale[1]})
        if kind == "columns":
            return from_columns({"weight": column, "bias": columns[1]}, {"weight": weight, "bias": scale[1]})
        return from_covariance(["weight", "bias"], covariance[order][:, order] if transposed else covariance)

    found = []
    for model, transposed in ((straight, False), (turned, True)):
        walk = Walk(model, make(transposed).bind(model), Options(form=form), 8, torch.Generator().manual_seed(0))
        found.append(walk.linear(GaussianState(x), model.weight, model.bias, transposed=transposed))
    torch.testing.assert_close(found[0].mean, found[1].mean)
    torch.testing.assert_close(found[0].variance, found[1].variance)
    if form == "full":
        torch.testing.assert_close(found[0].covariance.entries, found[1].covariance.entries)


def test_a_law_of_low_rank_may_stand_alone(model, x):
    """It has draws like any other, beside laws without columns."""
    entries = torch.rand(4, 3).double()
    laws = {"0.weight": LowRank(0.1 * torch.randn(2, 4, 3).double(), entries), "2.weight": Diagonal(torch.rand(2, 4))}
    posterior = WeightPosterior(laws)
    full = propagate(model, posterior, x, covariance="full").variance
    generator = torch.Generator().manual_seed(0)
    found = propagate(model, posterior, x, covariance="lowrank", num_tangents=4000, generator=generator).variance
    torch.testing.assert_close(found, full, rtol=0.15, atol=0.0)


def test_draws_of_joint_laws_have_their_covariance(model):
    covariance = full_covariance(16)
    bound = from_covariance(["0.weight", "0.bias"], covariance).bind(model)
    like = torch.zeros((), dtype=torch.float64)
    drawn, exact = bound.draw(20_000, torch.Generator().manual_seed(0), like)
    assert not exact
    flat = torch.cat([drawn[name].dense().flatten(1) for name in ("0.weight", "0.bias")], 1)
    scale = covariance.diagonal().sqrt()
    assert ((flat.mT @ flat - covariance) / torch.outer(scale, scale)).abs().max() < 0.05


def test_parameters_of_any_shape(model):
    """A number, and what has more than two dimensions."""
    module = nn.Module()
    module.gain, module.kernel = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(2, 3, 4))
    posterior = from_variances({"gain": torch.tensor(0.5), "kernel": torch.rand(2, 3, 4)})
    bound = posterior.bind(module)
    assert [law.shape for law in posterior.laws.values()] == [(1, 1), (2, 12)]
    assert bound.uncertain(module) == ("gain", "kernel")
    joint = from_columns({"gain": torch.tensor([0.1, 0.2]), "kernel": torch.ones(2, 2, 3, 4)})
    ((law, part),) = joint.bind(module).law(module.gain, None, module.gain)
    assert part == "weight"
    torch.testing.assert_close(law.marginals(), torch.tensor([[0.05]]))


def test_the_model_stays_as_it_was(model, x):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    propagate(model, from_covariance(["0.weight", "0.bias"], full_covariance(16)), x)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_dense_laws_of_one_parameter_stand_alone(model, x):
    dense = full_covariance(12).view(4, 3, 4, 3)
    one = WeightPosterior({"0.weight": Dense(dense)})
    other = from_covariance(["0.weight"], dense.reshape(12, 12))
    first, second = (propagate(model, p, x, covariance="full").covariance.to_dense() for p in (one, other))
    torch.testing.assert_close(first, second)

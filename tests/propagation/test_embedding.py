"""Tables and other parameters that act entry by entry: equal entries have one noise."""

import pytest
import torch
from torch import nn

from gpseq.propagation import from_columns, from_covariance, from_factors, from_variances, propagate, register
from gpseq.propagation.entries import Entries, entry_noise
from gpseq.propagation.laws import Diagonal, KroneckerLaplace
from gpseq.propagation.moments import FORMS, GaussianState
from gpseq.propagation.pooling import mean_tokens
from gpseq.propagation.posteriors import WeightPosterior
from gpseq.propagation.walk import Options, Walk
from tests.oracles_propagation import enumerate_moments
from tests.oracles_states import dense, keep, random_state, seeded, walk_of, weight_jacobian

IDS = torch.tensor([[0, 2, 2], [4, 1, 4]])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def table(**options):
    made = nn.Embedding(5, 3, **options).double()
    nn.init.normal_(made.weight, generator=seeded(7))
    return made


def orthogonal(size, seed):
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def posteriors():
    """Name: a posterior of the table, and its covariance."""
    variances = normal(5, 3).square()
    outputs, inputs = normal(5, 5, seed=1), normal(3, 3, seed=2)
    columns, own = normal(2, 5, 3, seed=3), normal(5, 3, seed=4).square()
    root = normal(15, 15, seed=5)
    laplace = KroneckerLaplace(
        orthogonal(5, 6), normal(5, seed=7).square(), orthogonal(3, 8), normal(3, seed=9).square(), torch.tensor(0.7)
    )
    precision = torch.kron(
        laplace.output_vectors * laplace.output_values @ laplace.output_vectors.mT,
        laplace.input_vectors * laplace.input_values @ laplace.input_vectors.mT,
    )
    return {
        "variances": (from_variances({"weight": variances}), variances.flatten().diag()),
        "factors": (
            from_factors({"weight": (outputs @ outputs.mT, inputs @ inputs.mT)}),
            torch.kron(outputs @ outputs.mT, inputs @ inputs.mT),
        ),
        "columns": (
            from_columns({"weight": columns}, {"weight": own}),
            columns.flatten(1).mT @ columns.flatten(1) + own.flatten().diag(),
        ),
        "covariance": (from_covariance(["weight"], root @ root.mT), root @ root.mT),
        "laplace": (
            WeightPosterior({"weight": laplace}),
            torch.linalg.inv(precision + 0.7 * torch.eye(15, dtype=torch.float64)),
        ),
    }


LAWS = list(posteriors())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("law", LAWS)
def test_equal_ids_share_their_noise(law, form):
    module, (posterior, covariance) = table(), posteriors()[law]
    found = walk_of(module, form, posterior)(module, GaussianState(IDS))
    torch.testing.assert_close(found.mean, module(IDS))
    jacobians = weight_jacobian(module, ["weight"], IDS)
    expected = jacobians @ covariance @ jacobians.mT
    torch.testing.assert_close(found.variance.flatten(1), expected.diagonal(dim1=-2, dim2=-1), rtol=1e-6, atol=1e-6)
    if form != "lowrank":
        torch.testing.assert_close(dense(found), keep(form, expected, 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("law", LAWS)
def test_draws_of_rows_have_their_covariance(law):
    module, (posterior, covariance) = table(), posteriors()[law]
    found = walk_of(module, "lowrank", posterior, num_draws=20_000)(module, GaussianState(IDS))
    jacobians = weight_jacobian(module, ["weight"], IDS)
    expected = jacobians @ covariance @ jacobians.mT
    assert (dense(found) - expected).norm() / expected.norm() < 0.03
    # and equal ids have the same columns
    torch.testing.assert_close(found.covariance.columns[:, 0, 1], found.covariance.columns[:, 0, 2])


def test_columns_are_exact_in_a_low_rank():
    module, columns = table(), normal(2, 5, 3, seed=3)
    found = walk_of(module, "lowrank", from_columns({"weight": columns}))(module, GaussianState(IDS))
    moved = weight_jacobian(module, ["weight"], IDS) @ columns.flatten(1).mT
    torch.testing.assert_close(dense(found), moved @ moved.mT)


@pytest.mark.parametrize("form", FORMS)
def test_padding_is_a_row_like_all_others(form):
    module = table(padding_idx=2)
    variances = torch.ones(5, 3, dtype=torch.float64)
    variances[2] = 0.0
    found = walk_of(module, form, from_variances({"weight": variances}))(module, GaussianState(IDS))
    torch.testing.assert_close(found.mean, module(IDS))
    torch.testing.assert_close(found.variance, (IDS != 2).double().unsqueeze(-1).expand(2, 3, 3))


@pytest.mark.parametrize("shape", [(2,), (2, 2, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_ids_of_any_shape(form, shape):
    module, (posterior, covariance) = table(), posteriors()["factors"]
    ids = torch.randint(5, shape, generator=seeded())
    found = walk_of(module, form, posterior)(module, GaussianState(ids))
    jacobians = weight_jacobian(module, ["weight"], ids)
    expected = (jacobians @ covariance @ jacobians.mT).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found.variance, expected.view(*shape, 3))


def test_tables_that_have_no_rule():
    module = table()
    with pytest.raises(
        TypeError, match=r"x: expected ids for the model itself, which are integers, got torch\.float32"
    ):
        walk_of(module, "diag", posteriors()["variances"][0])(module, GaussianState(torch.ones(2, 3)))
    module = table(max_norm=1.0)
    with pytest.raises(NotImplementedError, match=r"expected a table that stays as it is, got max_norm=1\.0"):
        walk_of(module, "diag", posteriors()["variances"][0])(module, GaussianState(IDS))


class Sentence(nn.Module):
    """Tokens and their positions, averaged."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(3, 2)
        self.positions = nn.Parameter(torch.zeros(1, 3, 2))
        self.head = nn.Linear(2, 1, bias=False)

    def forward(self, ids):
        return self.head((self.words(ids) + self.positions[:, : ids.shape[1]]).mean(1))


@register(Sentence)
def _sentence(module, state, walk):
    words = walk(module.words, state)
    return walk(module.head, mean_tokens(walk.add_parameter(words, module.positions, (0, slice(state.mean.shape[1])))))


def test_tables_of_words_and_positions_are_exact():
    model, ids = Sentence().double().eval(), torch.tensor([[0, 2], [1, 1]])
    for number, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, generator=seeded(number))
    variances = {name: normal(*value.shape, seed=4).square() for name, value in model.named_parameters()}
    deviations = {name: value.sqrt() for name, value in variances.items()}
    deviations["positions"] = deviations["positions"].clone()
    variances["positions"][:, 2:] = deviations["positions"][:, 2:] = 0.0  # which nobody looks at
    names = ["words.weight", "head.weight"]
    used = {name: deviations[name] for name in names}
    mean, covariance = enumerate_moments(model, used, ids)
    some = propagate(model, from_variances({name: variances[name] for name in names}), ids, covariance="full")
    torch.testing.assert_close(some.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(some.covariance.to_dense(), covariance, rtol=1e-12, atol=1e-12)
    # positions: linear beside them, and independent
    head, count = model.head.weight[0].detach(), 2
    positions = variances["positions"][0, :2]
    second = (head.square() + variances["head.weight"][0]) @ positions.sum(0) / count**2
    whole = propagate(model, from_variances(variances), ids, covariance="full")
    torch.testing.assert_close(whole.mean, mean)
    torch.testing.assert_close(whole.covariance.to_dense(), covariance + second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("size", "index", "shape"),
    [
        ((3, 4), None, None),
        ((1, 3, 4), None, None),
        ((5, 4), slice(1, 4), None),
        ((4,), None, None),
        ((3,), None, (3, 1)),
        ((1, 1, 4), None, None),
    ],
)
def test_a_parameter_that_is_added(size, index, shape, form):
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(normal(*size, seed=1)))
    variances = normal(*size, seed=2).square()
    state = random_state(form, 2, (3, 4), seeded(), rank=8)
    walk = walk_of(module, form, from_variances({"weight": variances}))
    found = walk.add_parameter(state, module.weight, index, shape)
    chosen = module.weight if index is None else module.weight[index]
    chosen = chosen if shape is None else chosen.reshape(shape)
    torch.testing.assert_close(found.mean, state.mean + chosen)
    places = torch.arange(variances.numel()).view(size)
    places = places if index is None else places[index]
    places = (places if shape is None else places.reshape(shape)).expand(1, 3, 4).flatten()
    covariance = variances.flatten().diag()[places][:, places]
    if form == "lowrank":
        noise = found.covariance.columns - state.covariance.columns
        torch.testing.assert_close(noise.square().sum(0).flatten(1), covariance.diagonal().expand(2, 12))
    else:
        torch.testing.assert_close(dense(found), dense(state) + keep(form, covariance, 4))
    assert not walk.unused()


@pytest.mark.parametrize("form", FORMS)
def test_entries_as_a_state_of_their_own(form):
    module = nn.Module()
    module.register_parameter("token", nn.Parameter(normal(1, 1, 4)))
    walk = walk_of(module, form, from_variances({"token": torch.full((1, 1, 4), 0.5)}))
    found = walk.entries(module.token, torch.arange(4).expand(3, 1, 4))
    torch.testing.assert_close(found.mean, module.token.expand(3, 1, 4))
    torch.testing.assert_close(found.variance, torch.full((3, 1, 4), 0.5, dtype=torch.float64))


def test_tied_tables_need_a_low_rank():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = table()
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(self.words(ids))

    model, columns = Tied(), normal(2, 5, 3, seed=3)
    posterior = from_columns({"words.weight": columns})
    for form in ("diag", "blockdiag", "full"):
        walk = walk_of(model, form, posterior)
        with pytest.raises(NotImplementedError, match=r"words.weight is uncertain and used more than once"):
            walk(model.head, walk(model.words, GaussianState(IDS)))
    walk = walk_of(model, "lowrank", posterior, products=False)
    found = walk(model.head, walk(model.words, GaussianState(IDS)))
    moved = weight_jacobian(model, ["words.weight"], IDS) @ columns.flatten(1).mT
    torch.testing.assert_close(dense(found), moved @ moved.mT)


def test_a_low_rank_needs_its_draws():
    with pytest.raises(ValueError, match="columns: expected draws of the noise for the form 'lowrank', got none"):
        entry_noise("lowrank", [(Diagonal(torch.ones(2, 1)), "bias")], bias=Entries(torch.tensor([[0, 1]])))


def test_dtypes_agree(dtype):
    module = table().to(dtype)
    posterior, covariance = posteriors()["factors"]
    found = walk_of(module, "full", posterior)(module, GaussianState(IDS))
    assert found.mean.dtype == dense(found).dtype == dtype
    jacobians = weight_jacobian(table(), ["weight"], IDS)
    torch.testing.assert_close(dense(found).double(), jacobians @ covariance @ jacobians.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(form):
    variances = {"weight": normal(5, 3).square().to("cuda")}
    module = table().to("cuda")
    bound = from_variances(variances).bind(module)
    generator = torch.Generator("cuda").manual_seed(0)
    found = Walk(module, bound, Options(form=form), 8, generator)(module, GaussianState(IDS.to("cuda")))
    assert found.mean.device.type == "cuda"
    torch.testing.assert_close(found.variance.cpu(), variances["weight"].cpu()[IDS])

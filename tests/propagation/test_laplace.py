"""Laplace approximations against the generalised Gauss-Newton matrix, written out with Jacobians of all examples."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpseq.propagation import Curvature, fit_curvature, fit_laplace, optimise_prior_precision, propagate
from gpseq.propagation.curvature import Factors


def jacobians(model, inputs, names):
    """d outputs / d parameters, ``(B, E, n)`` by names."""
    weights = {name: p.detach() for name, p in model.named_parameters() if name in names}
    with sdpa_kernel(SDPBackend.MATH):
        found = jacrev(lambda w: functional_call(model, w, inputs).flatten(1))(weights)
    return {name: found[name].flatten(2) for name in names}


def hessians(outputs, likelihood, noise=1.0):
    """Of the negative log likelihood in the outputs, ``(B, E, E)``; none between tokens."""
    if likelihood == "regression":
        return torch.eye(outputs[0].numel(), dtype=outputs.dtype) / noise
    probs = outputs.softmax(-1) if outputs.shape[-1] > 1 else outputs.sigmoid()
    each = torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)
    if outputs.dim() == 2:
        return each
    return torch.stack([torch.block_diag(*example) for example in each])


def dense(model, inputs, likelihood, names=None, noise=1.0):
    """Blocks of the Gauss-Newton matrix, ``(n, n)`` by names."""
    model = model.eval()
    names = [name for name, _ in model.named_parameters()] if names is None else names
    hessian = hessians(model(*inputs).detach(), likelihood, noise)
    return {name: (j.mT @ hessian @ j).sum(0) for name, j in jacobians(model, inputs, names).items()}


def check_diagonals(curvature, blocks):
    for name, block in blocks.items():
        found = curvature.blocks[name]
        torch.testing.assert_close(found.flatten(), block.diagonal())


def matrix(factors):
    """The matrix that Kronecker factors stand for."""
    b = (factors.output_vectors * factors.output_values) @ factors.output_vectors.mT
    a = (factors.input_vectors * factors.input_values) @ factors.input_vectors.mT
    return torch.kron(b, a)


class Pooled(nn.Module):
    """Tokens of a table, normed, mixed and averaged."""

    def __init__(self):
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.norm(self.table(ids)).tanh().mean(1))


class Tokens(nn.Module):
    """One output for each token."""

    def __init__(self, width=3, classes=2):
        super().__init__()
        self.layer = nn.Linear(width, classes)

    def forward(self, x):
        return self.layer(x)


class Careful(nn.Module):
    """Looks at values, which it cannot do for many examples at a time under vmap."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        if not x.isfinite().all():
            raise ValueError("x: expected finite numbers.")
        return self.layer(x).tanh()


def mlp(inputs=3, outputs=2, hidden=5):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(12, 2))


CASES = {
    "mlp": (mlp, lambda: torch.randn(6, 3)),
    "one logit": (lambda: mlp(outputs=1), lambda: torch.randn(6, 3)),
    "embedding and norm": (Pooled, lambda: torch.randint(7, (6, 5))),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(12, 2)),
        lambda: torch.randn(6, 2, 3, 3),
    ),
    "tokens": (Tokens, lambda: torch.randn(4, 3, 3)),
    "encoder": (encoder, lambda: torch.randn(4, 3, 4)),
    "looks at values": (Careful, lambda: torch.randn(6, 3)),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        lambda: torch.randn(6, 3),
    ),
}


def case(name):
    model, x = CASES[name]
    model, x = model().double(), x()
    return model, x.double() if x.is_floating_point() else x


# The diagonal


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("name", CASES)
def test_the_diagonal_is_exact(name, likelihood):
    model, x = case(name)
    curvature = fit_curvature(model, [(x[:4], None), x[4:]] if len(x) > 4 else [x], likelihood, noise=0.5)
    assert curvature.num_data == len(x)
    check_diagonals(curvature, dense(model, (x,), likelihood, noise=0.5))


@pytest.mark.parametrize("structure", ["diag", "kron"])
@pytest.mark.parametrize("name", ["mlp", "encoder", "looks at values"])
def test_totals_hold_no_graph(name, structure):
    model, x = case(name)
    for block in fit_curvature(model, [x, x], structure=structure).blocks.values():
        for value in vars(block).values() if isinstance(block, Factors) else [block]:
            assert value.grad_fn is None and not value.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_weights_in_half_precision_are_refused(half):
    """As they are where the posterior would be used."""
    model = mlp().to(half)
    for fit in (fit_curvature, fit_laplace):
        with pytest.raises(TypeError, match=rf"model: expected weights in float32 or float64, got {half}"):
            fit(model, [torch.randn(4, 3).to(half)])


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_the_size_of_chunks_changes_nothing(chunk_size, monkeypatch):
    model, x = case("mlp")
    blocks = dense(model, (x,), "classification")
    check_diagonals(fit_curvature(model, [x], chunk_size=chunk_size), blocks)
    monkeypatch.setattr("gpseq.propagation.gauss_newton.BUDGET", 1)
    check_diagonals(fit_curvature(model, [x]), blocks)


@pytest.mark.parametrize("structure", ["diag", "kron"])
@pytest.mark.parametrize(
    ("name", "likelihood"), [("mlp", "classification"), ("mlp", "regression"), ("tokens", "classification")]
)
def test_labels_that_are_drawn_give_the_same_on_average(name, likelihood, structure):
    model, x = case(name)
    exact = fit_curvature(model, [x], likelihood, structure)
    generator = torch.Generator().manual_seed(0)
    drawn = fit_curvature(model, [x], likelihood, structure, num_samples=3000, generator=generator)
    for key, block in exact.blocks.items():
        if isinstance(block, Factors):
            found, expected = matrix(drawn.blocks[key]), matrix(block)
        else:
            found, expected = drawn.blocks[key], block
        assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_many_outputs_are_drawn_and_repeat_with_their_seed():
    model, x = mlp(outputs=40), torch.randn(6, 3)
    one, two = (fit_curvature(model, [x], generator=torch.Generator().manual_seed(1)) for _ in range(2))
    exact = fit_curvature(model, [x], num_samples=None)
    for name in one.names:
        assert torch.equal(one.blocks[name], two.blocks[name])
        assert not torch.allclose(one.blocks[name], exact.blocks[name])
    check_diagonals(exact, dense(model, (x,), "classification"))


# Kronecker factors


@pytest.mark.parametrize("noise", [1.0, 0.3])
def test_linear_regression_is_exact(noise):
    model, x = nn.Linear(3, 2).double(), torch.randn(20, 3, dtype=torch.float64)
    posterior = fit_laplace(
        model, [(x[:8], None), (x[8:], None)], "regression", "kron", prior_precision=0.7, noise=noise
    )
    precision = torch.kron(torch.eye(2, dtype=x.dtype), x.mT @ x / noise) + 0.7 * torch.eye(6, dtype=x.dtype)
    eye = torch.eye(3, dtype=x.dtype).unsqueeze(0)
    found = posterior.laws["weight"].tokens(eye)[0].permute(1, 0, 3, 2).reshape(6, 6)
    torch.testing.assert_close(found, precision.inverse(), rtol=0, atol=1e-12)
    expected = 1 / (20 / noise + 0.7) * torch.eye(2, dtype=x.dtype)
    torch.testing.assert_close(posterior.laws["bias"].tokens(eye[:, :1, :1])[0].squeeze(), expected)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_factors_are_their_definition(likelihood):
    model, x = case("mlp")
    found = fit_curvature(model, [(x[:2], None), (x[2:], None)], likelihood, "kron", noise=0.5)
    blocks = dense(model, (x,), likelihood, ["0.bias", "2.bias"], noise=0.5)
    inputs = {"0": x, "2": model[1](model[0](x)).detach()}
    for layer, a in inputs.items():
        # A gradient in a bias is that in the layer's outputs: its block is B, exactly.
        torch.testing.assert_close(matrix(found.blocks[f"{layer}.bias"]), blocks[f"{layer}.bias"])
        expected = torch.kron(blocks[f"{layer}.bias"], a.mT @ a / len(a))
        torch.testing.assert_close(matrix(found.blocks[f"{layer}.weight"]), expected)


def test_each_token_is_an_example():
    """``expand`` is exact where tokens are independent, and tokens of ignored labels do not count."""
    model, x = Tokens().double(), torch.randn(4, 5, 3, dtype=torch.float64)
    labels = torch.zeros(4, 5, dtype=torch.long)
    labels[1:, 3:] = -100
    (block,) = dense(model, (x,), "regression", ["layer.weight"]).values()
    found = fit_curvature(model, [x], "regression", "kron")
    torch.testing.assert_close(matrix(found.blocks["layer.weight"]), block)
    flat = x[labels == 0].unsqueeze(1)
    kept = fit_curvature(model, [flat], structure="kron", num_samples=None)
    found = fit_curvature(model, [(x, labels)], structure="kron", num_samples=None)
    for name in kept.names:
        torch.testing.assert_close(matrix(found.blocks[name]), matrix(kept.blocks[name]))
    check_diagonals(
        fit_curvature(model, [{"x": x, "labels": labels}], num_samples=None), dense(model, (flat,), "classification")
    )


def test_a_mean_over_tokens_is_exact_where_positions_are_summed_first():
    class Mean(Tokens):
        def forward(self, x):
            return super().forward(x).mean(1)

    model, x = Mean().double(), torch.randn(6, 5, 3, dtype=torch.float64)
    blocks = dense(model, (x,), "regression")
    found = fit_curvature(model, [x[:2], x[2:]], "regression", "kron", sharing="reduce")
    for name, block in blocks.items():
        torch.testing.assert_close(matrix(found.blocks[name]), block)


def test_tokens_that_nothing_depends_on_do_not_count():
    class First(Tokens):
        def forward(self, x):
            return super().forward(x)[:, 0]

    model, x = First().double(), torch.randn(6, 5, 3, dtype=torch.float64)
    (block,) = dense(model, (x,), "regression", ["layer.weight"]).values()
    found = fit_curvature(model, [x], "regression", "kron")
    torch.testing.assert_close(matrix(found.blocks["layer.weight"]), block)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (0, 1)}])
def test_a_convolution_is_a_matrix_of_patches(options):
    conv = nn.Conv2d(2, 3, 2, **options).double()
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    patches = nn.functional.unfold(x, 2, **options).mT
    flat = Tokens(8, 3).double()
    flat.layer.weight.data, flat.layer.bias.data = conv.weight.data.flatten(1), conv.bias.data
    model = nn.Sequential(conv, nn.Flatten(2))  # (B, 3, L): targets of a regression in any order
    for sharing in ("expand", "reduce"):
        found = fit_curvature(model, [x], "regression", "kron", sharing=sharing)
        expected = fit_curvature(flat, [patches], "regression", "kron", sharing=sharing)
        torch.testing.assert_close(matrix(found.blocks["0.weight"]), matrix(expected.blocks["layer.weight"]))
        torch.testing.assert_close(matrix(found.blocks["0.bias"]), matrix(expected.blocks["layer.bias"]))


def test_rows_of_conv1d_are_inputs():
    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

        def forward(self, x):
            return x @ self.weight + self.bias

    turned, straight = Conv1D(2, 3).double(), nn.Linear(3, 2).double()
    straight.weight.data, straight.bias.data = turned.weight.data.mT, turned.bias.data
    x = torch.randn(7, 3, dtype=torch.float64)
    one, other = (fit_laplace(model, [x], structure="kron") for model in (turned, straight))
    assert one.laws["weight"].shape == (3, 2)
    torch.testing.assert_close(one.laws["weight"].marginals(), other.laws["weight"].marginals().mT)
    torch.testing.assert_close(one.laws["bias"].marginals(), other.laws["bias"].marginals())


def test_what_no_layer_is_called_for_has_its_diagonal():
    """Attention takes its weights itself, norms are no matrices, and a weight in two places has no block of its own."""
    model, x = case("encoder")
    found = fit_curvature(model, [x], structure="kron", num_samples=None)
    kinds = {name: isinstance(block, Factors) for name, block in found.blocks.items()}
    assert {name for name, kind in kinds.items() if not kind} == {
        name for name in kinds if "self_attn" in name or "norm" in name
    }
    diagonal = {name: block for name, block in dense(model, (x,), "classification").items() if not kinds[name]}
    check_diagonals(found, diagonal)
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    tied[2].weight = tied[0].weight
    x = torch.randn(5, 3, dtype=torch.float64)
    found = fit_curvature(tied, [x], structure="kron")
    assert found.names == ("0.weight",)
    check_diagonals(found, dense(tied, (x,), "classification"))


def test_a_layer_that_is_called_twice_has_the_positions_of_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, y):
            return torch.stack([self.layer(x), self.layer(y)], 1)

    model, x = Twice().double(), torch.randn(2, 5, 3, dtype=torch.float64)
    found = fit_curvature(model, [{"x": x[0], "y": x[1]}], "regression", "kron")
    (block,) = dense(model, (x[0], x[1]), "regression", ["layer.weight"]).values()
    torch.testing.assert_close(matrix(found.blocks["layer.weight"]), block)


# Any model, as it is


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    return BertForSequenceClassification(BertConfig(vocab_size=11, max_position_embeddings=8, num_labels=3, **sizes))


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_padding_changes_nothing(structure):
    model, ids = bert(), torch.randint(1, 11, (4, 6))
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(4).long()}
    longer = {**batch, "input_ids": torch.where(mask.bool(), ids, 3)}
    shorter = {name: batch[name][:, :4] for name in ("input_ids", "attention_mask")}
    wanted = ["bert.encoder.*", "bert.pooler.*", "classifier.*"]
    one, *others = (fit_laplace(model, [x], structure=structure, parameters=wanted) for x in (batch, longer, shorter))
    for other in others:
        for name in one.names:
            torch.testing.assert_close(one.laws[name].marginals(), other.laws[name].marginals(), rtol=1e-3, atol=1e-5)


def test_gpt2_has_factors_of_its_matrices():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=6, bos_token_id=0, eos_token_id=0)
    model, ids = GPT2LMHeadModel(config), torch.randint(9, (3, 5))
    found = fit_curvature(model, [{"input_ids": ids, "labels": ids}], structure="kron", num_samples=2)
    kinds = {name: isinstance(block, Factors) for name, block in found.blocks.items()}
    assert all(kind == ("attn" in name or "mlp" in name) for name, kind in kinds.items())
    posterior = found.posterior()
    assert posterior.laws["transformer.h.0.attn.c_attn.weight"].shape == (8, 24)
    posterior.bind(model)


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_activations_in_place_change_nothing(structure):
    one, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), torch.randn(6, 3).double()
    other = nn.Sequential(one[0], nn.ReLU(inplace=True), one[2])
    first, second = (fit_laplace(model, [x], structure=structure) for model in (one, other))
    for name in first.names:
        torch.testing.assert_close(first.laws[name].marginals(), second.laws[name].marginals())


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_the_model_is_left_as_it_was(structure):
    model = encoder()
    model[2].eval()
    model[2].weight.requires_grad_(False)
    model[2].bias.grad = torch.ones(2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    for loader in ([(torch.randn(4, 3, 4), torch.zeros(4).long())], [torch.randn(4, 3, 5)]):
        if loader[0][0].shape[-1] == 4:
            fit_laplace(model, loader, structure=structure)
        else:
            with pytest.raises((RuntimeError, AssertionError)):
                fit_laplace(model, loader, structure=structure)
        assert [module.training for module in model.modules()] == modes
        assert torch.backends.mha.get_fastpath_enabled() == fast
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"2.weight"}
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {"2.bias"}
        assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_frozen_models_and_no_grad(structure):
    model, x = case("mlp")
    expected = fit_laplace(model, [x], structure=structure)
    model.requires_grad_(False)
    with torch.no_grad():
        found = fit_laplace(model, [x], structure=structure, parameters="*")
    for name in expected.names:
        torch.testing.assert_close(found.laws[name].marginals(), expected.laws[name].marginals())
        assert not found.laws[name].marginals().requires_grad
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        fit_laplace(model, [x])


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_the_inference_mode_changes_nothing(structure):
    model = mlp()
    x = torch.randn(6, 3)
    expected = fit_laplace(model, [x], structure=structure)
    with torch.inference_mode():
        found = (
            fit_laplace(model, [x, torch.ones(0, 3)], structure=structure),
            fit_laplace(model, [x + 0], structure=structure),
        )
    for posterior in found:
        for name, law in expected.laws.items():
            torch.testing.assert_close(posterior.laws[name].marginals(), law.marginals())


def test_names_and_patterns():
    model, x = case("encoder")
    assert fit_laplace(model, [x], parameters="2.*").names == ("2.weight", "2.bias")
    names = fit_laplace(model, [x], parameters=["2.bias", "*norm1*"]).names
    assert names == ("0.layers.0.norm1.weight", "0.layers.0.norm1.bias", "2.bias")
    model[2].bias.requires_grad_(False)
    assert "2.bias" not in fit_laplace(model, [x]).names
    for wanted in ("nonsense", ["2.bias", "nonsense"], []):
        with pytest.raises(ValueError, match="expected names or patterns of parameters"):
            fit_laplace(model, [x], parameters=wanted)


def test_batches_of_any_kind():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, values, shift=0.0, flag=True):
            return {"logits": self.inner(values + shift) if flag else None, "hidden": values}

    model, x = Named(), torch.randn(6, 3)
    labels = torch.zeros(6, dtype=torch.long)
    expected = fit_laplace(model.inner, [(x, labels)])
    batch = {"values": x, "labels": labels, "flag": True}
    for loader in ([batch], [(batch, labels)], iter([batch]), [{"values": x - 1, "shift": torch.ones(6, 1)}]):
        found = fit_laplace(model, loader)
        for name in expected.names:
            torch.testing.assert_close(found.laws[f"inner.{name}"].marginals(), expected.laws[name].marginals())
    found = fit_laplace(model.inner, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), 4))
    for name in expected.names:
        torch.testing.assert_close(found.laws[name].marginals(), expected.laws[name].marginals())


def test_dtypes(dtype):
    model, x = mlp().to(dtype), torch.randn(6, 3, dtype=dtype)
    for structure in ("diag", "kron"):
        posterior = fit_laplace(model, [x], structure=structure)
        assert all(law.marginals().dtype == dtype for law in posterior.laws.values())
        assert propagate(model.eval(), posterior, x).variance.dtype == dtype


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"likelihood": "poisson"},
            ValueError,
            "likelihood: expected one of classification, regression, got 'poisson'",
        ),
        ({"structure": "full"}, ValueError, "structure: expected one of diag, kron, got 'full'"),
        ({"sharing": "none"}, ValueError, "sharing: expected one of expand, reduce"),
        ({"prior_precision": 0.0}, ValueError, "prior_precision: expected a positive number"),
        ({"prior_precision": {"0.*": 1.0}}, ValueError, r"prior_precision: expected one for 2.weight"),
        ({"prior_precision": {"*": 1.0, "nonsense": 1.0}}, ValueError, "prior_precision: .* got nonsense"),
        ({"noise": -1.0}, ValueError, "noise: expected a positive variance"),
        ({"num_samples": 0}, ValueError, "num_samples: expected at least 1, got 0"),
        ({"num_samples": "few"}, TypeError, "num_samples: expected an integer, got 'few'"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1"),
        ({"generator": 0}, TypeError, "generator: expected a torch.Generator"),
        ({"loader": torch.ones(3, 3)}, TypeError, "loader: expected batches, got Tensor"),
        ({"loader": []}, ValueError, "loader: expected at least one example, got none"),
        ({"loader": [torch.ones(0, 3)]}, ValueError, "loader: expected at least one example, got none"),
        (
            {"loader": [torch.ones(3, 3), torch.full((3, 3), math.nan)], "likelihood": "regression"},
            ValueError,
            "loader: expected inputs with finite outputs, got NaN in batch 1",
        ),
        ({"model": lambda x: x}, TypeError, "model: expected a torch.nn.Module, got function"),
        ({"loader": [(1, 2, 3)]}, TypeError, r"loader: expected batches \(x, y\) or mappings, got 3 elements"),
        ({"loader": [("a", 1)]}, TypeError, "loader: expected tensors or mappings of them, got str"),
        ({"loader": [{"flag": True}]}, TypeError, "loader: expected inputs with a batch dimension"),
        ({"loader": [(torch.ones(3, 3), torch.zeros(2).long())]}, ValueError, r"labels of shape \(3,\) .* got \(2,\)"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(change, error, message):
    arguments = {"model": mlp(), "loader": [torch.ones(3, 3)], **change}
    with pytest.raises(error, match=message):
        fit_laplace(**arguments)


def test_outputs_that_are_no_values_are_refused():
    class Normal(nn.Linear):
        def forward(self, x):
            return torch.distributions.Normal(super().forward(x), 1.0)

    with pytest.raises(TypeError, match="got a Normal"):
        fit_laplace(Normal(3, 2), [torch.ones(3, 3)], "regression")


# Priors


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_one_curvature_serves_all_priors(structure):
    model, x = case("mlp")
    curvature = fit_curvature(model, [x], structure=structure)
    precisions = {"0.*": 2.0, "*.bias": 5.0, "*": 0.1}
    posterior = curvature.posterior(precisions, factor=0.5)
    for name, precision in {"0.weight": 2.0, "0.bias": 2.0, "2.bias": 5.0, "2.weight": 0.1}.items():
        block = curvature.blocks[name]
        if isinstance(block, Factors):
            whole = 0.5 * matrix(block) + precision * torch.eye(block.spectrum.numel(), dtype=torch.float64)
            expected = whole.inverse().diagonal()
        else:
            expected = 1 / (0.5 * block.flatten() + precision)
        torch.testing.assert_close(posterior.laws[name].marginals().flatten(), expected)
    with pytest.raises(ValueError, match="factor: expected a positive number"):
        curvature.posterior(factor=0.0)


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_the_precision_of_the_evidence_is_its_maximum(structure):
    model, x = case("mlp")
    curvature = fit_curvature(model, [x], structure=structure)
    spectrum = {name: curvature.spectrum([name]) for name in curvature.names}
    torch.testing.assert_close(torch.cat(list(spectrum.values())), curvature.spectrum())
    squares = {name: model.get_parameter(name).detach().square().sum() for name in curvature.names}
    grid = torch.logspace(-4, 4, 4001, dtype=torch.float64)

    def best(names):
        h, square = torch.cat([spectrum[n] for n in names]), sum(squares[n] for n in names)
        evidence = 0.5 * (len(h) * grid.log() - grid * square - (h.unsqueeze(1) + grid).log().sum(0))
        return float(grid[evidence.argmax()])

    assert math.isclose(optimise_prior_precision(curvature), best(curvature.names), rel_tol=5e-3)
    each = optimise_prior_precision(curvature, each=True)
    assert all(math.isclose(each[name], best([name]), rel_tol=5e-3) for name in curvature.names)
    assert curvature.posterior(each).names == curvature.names


def test_evidence_and_ridge_regression_end_at_the_evidence_of_linear_regression():
    x = torch.randn(30, 4, dtype=torch.float64)
    y = x @ torch.randn(4, 1, dtype=torch.float64) * 0.5 + 0.3 * torch.randn(30, 1, dtype=torch.float64)
    model, precision = nn.Linear(4, 1, bias=False).double(), 1.0
    eye = torch.eye(4, dtype=torch.float64)
    for _ in range(50):
        model.weight.data = torch.linalg.solve(x.mT @ x / 0.09 + precision * eye, x.mT @ y / 0.09).mT
        precision = optimise_prior_precision(fit_curvature(model, [x], "regression", "kron", noise=0.09))
    grid = torch.logspace(-1, 2, 601, dtype=torch.float64)
    marginal = [
        torch.distributions.MultivariateNormal(y.new_zeros(30), x @ x.mT / g + 0.09 * torch.eye(30)).log_prob(y[:, 0])
        for g in grid
    ]
    assert math.isclose(precision, float(grid[torch.stack(marginal).argmax()]), rel_tol=0.02)


def test_extreme_spectra_stay_within_bounds():
    nothing = Curvature({"w": torch.zeros(1, 3)}, {"w": 1.0}, 1)
    assert 0 < optimise_prior_precision(nothing) < 2e-8
    at_zero = Curvature({"w": torch.ones(1, 3)}, {"w": 0.0}, 1)
    assert 0.5e8 < optimise_prior_precision(at_zero) <= 1.0001e8


def test_the_precision_of_a_score_is_its_best():
    curvature = Curvature({"w": torch.zeros(1, 1)}, {"w": 1.0}, 1)

    def score(posterior):
        variance = float(posterior.laws["w"].marginals())
        return math.nan if variance > 50 else (math.log(variance) - math.log(0.3)) ** 2

    assert math.isclose(optimise_prior_precision(curvature, score), 10**0.5, rel_tol=1e-6)
    assert optimise_prior_precision(curvature, score, grid=[0.5, 4.0, 40.0]) == 4.0
    with pytest.raises(ValueError, match="score: expected a finite number"):
        optimise_prior_precision(curvature, lambda posterior: math.nan)
    with pytest.raises(ValueError, match="each: expected False"):
        optimise_prior_precision(curvature, score, each=True)
    with pytest.raises(ValueError, match="grid: expected None"):
        optimise_prior_precision(curvature, grid=[1.0])


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_a_posterior_from_data_to_a_prediction(structure):
    """More data, less variance; far from them, more of it."""
    torch.manual_seed(0)
    model, x = mlp(1, 1, 20), torch.linspace(-1, 1, 50).unsqueeze(-1)
    y = (3 * x).sin() + 0.1 * torch.randn_like(x)
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimiser.step()
    few = fit_laplace(model, [(x[::10], y)], "regression", structure, noise=0.01)
    many = fit_laplace(model, [(x, y)], "regression", structure, noise=0.01)
    grid = torch.tensor([[0.0], [4.0]])
    less, more = (propagate(model.eval(), posterior, grid).variance.squeeze() for posterior in (many, few))
    assert (less < more).all()
    assert less[1] > less[0]

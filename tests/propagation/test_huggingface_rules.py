"""Rules for the transformers of Hugging Face, against plain passes and Monte Carlo on tiny random models."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5")

import transformers

from gpseq.propagation import from_variances, plan, propagate
from gpseq.propagation.moments import GaussianState
from gpseq.propagation.rules import huggingface
from gpseq.propagation.walk import Options, Walk
from tests.oracles_propagation import monte_carlo, posterior, relative_variances

FORMS = ["full", "lowrank", "blockdiag", "diag"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 40, "max_position_embeddings": 16, "num_labels": 3, **SIZES}
GPT = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 2, "num_labels": 3}
GPT |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
DISTIL = {"vocab_size": 40, "max_position_embeddings": 16, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24}
IMAGE = {"image_size": 8, "patch_size": 4, "num_labels": 3, **SIZES}
IDS = torch.randint(4, 40, (3, 5), generator=torch.Generator().manual_seed(0))
REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
LAST = [".1.", ".2.", "classifier", "score", "pooler"]


def of(name, config, **options):
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**options))


MODELS = {
    "bert": of("BertForSequenceClassification", "BertConfig", **TEXT),
    "bert hidden": of("BertModel", "BertConfig", **TEXT),
    "bert tokens": of("BertForTokenClassification", "BertConfig", **TEXT),
    "bert decoder": of("BertModel", "BertConfig", **TEXT, is_decoder=True),
    "roberta": of("RobertaForSequenceClassification", "RobertaConfig", **TEXT),
    "electra": of("ElectraForSequenceClassification", "ElectraConfig", **TEXT, embedding_size=8),
    "distilbert": of("DistilBertForSequenceClassification", "DistilBertConfig", **DISTIL, num_labels=3),
    "vit": of("ViTForImageClassification", "ViTConfig", **IMAGE),
    "vit hidden": of("ViTModel", "ViTConfig", **IMAGE),
    "gpt2": of("GPT2LMHeadModel", "GPT2Config", **GPT, scale_attn_by_inverse_layer_idx=True),
    "gpt2 hidden": of("GPT2Model", "GPT2Config", **GPT, scale_attn_weights=False),
    "gpt2 classes": of("GPT2ForSequenceClassification", "GPT2Config", **GPT),
    "gpt2 tokens": of("GPT2ForTokenClassification", "GPT2Config", **GPT),
}


def make(name, dtype=torch.float64):
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(name, model, dtype=torch.float64):
    """Arguments of a model, and which tokens count."""
    if name.startswith("vit"):
        return {"pixel_values": torch.randn(3, 3, 8, 8, dtype=dtype)}, torch.ones(3, 5).bool()
    ids = torch.where(REAL.bool(), IDS, model.config.pad_token_id)
    return {"attention_mask": REAL, "input_ids": ids}, REAL.bool()


def counted(x, counts):
    return x[counts] if x.dim() == 3 else x


@pytest.mark.parametrize("name", list(MODELS))
def test_without_uncertainty_the_mean_is_the_plain_pass(name, dtype):
    model = make(name, dtype)
    given, counts = inputs(name, model, dtype)
    want = model(**given)[0].detach()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = [".1.", ".2."] if "hidden" in name or "decoder" in name else LAST
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for form in FORMS if dtype == torch.float64 else ["full"]:
        options = {"covariance": form, "activations": "tangent", "num_tangents": 4}
        found = propagate(model, posterior(model, 0.0, names), given, **options)
        assert found.mean.shape == want.shape
        torch.testing.assert_close(counted(found.mean, counts), counted(want, counts), rtol=tolerance, atol=tolerance)
        assert found.variance.eq(0).all()
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert not model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert", "vit", "gpt2 hidden"])
def test_every_weight_may_be_uncertain(name):
    model = make(name)
    given, counts = inputs(name, model)
    zero = propagate(model, posterior(model, 0.0), given, covariance="diag", activations="tangent")
    want = model(**given)[0].detach()
    torch.testing.assert_close(counted(zero.mean, counts), counted(want, counts))
    for form in ("full", "lowrank", "diag"):
        options = {"covariance": form, "num_tangents": 16}
        found = propagate(model, posterior(model, 0.05), given, **options)
        assert found.variance[counts].gt(0).all() if found.variance.dim() == 3 else found.variance.gt(0).all()
        assert found.variance.isfinite().all()


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "vit", "gpt2 classes"])
def test_the_last_two_blocks_agree_with_monte_carlo(name):
    model = make(name)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64) if name == "vit" else IDS[:2]
    variances = relative_variances(model, 0.05, LAST)
    named = {f"model.{key}": value for key, value in variances.items()}
    mean, covariance = monte_carlo(Logits(model), named, x, 3000, torch.Generator().manual_seed(1))
    true = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    found = propagate(model, from_variances(variances), x, covariance="full")
    assert abs((found.variance.sqrt() / true).mean() - 1) < 0.02
    assert ((found.mean - mean).abs() / true).mean() < 0.08
    error = found.covariance.to_dense() - covariance
    assert (error.abs() / (true.unsqueeze(-1) * true.unsqueeze(-2))).max() < 0.1
    low = propagate(model, from_variances(variances), x, covariance="lowrank", num_tangents=1000)
    assert abs((low.variance.sqrt() / true).mean() - 1) < 0.05


@pytest.mark.parametrize("name", ["bert", "bert hidden", "roberta", "distilbert", "gpt2 hidden", "gpt2 classes"])
@pytest.mark.parametrize("form", FORMS)
def test_padding_does_not_matter(name, form):
    model = make(name)
    names = [".1.", ".2."]
    given, counts = inputs(name, model)
    options = {"covariance": form, "num_tangents": 8}

    def run(given):
        return propagate(
            model, posterior(model, 0.1, names), given, generator=torch.Generator().manual_seed(0), **options
        )

    one = run(given)
    other = dict(given)
    if name != "gpt2 classes":  # which finds the last token by what padding is
        other["input_ids"] = torch.where(counts, given["input_ids"], 7)
        two = run(other)
    short = run({"input_ids": given["input_ids"][1:2, :3]})
    for moment in ("mean", "variance"):
        value = getattr(one, moment)
        if name not in ("gpt2 classes", "roberta"):  # RoBERTa counts positions by what padding is
            torch.testing.assert_close(counted(getattr(two, moment), counts), counted(value, counts))
        want = value[1:2, :3] if value.dim() == 3 else value[1:2]
        torch.testing.assert_close(getattr(short, moment), want)


@pytest.mark.parametrize("form", FORMS)
def test_language_models_ignore_what_comes_later(form):
    model = make("gpt2")
    later = IDS.clone()
    later[:, 3:] = (later[:, 3:] + 5) % 36 + 4
    one, two = (
        propagate(
            model,
            posterior(model, 0.1, LAST),
            {"input_ids": ids},
            covariance=form,
            num_tangents=8,
            generator=torch.Generator().manual_seed(0),
        )
        for ids in (IDS, later)
    )
    for moment in ("mean", "variance"):
        first, second = (getattr(result, moment) for result in (one, two))
        torch.testing.assert_close(first[:, :3], second[:, :3])
        assert not first[:, 3:].equal(second[:, 3:])


def test_positions_and_words_of_a_language_model():
    model = make("gpt2")
    given, _ = inputs("gpt2", model)
    weights = posterior(model, 0.1, LAST)
    positions, outputs = torch.tensor([4, 1]), torch.tensor([3, 0, 39])
    for form in ("full", "lowrank"):

        def run(form=form, **choice):
            generator = torch.Generator().manual_seed(0)
            return propagate(model, weights, given, covariance=form, num_tangents=8, generator=generator, **choice)

        whole = run()
        chosen = run(positions=positions, outputs=outputs)
        assert chosen.mean.shape == (3, 2, 3)
        for moment in ("mean", "variance"):
            torch.testing.assert_close(getattr(chosen, moment), getattr(whole, moment)[:, positions][..., outputs])
        if form == "full":
            places = (positions.unsqueeze(-1) * 40 + outputs).flatten()
            dense = whole.covariance.to_dense()[:, places][:, :, places]
            torch.testing.assert_close(chosen.covariance.to_dense(), dense)
        last = run(logits_to_keep=2, chunk_size=2)
        torch.testing.assert_close(last.mean, whole.mean[:, -2:])
        torch.testing.assert_close(last.variance, whole.variance[:, -2:])


def test_what_is_chosen_is_what_takes_memory():
    config = transformers.GPT2Config(**{**GPT, "vocab_size": 500})
    model = transformers.GPT2LMHeadModel(config).eval()
    weights = posterior(model, 0.1, [".2."])
    choice = {"positions": torch.tensor([4]), "outputs": torch.tensor([7, 8])}
    sizes = [plan(model, weights, {"input_ids": IDS, **own}).largest for own in ({}, choice)]
    assert sizes == [5 * 500, 5 * 64]


def test_a_tied_table_is_one_source_of_noise():
    model = make("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    table = {"transformer.wte.weight": torch.full_like(model.lm_head.weight, 1e-3)}
    ids = IDS[:1]
    with pytest.raises(NotImplementedError, match=r"wte.weight is uncertain and used more than once"):
        propagate(model, from_variances(table), ids, covariance="full")
    found = propagate(model, from_variances(table), ids, covariance="lowrank", num_tangents=2000)
    named = {f"model.{name}": value for name, value in table.items()}
    _, covariance = monte_carlo(Logits(model), named, ids, 1000, torch.Generator().manual_seed(1))
    true = covariance.diagonal(dim1=-2, dim2=-1).sqrt().view_as(found.mean)
    assert abs((found.variance.sqrt() / true).mean() - 1) < 0.05


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2 hidden"])
def test_tokens_that_are_embedded(name):
    model = make(name)
    table = model.get_input_embeddings()
    embedded = table(IDS).detach()
    kinds = {} if name == "gpt2 hidden" else {"token_type_ids": torch.zeros_like(IDS)}
    want = model(input_ids=IDS, **kinds)[0].detach()
    for names, zero in ((LAST if name == "bert" else [".2."], 0.0), (["LayerNorm", "ln_"], 0.0)):
        for given in ({"inputs_embeds": embedded, **kinds}, {"input_ids": IDS, **kinds}):
            found = propagate(model, posterior(model, zero, names), given, covariance="diag", activations="tangent")
            torch.testing.assert_close(found.mean, want)
    certain = propagate(model, from_variances({}), {"inputs_embeds": embedded, **kinds})
    torch.testing.assert_close(certain.mean, want)
    assert certain.variance.eq(0).all()


def test_kinds_and_positions_of_tokens():
    model = make("bert hidden")
    kinds = torch.tensor([[0, 0, 1, 1, 1]]).expand(3, -1)
    positions = torch.arange(5).flip(0).expand(3, -1)
    given = {"input_ids": IDS, "token_type_ids": kinds, "position_ids": positions}
    want = model(**given)[0].detach()
    for names in (["encoder.layer.2"], ["embeddings.LayerNorm"], ["token_type", "position"]):
        found = propagate(model, posterior(model, 0.0, names), given, activations="tangent", chunk_size=2)
        torch.testing.assert_close(found.mean, want)


def test_the_last_token_from_either_side():
    model = make("gpt2 classes")
    ids = torch.tensor([[5, 6, 7, 0, 0], [0, 0, 8, 9, 4], [0, 0, 0, 0, 0]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = propagate(model, posterior(model, 0.0, LAST), given, activations="tangent")
    torch.testing.assert_close(found.mean, model(**given)[0].detach())
    model.config.pad_token_id = None
    alone = propagate(model, posterior(model, 0.0, LAST), ids[:1], activations="tangent")
    torch.testing.assert_close(alone.mean, model(ids[:1])[0].detach())
    state = GaussianState(ids)
    walk = Walk(model, posterior(model, 0.0, LAST).bind(model), Options())
    with pytest.raises(ValueError, match="pad_token_id"):
        walk(model, state)


@pytest.mark.parametrize("name", ["bert", "gpt2 hidden"])
def test_masks_of_every_kind(name):
    model = make(name)
    weights = posterior(model, 0.05, [".2."])
    options = {"covariance": "full"}
    plain = propagate(model, weights, {"input_ids": IDS, "attention_mask": REAL}, **options)
    past = torch.ones(5, 5).tril().bool() if name == "gpt2 hidden" else torch.ones(5, 5).bool()
    pairs = REAL.bool()[:, None, None, :] & past
    added = torch.zeros(pairs.shape, dtype=torch.float64).masked_fill(~pairs, torch.finfo(torch.float64).min)
    for mask in (REAL.bool(), REAL.double(), pairs, added):
        other = propagate(model, weights, {"input_ids": IDS, "attention_mask": mask}, **options)
        torch.testing.assert_close(counted(other.mean, REAL.bool()), counted(plain.mean, REAL.bool()))
        torch.testing.assert_close(counted(other.variance, REAL.bool()), counted(plain.variance, REAL.bool()))


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2 hidden"])
def test_blocks_that_nothing_uncertain_has_reached_run_as_they_are(name):
    model = make(name)
    given, _ = inputs(name, model)
    seen = []
    kinds = ("BertLayer", "ViTLayer", "GPT2Block")
    for number, block in enumerate(part for part in model.modules() if type(part).__name__ in kinds):
        block.register_forward_hook(lambda module, args, out, number=number: seen.append(number))
    walk = Walk(model, posterior(model, 0.1, [".1."]).bind(model), Options(form="diag"))
    lead = given.pop("pixel_values" if name == "vit" else "input_ids")
    walk(model, GaussianState(lead), **given)
    assert seen == [0]


def test_what_cannot_be_followed_is_named():
    model = make("bert")
    weights = posterior(model, 0.1, [".2."])
    with pytest.raises(TypeError, match=r"inputs: labels of the model itself|inputs: labels of bert"):
        propagate(model, weights, {"input_ids": IDS, "labels": torch.zeros(3).long()})
    model.config._attn_implementation = "flex_attention"
    walk = Walk(model, weights.bind(model), Options())
    with pytest.raises(NotImplementedError, match=r"layer.2.attention.self is computed by 'flex_attention'.*'sdpa'"):
        walk(model.bert.encoder.layer[2], GaussianState(torch.randn(1, 5, 16, dtype=torch.float64)))


def test_other_sizes_of_images():
    model = make("vit")
    pixels = torch.randn(2, 3, 12, 8, dtype=torch.float64)
    given = {"pixel_values": pixels, "interpolate_pos_encoding": True}
    found = propagate(model, posterior(model, 0.0, LAST), given, activations="tangent")
    torch.testing.assert_close(found.mean, model(**given)[0].detach())


def test_attention_with_a_gaussian_process_is_refused_rather_than_drawn():
    pytest.importorskip("gpseq.integrations.huggingface")
    from gpseq.nn import replace_attention

    model = replace_attention(make("bert"), num_inducing=3).eval()
    with pytest.raises(NotImplementedError, match="a Gaussian process"):
        propagate(model, posterior(model, 0.1, ["classifier"]), IDS)


def test_other_relatives_have_no_rule():
    class BertLayer(nn.Module):
        def forward(self, x):
            return x

    class Changed(type(make("bert").bert.encoder.layer[0])):
        def forward(self, hidden_states, *args, **kwargs):
            return 2 * hidden_states

    class Same(type(make("bert").bert.encoder.layer[0])):
        pass

    predicate = huggingface.of_family("Layer")
    layer = make("bert").bert.encoder.layer[0]
    assert predicate(layer)
    assert not predicate(BertLayer())
    for kind, known in ((Changed, False), (Same, True)):
        layer.__class__ = kind
        assert predicate(layer) is known


def test_dropout_as_a_source_of_variance():
    model = make("bert hidden")
    options = {"covariance": "diag", "dropout": "variance"}
    found = propagate(model, from_variances({}), IDS, **options)
    assert found.variance.gt(0).all()
    more = propagate(model, posterior(model, 0.1, [".2."]), IDS, **options)
    assert more.variance.gt(found.variance).all()


def dropping(name, rate):
    """One block of attention that drops its weights, and of which nothing else mixes features; the residual path."""
    sizes = {**SIZES, "num_hidden_layers": 1}
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": rate}
    if name == "bert":
        text = {"vocab_size": 40, "max_position_embeddings": 16, **sizes}
        model = transformers.BertModel(transformers.BertConfig(**text, **nothing), add_pooling_layer=False)
        (layer,) = model.encoder.layer
        out, last = layer.attention.output.dense, layer.output.dense
        layer.attention.output.LayerNorm = layer.output.LayerNorm = nn.Identity()
    elif name == "vit":
        config = transformers.ViTConfig(image_size=8, patch_size=4, **sizes, **nothing)
        model = transformers.ViTModel(config, add_pooling_layer=False)
        (layer,) = model.layers if hasattr(model, "layers") else model.encoder.layer
        out, last = layer.attention.o_proj, layer.mlp.fc2
        model.layernorm = nn.Identity()
    else:
        config = {**GPT, "n_layer": 1, "attn_pdrop": rate, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        model = transformers.GPT2Model(transformers.GPT2Config(**config))
        out, last = model.h[0].attn.c_proj, model.h[0].mlp.c_proj
        model.ln_f = nn.Identity()
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        out.weight.copy_(torch.eye(16))
        last.weight.zero_()
    return model


@pytest.mark.parametrize("form", ["diag", "full"])
@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
def test_dropped_weights_of_attention_against_draws_of_them(name, form):
    model = dropping(name, 0.2)
    given, counts = inputs(name, model)
    with torch.no_grad():
        found = propagate(model, from_variances({}), given, covariance=form, dropout="variance")
        model.train()
        many = {key: value.repeat(3000, *[1] * (value.dim() - 1)) for key, value in given.items()}
        drawn = model(**many)[0].unflatten(0, (3000, -1))
    assert found.variance[counts].gt(0).all()
    size = drawn.var(0)[counts]
    torch.testing.assert_close(found.variance[counts], size, rtol=0.15, atol=0.02 * size.max().item())
    torch.testing.assert_close(found.mean[counts], drawn.mean(0)[counts], rtol=0, atol=0.1 * size.max().sqrt().item())


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "gpt2 classes"])
def test_on_a_gpu(name):
    model = make(name)
    given, counts = inputs(name, model)
    weights = relative_variances(model, 0.1)
    if name == "gpt2":  # whose head is its table of words
        weights.pop("transformer.wte.weight")
    for form in ("full", "diag"):
        here = propagate(model.cpu(), from_variances(weights), given, covariance=form)
        there = propagate(
            model.cuda(),
            from_variances({key: value.cuda() for key, value in weights.items()}),
            {key: value.cuda() for key, value in given.items()},
            covariance=form,
        )
        for moment in ("mean", "variance"):
            one, two = (getattr(result, moment) for result in (here, there))
            assert two.is_cuda
            torch.testing.assert_close(counted(two.cpu(), counts), counted(one, counts))


# Names of parts in releases 4


class Named(nn.Module):
    """Whatever parts a module has."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def older_layer(layer, kind, module):
    """A block of ViT with the parts of release 4.5x, whose attention is one inside the other."""
    names = ("q_proj", "k_proj", "v_proj")
    inner = Named(**dict(zip(("query", "key", "value"), (getattr(layer.attention, n) for n in names), strict=True)))
    inner.num_attention_heads = layer.attention.num_attention_heads

    class Layer(Named):
        def forward(self, hidden_states):
            return layer(hidden_states)

    Layer.__name__, Layer.__module__ = kind, module
    return Layer(
        attention=Named(attention=inner, output=Named(dense=layer.attention.o_proj, dropout=nn.Dropout(0.1))),
        intermediate=Named(dense=layer.mlp.fc1, intermediate_act_fn=layer.mlp.activation_fn),
        output=Named(dense=layer.mlp.fc2, dropout=nn.Dropout(0.1)),
        layernorm_before=layer.layernorm_before,
        layernorm_after=layer.layernorm_after,
    ).eval()


def test_names_of_earlier_releases():
    layer = make("vit").vit.layers[0]
    older = older_layer(layer, "ViTLayer", "transformers.models.vit.modeling_vit")
    x = GaussianState(torch.randn(2, 5, 16, dtype=torch.float64))
    for form in ("full", "blockdiag", "diag"):
        states = []
        for module in (layer, older):
            walk = Walk(module, posterior(module, 0.1).bind(module), Options(form=form), 8, torch.Generator())
            states.append(walk(module, x))
        torch.testing.assert_close(states[0].mean, states[1].mean)
        torch.testing.assert_close(states[0].variance, states[1].variance)
    other = older_layer(layer, "ViTLayer", "transformers.models.vit.modeling_vit")
    del other.intermediate
    walk = Walk(other, posterior(other, 0.1).bind(other), Options())
    with pytest.raises(NotImplementedError, match=r"ViTLayer, to have mlp.fc1 or intermediate.dense"):
        walk(other, x)
    block = make("gpt2 hidden").h[1]
    assert math.isclose(block.attn.scaling, 1.0)
    del block.attn.scaling
    walk = Walk(block, posterior(block, 0.0).bind(block), Options(activations="tangent"))
    causal = torch.ones(5, 5).tril().bool()[None, None]
    block.attn.scaling = 1.0
    want = block(x.mean, attention_mask=causal)
    del block.attn.scaling
    torch.testing.assert_close(walk(block, x).mean, want)


# What others put into a block


class Adapter(nn.Module):
    """A matrix of weights with one of low rank beside it; it shows the weight of the first."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(16, 2, bias=False).to(base.weight)
        self.up = nn.Linear(2, 16, bias=False).to(base.weight)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def with_part(name, replaced):
    """A model whose first block has another matrix for values."""
    model = make(name)
    owner, part = {
        "bert hidden": lambda: (model.encoder.layer[0].attention.self, "value"),
        "distilbert": lambda: (model.distilbert.transformer.layer[0].attention, "v_lin"),
        "vit": lambda: (model.vit.layers[0].attention, "v_proj"),
    }[name]()
    setattr(owner, part, replaced(getattr(owner, part)))
    model.set_attn_implementation("eager")
    return model.eval()


@pytest.mark.parametrize("name", ["bert hidden", "distilbert", "vit"])
def test_adapters_are_not_passed_over(name):
    model = with_part(name, Adapter)
    given, counts = inputs(name, model)
    found = propagate(model, posterior(model, 0.0, [".0.", ".1."]), given, covariance="lowrank", num_tangents=4)
    want = model(**given)[0].detach()
    torch.testing.assert_close(counted(found.mean, counts), counted(want, counts), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        spread = propagate(model, posterior(model, 0.1, ["down", "up"]), given, covariance="lowrank")
    assert counted(spread.variance, counts).gt(0).all()


@pytest.mark.parametrize("name", ["bert hidden", "distilbert", "vit"])
def test_matrices_that_do_something_else(name):
    model = with_part(name, lambda base: Halved(16, 16).to(base.weight))
    with pytest.raises(NotImplementedError, match="to be a matrix of weights, as transformers has it, got a Halved"):
        propagate(model, posterior(model, 0.1, [".0.", ".1."]), inputs(name, model)[0])


def test_attention_of_another_make():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(16, 16).double() for _ in range(3))
            self.num_attention_heads = 2

        def forward(self, hidden_states, *args, **inputs):
            return self.query(hidden_states) + self.key(hidden_states) * torch.tanh(self.value(hidden_states)), None

    model = make("bert hidden")
    model.encoder.layer[1].attention.self = Mixed()
    given, counts = inputs("bert hidden", model)
    weights = posterior(model, 0.0, [".1.", ".2."])
    found = propagate(model, weights, given, covariance="lowrank", activations="tangent", num_tangents=4)
    torch.testing.assert_close(found.mean[counts], model(**given)[0].detach()[counts])

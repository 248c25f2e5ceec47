"""Halves of the blocks of Hugging Face's transformers as parts: against whole blocks, plain passes and Monte Carlo."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5")

import transformers

from gpseq.propagation import PartMoments, from_variances
from tests.oracles_propagation import held, monte_carlo, posterior, relative_variances

FORMS = ["full", "lowrank", "blockdiag", "diag"]


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


class BertStep(nn.Module):
    def __init__(self, previous, block, mask=None):
        super().__init__()
        self.previous, self.block, self.mask = previous, block, mask

    def forward(self, x):
        return self.block.attention(self.previous.feed_forward_chunk(x), self.mask)[0]


class GPT2Step(BertStep):
    def forward(self, x):
        u = x + self.previous.mlp(self.previous.ln_2(x))
        return u + self.block.attn(self.block.ln_1(u), attention_mask=self.mask)[0]


class ViTStep(BertStep):
    def forward(self, x):
        a, b = self.previous, self.block
        u = a.dropout(a.mlp(a.layernorm_after(x))) + x
        return b.dropout(b.attention(b.layernorm_before(u), self.mask)[0]) + u


class BertHalves(BertStep):
    def forward(self, x):
        return self.block.feed_forward_chunk(self.block.attention(x, self.mask)[0])


class GPT2Halves(BertStep):
    def forward(self, x):
        u = x + self.block.attn(self.block.ln_1(x), attention_mask=self.mask)[0]
        return u + self.block.mlp(self.block.ln_2(u))


class ViTHalves(BertStep):
    def forward(self, x):
        u = self.block.dropout(self.block.attention(self.block.layernorm_before(x), self.mask)[0]) + x
        return self.block.dropout(self.block.mlp(self.block.layernorm_after(u))) + u


class Block(BertStep):
    def forward(self, x):
        return self.block(x, attention_mask=self.mask)


TINY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}


def transformer(name, attention="sdpa"):
    if name == "bert":
        made = transformers.BertModel(transformers.BertConfig(vocab_size=9, **TINY))
        blocks = made.encoder.layer
    elif name == "bert decoder":
        made = transformers.BertModel(transformers.BertConfig(vocab_size=9, is_decoder=True, **TINY))
        blocks = made.encoder.layer
    elif name == "roberta":
        made = transformers.RobertaModel(transformers.RobertaConfig(vocab_size=9, **TINY))
        blocks = made.encoder.layer
    elif name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=9, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        made = transformers.GPT2Model(config)
        blocks = made.h
    else:
        made = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **TINY))
        blocks = made.layers
    made.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.double().eval(), blocks


FAMILIES = {
    "bert": (BertStep, BertHalves),
    "bert decoder": (BertStep, BertHalves),
    "roberta": (BertStep, BertHalves),
    "gpt2": (GPT2Step, GPT2Halves),
    "vit": (ViTStep, ViTHalves),
}


def of_batch(kind, x):
    """A mask that is added to scores, and removes the last token of the second element."""
    if kind == "none":
        return None
    mask = torch.zeros(len(x), 1, 1, x.shape[1])
    mask[1, ..., -1] = torch.finfo(mask.dtype).min
    return mask


@pytest.mark.parametrize("mask", ["none", "padding"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_both_halves_of_a_block_are_the_block(name, form, mask):
    model, blocks = transformer(name)
    x = torch.randn(2, 4, 8)
    weights = posterior(model, 0.1)
    found = []
    for kind in (FAMILIES[name][1], Block):
        part = kind(blocks[0], blocks[1], of_batch(mask, x)).eval()
        generator = torch.Generator().manual_seed(0)
        moments = PartMoments(model, weights, form, num_tangents=8, generator=generator, activations="tangent")
        found.append(moments(part, x))
        torch.testing.assert_close(found[-1][0], part(x), rtol=1e-10, atol=1e-10)
        assert found[-1][1].gt(0).all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_mean_of_a_step_is_its_plain_pass(name, attention):
    model, blocks = transformer(name, attention)
    x = torch.randn(2, 4, 8)
    for mask in ("none", "padding"):
        step = FAMILIES[name][0](blocks[0], blocks[1], of_batch(mask, x)).eval()
        for form in FORMS:
            moments = PartMoments(model, posterior(model, 0.1), form, activations="tangent", num_tangents=8)
            mean, variance = moments(step, x)
            torch.testing.assert_close(mean, step(x), rtol=1e-6, atol=1e-6)  # "eager" may have single precision
            assert variance.gt(0).all()


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_a_step_of_transformers_agrees_with_monte_carlo(name):
    model, blocks = transformer(name)
    x = torch.randn(1, 3, 8)
    step = FAMILIES[name][0](blocks[0], blocks[1]).eval()
    variances = relative_variances(model, 0.05)
    with torch.no_grad():
        mean, covariance = monte_carlo(step, held(step, model, variances), x, 10_000, torch.Generator().manual_seed(1))
        found, variance = PartMoments(model, from_variances(variances), "full")(step, x)
    true = covariance.diagonal(dim1=-2, dim2=-1).view_as(x).sqrt()
    assert abs((variance.sqrt() / true).mean() - 1) < 0.03
    assert ((found - mean.view_as(x)).abs() / true).max() < 0.25


def test_attention_that_was_replaced_has_no_rule():
    model, blocks = transformer("gpt2")

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    blocks[1].attn.c_proj = Doubled(blocks[1].attn.c_proj)
    x = torch.randn(2, 4, 8)
    step = GPT2Step(blocks[0], blocks[1]).eval()
    mean, variance = PartMoments(model, posterior(model, 0.1), "full", activations="tangent")(step, x)
    torch.testing.assert_close(mean, step(x))
    assert variance.gt(0).all()

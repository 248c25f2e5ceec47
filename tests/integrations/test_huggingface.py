"""Gaussian processes in transformers of Hugging Face: BERT, ViT, GPT-2 and a model with grouped heads."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers", minversion="5")

import transformers

from gpseq.integrations import huggingface
from gpseq.integrations.huggingface import compute_loss, load_pretrained
from gpseq.nn import init_inducing, kl_divergence, linear_annealing, replace_attention, use_generator
from gpseq.nn.residual import ResidualGP
from gpseq.prediction import predict
from tests.test_readme import ROOT

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
# Some eager attentions of transformers take their softmax in float32 whatever the dtype is.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, "eager": 1e-6}
IDS = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(0))
REAL = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
TEXT = {"input_ids": IDS, "attention_mask": REAL}


def bert(**options):
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **SIZES, **options))


def vit(**options):
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES, **options)
    )


def gpt2(**options):
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=32, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0, **options
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**options):
    """Rotated queries, and keys that several heads share."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=40, num_key_value_heads=1, **SIZES, **options)
    )


MODELS = {"bert": bert, "vit": vit, "gpt2": gpt2, "llama": llama}
TEXTS = ["bert", "gpt2", "llama"]


def inputs(name, dtype=torch.float32):
    return {"pixel_values": torch.randn(3, 3, 8, 8, dtype=dtype)} if name == "vit" else dict(TEXT)


def processes(model):
    return [module for module in model.modules() if isinstance(module, ResidualGP)]


def make(name, sampling="mean", **options):
    """A model in a generic position: its Gaussian processes have moved too."""
    model = replace_attention(MODELS[name](), num_inducing=4, sampling=sampling, **options).eval()
    with torch.no_grad():
        for gp in processes(model):
            gp.inducing.value.normal_(std=0.3)
            gp.inducing.log_variance.fill_(-1.0)
            gp.inducing.log_diagonal.normal_(std=0.3)
    return model


def logits(model, batch, **options):
    with torch.no_grad():
        return model(**batch, **options).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_starts_as_what_it_was(name, attention, dtype):
    model = MODELS[name](attn_implementation=attention).to(dtype).eval()
    batches = [inputs(name, dtype)]
    if name in TEXTS:
        batches += [{"input_ids": IDS}, {"input_ids": IDS[:1, :1]}]
    want = [logits(model, batch) for batch in batches]
    assert replace_attention(model, num_inducing=4, sampling="mean") is model
    assert len(processes(model)) == 3
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.config._attn_implementation == "gpseq"
    real = REAL.bool() if name in ("gpt2", "llama") else slice(None)
    tolerance = max(TOLERANCE[dtype], TOLERANCE["eager"] if attention == "eager" else 0.0)
    for batch, result in zip(batches, want, strict=True):
        kept = real if "attention_mask" in batch else slice(None)
        torch.testing.assert_close(logits(model, batch)[kept], result[kept], rtol=0, atol=tolerance)
    assert kl_divergence(model) == 0


@pytest.mark.parametrize("name", MODELS)
def test_every_pass_draws_and_seeds_reproduce(name):
    model, batch = make(name, "marginal"), inputs(name)
    for training in (True, False):
        model.train(training)
        with use_generator(model, torch.Generator().manual_seed(1)):
            torch.manual_seed(5)  # dropout's
            first = logits(model, batch)
        assert not first.isclose(logits(model, batch)).all(-1).any()
        with use_generator(model, torch.Generator().manual_seed(1)):
            torch.manual_seed(5)
            assert logits(model, batch).equal(first)
    assert first.isfinite().all()
    assert predict(model, batch, num_samples=4).probs().shape == first.shape


@pytest.mark.parametrize("name", TEXTS)
def test_padding_changes_nothing(name):
    changed = {**TEXT, "input_ids": torch.where(REAL.bool(), IDS, 39)}
    kept = slice(None) if name == "bert" else REAL.bool()
    for sampling in ("mean", "marginal"):
        model = make(name, sampling)
        with use_generator(model, torch.Generator().manual_seed(1)):
            want = logits(model, TEXT)
        with use_generator(model, torch.Generator().manual_seed(1)):
            torch.testing.assert_close(logits(model, changed)[kept], want[kept])
    model = make(name)
    for row, length in enumerate(REAL.sum(-1)):
        alone = logits(model, {"input_ids": IDS[row : row + 1, :length]})[0]
        want = logits(model, TEXT)[row]
        torch.testing.assert_close(alone, want if name == "bert" else want[:length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("mask", [None, REAL])
def test_causal_models_leak_nothing(name, mask):
    model = make(name)
    tokens = model.get_input_embeddings()(IDS).detach().requires_grad_()
    out = model(inputs_embeds=tokens, attention_mask=mask).logits
    (grad,) = torch.autograd.grad(out[:, 2].square().sum(), tokens)
    assert grad[:, 3:].eq(0).all()
    assert grad[:, :3].ne(0).any(-1).all()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cache_changes_nothing(name):
    model = make(name)
    full = logits(model, {"input_ids": IDS})
    with torch.no_grad():
        first = model(input_ids=IDS[:, :3], use_cache=True)
        second = model(input_ids=IDS[:, 3:4], past_key_values=first.past_key_values, use_cache=True)
        third = model(input_ids=IDS[:, 4:], past_key_values=second.past_key_values, use_cache=True)
    steps = torch.cat([part.logits for part in (first, second, third)], 1)
    torch.testing.assert_close(steps, full, rtol=1e-4, atol=1e-5)


def test_generation():
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = gpt2().eval()
    want = plain.generate(**TEXT, **options)
    model = replace_attention(copy.deepcopy(plain), num_inducing=4, sampling="mean")
    assert model.generate(**TEXT, **options).equal(want)
    moved = make("gpt2")
    with_cache = moved.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    without = moved.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **options)
    assert with_cache.equal(without)
    for gp in processes(moved):
        gp.sampling = "marginal"
    assert moved.generate(IDS, attention_mask=torch.ones_like(IDS), **options).shape == (3, 13)


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(name, tmp_path):
    model = make(name, layers="*.[02].*", kernel="exponential", covariance="low_rank", rank=3)
    assert len(processes(model)) == 2
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert again.state_dict()[key].equal(value), key
    assert [gp.settings() for gp in processes(again)] == [gp.settings() for gp in processes(model)]
    batch = inputs(name)
    assert logits(again, batch).equal(logits(model, batch))
    again.save_pretrained(tmp_path / "twice")
    assert logits(load_pretrained(tmp_path / "twice", type(model)), batch).equal(logits(model, batch))
    with pytest.raises(ValueError, match="were not replaced before"):
        replace_attention(again)
    replace_attention(again, "*.1.*", num_inducing=2)
    again.save_pretrained(tmp_path / "more")
    assert [gp.num_inducing for gp in processes(load_pretrained(tmp_path / "more"))] == [4, 2, 4]


def test_loaded_without_or_with_a_head(tmp_path):
    model = make("bert")
    model.save_pretrained(tmp_path / "whole")
    body = load_pretrained(tmp_path / "whole", transformers.BertModel)
    want = model.bert(**TEXT).last_hidden_state
    assert body(**TEXT).last_hidden_state.equal(want)
    body.save_pretrained(tmp_path / "body")
    headed = load_pretrained(tmp_path / "body", transformers.BertForTokenClassification)
    assert headed.bert(**TEXT).last_hidden_state.equal(want)
    with pytest.raises(ValueError, match=r"model_class: expected a model with bert.encoder.layer.0.* got GPT2Model"):
        load_pretrained(tmp_path / "whole", transformers.GPT2Model, config=_foreign(model))


def _foreign(model):
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2)
    config.gpseq = model.config.gpseq
    return config


def test_loaded_without_the_settings(tmp_path):
    model = make("bert")
    settings = model.config.gpseq
    del model.config.gpseq
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"path: expected a model whose config.json has settings under 'gpseq'"):
        load_pretrained(tmp_path)
    plain = bert()
    plain.config.gpseq = settings
    plain.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["gpseq"] == settings
    with pytest.raises(ValueError, match=r"weights of the Gaussian processes in .*residual_gp.inducing.* is missing"):
        load_pretrained(tmp_path / "plain")
    several = transformers.BertConfig(**SIZES, architectures=["A", "B"])
    several.gpseq = settings
    with pytest.raises(ValueError, match=r"model_class: expected one, as the configuration names \['A', 'B'\]"):
        load_pretrained(tmp_path, config=several)


@pytest.mark.parametrize(
    ("name", "cross"),
    [
        ("cross_encoder.bert.encoder.layer.0.attention.self", False),
        ("model.decoder.layers.1.self_attn", False),
        ("model.decoder.layers.1.encoder_attn", True),
        ("decoder.block.0.layer.1.EncDecAttention", True),
        ("decoder.block.0.layer.0.SelfAttention", False),
        ("layer.0.crossattention.self", True),
        ("encoder.layers.0.encoder_decoder_attention", True),
        ("attention", False),
        ("", False),
    ],
)
def test_which_names_are_those_of_cross_attention(name, cross):
    attention = nn.Module()
    assert huggingface._is_cross(name, attention) is cross
    attention.is_cross_attention = not cross  # what a module says of itself goes first
    assert huggingface._is_cross(name, attention) is not cross


def test_the_class_itself_loads_the_model_without_them(tmp_path):
    plain = bert().eval()
    model = replace_attention(copy.deepcopy(plain), num_inducing=4)
    model.save_pretrained(tmp_path)
    assert logits(transformers.BertForSequenceClassification.from_pretrained(tmp_path), TEXT).equal(logits(plain, TEXT))


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_backbone_trains_its_gaussian_processes(name):
    model = MODELS[name]().requires_grad_(False)
    replace_attention(model, num_inducing=4)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".residual_gp.inducing." in key for key in trained)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    before = {key: p.clone() for key, p in model.named_parameters()}
    for _ in range(2):
        loss = model(**inputs(name)).logits.square().mean() + kl_divergence(model, num_data=9) / 9
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert {key for key, p in model.named_parameters() if not p.equal(before[key])} == trained
    total = sum(gp.kl_divergence(9) for gp in processes(model))
    torch.testing.assert_close(kl_divergence(model, num_data=9), total)
    assert total > 0


@pytest.mark.parametrize("name", MODELS)
def test_inducing_keys_on_real_tokens(name):
    model, batch = make(name), inputs(name)
    seen = []
    hooks = [gp.register_forward_pre_hook(lambda gp, args: seen.append(args[0])) for gp in processes(model)]
    logits(model, batch)
    for hook in hooks:
        hook.remove()
    init_inducing(model, [batch])
    kept = REAL.bool() if name in TEXTS else torch.ones(3, 5).bool()
    for gp, query in zip(processes(model), seen, strict=True):
        for head, tokens in zip(gp.inducing.location, query.transpose(0, 1), strict=True):
            assert torch.cdist(head, tokens[kept]).min(-1).values.max() < 1e-4
    model.train()
    loss = model(**batch).logits.square().mean()
    loss.backward()
    assert all(gp.inducing.location.grad.isfinite().all() for gp in processes(model))


def test_inside_another_module_and_last():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.image = bert(), vit()
            self.joint = nn.MultiheadAttention(16, 2, batch_first=True)

    model = replace_attention(Pair(), num_inducing=4)
    assert len(processes(model)) == 6
    assert type(model.joint).__name__ == "SGPAttention"
    assert list(model.image.config.gpseq["layers"]) == [f"vit.layers.{i}.attention" for i in range(3)]
    last = replace_attention(gpt2(), "last")
    assert list(last.config.gpseq["layers"]) == ["transformer.h.2.attn"]


def test_models_with_two_stacks(dtype):
    config = transformers.BertConfig(vocab_size=40, is_decoder=True, add_cross_attention=True, **SIZES)
    model = transformers.EncoderDecoderModel(
        encoder=transformers.BertModel(transformers.BertConfig(vocab_size=40, **SIZES)),
        decoder=transformers.BertLMHeadModel(config),
    )
    model = model.to(dtype).eval()
    batch = {**TEXT, "decoder_input_ids": IDS[:, :4]}
    want = logits(model, batch)
    replace_attention(model, num_inducing=4, sampling="mean")
    assert len(processes(model)) == 9
    torch.testing.assert_close(logits(model, batch), want, rtol=0, atol=TOLERANCE[dtype])


def test_refusals_change_nothing():
    model = bert()
    for options, message in (
        ({"mode": "sgpa"}, "mode: expected 'residual' for attention of transformers"),
        ({"layers": "*.7.*"}, r"layers: expected a pattern .* 'bert.encoder.layer.0.attention.self'"),
        ({"kernel": "matern"}, "kernel: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            replace_attention(model, **options)
    with pytest.raises(TypeError, match="colour"):
        replace_attention(model, colour="red")
    with pytest.raises(ValueError, match=r"inside a PreTrainedModel, whose masks it needs"):
        replace_attention(model.bert.encoder)
    assert not processes(model)
    assert model.config._attn_implementation != "gpseq"
    assert not hasattr(model.config, "gpseq")
    replace_attention(model)
    with pytest.raises(ValueError, match="replaced before"):
        replace_attention(model)


def test_masks_that_the_host_would_not_pass_on(monkeypatch):
    model = bert()
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match="BertForSequenceClassification fixes its own: masks and attention"):
        replace_attention(model)
    assert not processes(model)


def test_attention_that_does_not_tell_its_heads():
    with pytest.raises(ValueError, match="model: expected attention that tells its heads and their width, Linear"):
        huggingface._make("attention", nn.Linear(2, 2), {})


@pytest.mark.parametrize("beta", [0.5, lambda: linear_annealing(1, 4)])
def test_the_loss_of_a_trainer(beta):
    model, labels = make("bert"), torch.tensor([0, 1, 1])
    loss = compute_loss(model, num_data=50, beta=beta)
    out = model(**TEXT)
    want = F.cross_entropy(out.logits, labels) + 0.5 * kl_divergence(model, num_data=50) / 50
    torch.testing.assert_close(loss(out, labels), want)
    torch.testing.assert_close(loss(out, labels, num_items_in_batch=torch.tensor(3)), want)
    # in two parts, as accumulated
    total = sum(
        loss(model(input_ids=IDS[part], attention_mask=REAL[part]), labels[part], num_items_in_batch=3)
        for part in (slice(0, 1), slice(1, 3))
    )
    torch.testing.assert_close(total, want)
    with pytest.raises(ValueError, match="labels: expected a column 'labels'"):
        loss(out, None)


def test_the_loss_of_a_language_model():
    model = make("gpt2")
    labels = IDS.masked_fill(~REAL.bool(), -100)
    want = model(**TEXT, labels=labels).loss + kl_divergence(model, num_data=70) / 70
    torch.testing.assert_close(compute_loss(model, num_data=70, shift=True)(model(**TEXT), labels), want)


def test_the_blocks_of_the_guide_run(tmp_path, monkeypatch):
    page = ROOT / "docs" / "guide" / "surgery.md"
    if not page.exists():
        pytest.skip("the tests run outside a checkout")
    text = page.read_text(encoding="utf-8")
    section = text[text.index("## Hugging Face") :]
    section = section[: section.index("\n## ", 3)]
    codes = re.findall(r"^```\{code-block\} python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert codes
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for code in codes:
        exec(compile(code, str(page), "exec"), namespace)


def test_a_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = replace_attention(bert().requires_grad_(False), num_inducing=4, sampling="mean")
    model.classifier.requires_grad_(True)
    data = [{"input_ids": IDS[i % 3], "labels": i % 2} for i in range(12)]
    asked = []

    def beta():
        asked.append(linear_annealing(trainer.state.global_step, trainer.state.max_steps))
        return asked[-1]

    options = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=2, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, learning_rate=1e-2, dataloader_pin_memory=False,
    )  # fmt: skip
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trainer = transformers.Trainer(
        model, options, train_dataset=data, compute_loss_func=compute_loss(model, num_data=12, beta=beta)
    )
    trainer.train()
    changed = {key for key, p in model.named_parameters() if not p.equal(before[key])}
    assert any(".residual_gp.inducing.value" in key for key in changed)
    assert all(".residual_gp." in key or key.startswith("classifier") for key in changed)
    assert asked[0] == 0.0
    assert asked[-1] == 1.0

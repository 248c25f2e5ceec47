"""Tiny teachers of every host, their blocks written out by hand, and kernels whose every number is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpseq.reconfiguration import Masks, Path, find_stack, transitions
from gpseq.reconfiguration.blocks import find_kind
from gpseq.reconfiguration.student import make_student

WIDTH, HEADS, LENGTH, BATCH, CLASSES = 8, 2, 5, 3, 4
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
LEFT = PADDING.flip(1)
FUTURE = torch.ones(LENGTH, LENGTH).triu(1).bool()
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": HEADS, "intermediate_size": 12}
TEXT = {"vocab_size": 20, "max_position_embeddings": 16, "num_labels": CLASSES, **SIZES}
GPT = {
    "vocab_size": 20,
    "n_positions": 16,
    "n_embd": WIDTH,
    "n_layer": 3,
    "n_head": HEADS,
    "num_labels": CLASSES,
    "n_inner": 12,
}
GPT |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
IMAGE = {"image_size": 8, "patch_size": 4, "num_labels": CLASSES, "hidden_dropout_prob": 0.1, **SIZES}


class Classifier(nn.Module):
    """Logits of sequences by torch's encoder, and the mean of the tokens that are seen."""

    def __init__(self, depth=3, batch_first=True, tokens=False, **options):
        super().__init__()
        self.tokens, self.batch_first = tokens, batch_first
        self.embed = nn.Linear(3, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, batch_first=batch_first, **options)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x, mask=None, padding_mask=None):
        h = self.encoder(self.embed(x), mask=mask, src_key_padding_mask=padding_mask)
        if self.tokens:
            return self.head(h)
        h = h if self.batch_first else h.transpose(0, 1)
        if padding_mask is None:
            return self.head(h.mean(1))
        seen = (~padding_mask).unsqueeze(-1).to(h.dtype)
        return self.head((h * seen).sum(1) / seen.sum(1))


class Attention(nn.Module):
    """With the parts and the masks of timm's."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x, attn_mask=None, is_causal=False):
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop.p if self.training else 0.0
        heads = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout, is_causal)
        return self.proj(heads.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """With the parts of timm's."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = nn.LayerNorm(WIDTH), Attention(), Scale(), nn.Identity()
        self.norm2, self.mlp, self.ls2, self.drop_path2 = nn.LayerNorm(WIDTH), Mlp(), Scale(), nn.Identity()

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(nn.Module):
    """With the parts of timm's."""

    def __init__(self, depth=3):
        super().__init__()
        self.patch_embed = nn.Linear(3, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x, attn_mask=None, is_causal=False):
        x = self.patch_embed(x)
        for block in self.blocks:
            x = block(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.head(self.norm(x)[:, 0])


@dataclass
class Host:
    """A teacher and a call of it.

    Attributes:
        model: in eval mode.
        inputs: by name.
        hidden: which tokens do not see which, ``(B, T, T)``.
        activation: of its perceptrons.
    """

    model: nn.Module
    inputs: dict[str, Any]
    hidden: Tensor
    activation: Any = nn.functional.gelu

    def logits(self, model=None):
        output = (self.model if model is None else model)(**self.inputs)
        return output if isinstance(output, Tensor) else output.logits


def hidden_keys(padding=None, causal=False):
    """Which tokens do not see which, ``(B, T, T)``."""
    hidden = torch.zeros(BATCH, LENGTH, LENGTH).bool()
    if padding is not None:
        hidden = hidden | padding[:, None]
    return hidden | FUTURE if causal else hidden


def _torch(dtype, padding=None, causal=False, batch_first=True, **options):
    model = moved(Classifier(batch_first=batch_first, **options), dtype)
    x = torch.randn(BATCH, LENGTH, 3, dtype=dtype)
    inputs = {"x": x if batch_first else x.transpose(0, 1).contiguous()}
    inputs |= {} if padding is None else {"padding_mask": padding}
    inputs |= {"mask": FUTURE} if causal else {}
    activation = nn.functional.gelu if options.get("activation") == "gelu" else torch.relu
    return Host(model, inputs, hidden_keys(padding, causal), activation)


def _hugging_face(kind, dtype, attention="sdpa", padding=None, causal=False):
    transformers = pytest.importorskip("transformers", minversion="5")
    name, config, sizes = {
        "bert": ("BertForSequenceClassification", "BertConfig", TEXT),
        "bert decoder": ("BertModel", "BertConfig", {**TEXT, "is_decoder": True}),
        "vit": ("ViTForImageClassification", "ViTConfig", IMAGE),
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
        "gpt2 classes": ("GPT2ForSequenceClassification", "GPT2Config", GPT),
    }[kind]
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes, attn_implementation=attention))
    model = moved(model, dtype)
    activation = nn.functional.gelu
    if kind == "vit":
        inputs = {"pixel_values": torch.randn(BATCH, 3, 8, 8, dtype=dtype)}
    else:
        ids = torch.randint(4, 20, (BATCH, LENGTH))
        inputs = {"input_ids": ids if padding is None else ids.masked_fill(padding, 0)}
        inputs |= {} if padding is None else {"attention_mask": (~padding).long()}
    if kind.startswith("gpt2"):

        def activation(x):
            return nn.functional.gelu(x, approximate="tanh")

    return Host(model, inputs, hidden_keys(padding, causal), activation)


def _timm(dtype, **inputs):
    model = moved(VisionTransformer(), dtype)
    x = torch.randn(BATCH, LENGTH, 3, dtype=dtype)
    causal = bool(inputs)
    return Host(model, {"x": x, **inputs}, hidden_keys(None, causal))


HOSTS = {
    "torch pre": lambda dtype: _torch(dtype, norm_first=True),
    "torch post": lambda dtype: _torch(dtype, activation="gelu"),
    "torch pre padded": lambda dtype: _torch(dtype, PADDING, norm_first=True),
    "torch post padded": lambda dtype: _torch(dtype, PADDING),
    "torch pre causal padded": lambda dtype: _torch(dtype, PADDING, True, norm_first=True),
    "torch time first": lambda dtype: _torch(dtype, PADDING, False, False),
    "vit": lambda dtype: _hugging_face("vit", dtype),
    "bert": lambda dtype: _hugging_face("bert", dtype),
    "bert padded": lambda dtype: _hugging_face("bert", dtype, padding=PADDING),
    "bert eager padded": lambda dtype: _hugging_face("bert", dtype, "eager", PADDING),
    "gpt2": lambda dtype: _hugging_face("gpt2", dtype, causal=True),
    "gpt2 padded": lambda dtype: _hugging_face("gpt2", dtype, "sdpa", PADDING, True),
    "gpt2 eager left": lambda dtype: _hugging_face("gpt2", dtype, "eager", LEFT, True),
    "gpt2 left": lambda dtype: _hugging_face("gpt2", dtype, "sdpa", LEFT, True),
    "gpt2 classes": lambda dtype: _hugging_face("gpt2 classes", dtype, "sdpa", PADDING, True),
    "timm": lambda dtype: _timm(dtype),
    "timm causal": lambda dtype: _timm(dtype, is_causal=True),
    "timm masked": lambda dtype: _timm(dtype, attn_mask=~FUTURE),
}


def moved(model, dtype=torch.float64, by=0.2):
    """Away from zeros and ones, in eval mode."""
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return model


# --- by hand ----------------------------------------------------------------------------------------------------------

NORMS = {
    "torch": ("norm1", "norm2"),
    "timm": ("norm1", "norm2"),
    "ViT": ("layernorm_before", "layernorm_after"),
    "GPT-2": ("ln_1", "ln_2"),
    "BERT": ("attention.output.LayerNorm", "output.LayerNorm"),
}


def first_state(host: Host) -> Tensor:
    """What enters the first block, ``(B, T, D)``."""
    model, inputs = host.model, host.inputs
    if isinstance(model, Classifier):
        x = model.embed(inputs["x"])
        return x if model.batch_first else x.transpose(0, 1)
    if isinstance(model, VisionTransformer):
        return model.patch_embed(inputs["x"])
    if hasattr(model, "transformer"):
        ids = inputs["input_ids"]
        return model.transformer.wte(ids) + model.transformer.wpe.weight[: ids.shape[1]]
    inner = next(iter(model.children()))
    return inner.embeddings(inputs.get("pixel_values", inputs.get("input_ids")))


def states_by_hand(host: Host, blocks: tuple[nn.Module, ...]) -> list[Tensor]:
    """States after attention, from matrices and norms of the blocks alone."""
    x = first_state(host)
    states = [x]
    for block in blocks:
        kind = find_kind(block)
        parts = kind.parts(block)
        norms = [block.get_submodule(name) for name in NORMS[kind.name]]
        post = kind.name == "BERT" or (kind.name == "torch" and not block.norm_first)
        scales = [block.ls1, block.ls2] if kind.name == "timm" else [lambda v: v] * 2
        n = x if post else norms[0](x)
        x = x + scales[0](attention_by_hand(n, parts, host.hidden))
        x = norms[0](x) if post else x
        states.append(x)
        n = x if post else norms[1](x)
        hidden = host.activation(n @ parts["up"].mT + parts["up.bias"])
        x = x + scales[1](hidden @ parts["down"].mT + parts["down.bias"])
        x = norms[1](x) if post else x
    return states


def attention_by_hand(n: Tensor, parts: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """Softmax attention; a query that sees nothing is padding, and whatever it gives."""
    query, key, value = (n @ parts["in"].mT + parts["in.bias"]).unflatten(-1, (3, HEADS, -1)).unbind(-3)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(hidden[:, None, : n.shape[1], : n.shape[1]], -torch.inf)
    heads = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(), value)
    return heads.flatten(-2) @ parts["out"].mT + parts["out.bias"]


# --- kernels ----------------------------------------------------------------------------------------------------------


class Replay(nn.Module):
    """The teacher's own transition for each time, without spread."""

    def __init__(self, path: Path, variance: float = 0.0) -> None:
        super().__init__()
        self.steps, self.variance = nn.ModuleList(transitions(path)), variance

    def conditional(self, x, t, mask=None):
        mean = self.steps[round(float(t) * len(self.steps)) - 1](x)
        return mean, torch.full_like(mean, self.variance)


class Linear(nn.Module):
    r"""A linear map with constant noise, ``N(A x + b, diag v)``, at every token."""

    def __init__(self, width=WIDTH, variance=0.1, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(width, width, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(width, dtype=dtype))
        self.register_buffer("variance", variance * torch.rand(width, dtype=dtype).add(0.5))

    def forward(self, x):
        return x @ self.weight.mT + self.bias

    def conditional(self, x, t=None, mask=None):
        return self(x), self.variance.expand_as(x)


class Seen(nn.Module):
    """A kernel that notes what it is told, and averages over what a token may see."""

    def __init__(self):
        super().__init__()
        self.masks: list[Masks] = []
        self.scale = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

    def conditional(self, x, t, mask=None):
        self.masks.append(mask)
        return self.scale.to(x) * x, torch.full_like(x, 0.01)


def linear_student(model, points="block", variance=0.1):
    """A student whose every step is one linear map with constant noise."""
    return make_student(model, find_stack(model, points), Linear(variance=variance))[0]

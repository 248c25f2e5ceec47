"""Rules for the modules that people have; importing this registers them."""

from gpseq.propagation.rules import (
    attention,
    basic,
    bert,
    convolution,
    embedding,
    gpt2,
    huggingface,
    norms,
    resampling,
    sources,
    timm,
    transformer,
    vit,
)

__all__ = [
    "attention",
    "basic",
    "bert",
    "convolution",
    "embedding",
    "gpt2",
    "huggingface",
    "norms",
    "resampling",
    "sources",
    "timm",
    "transformer",
    "vit",
]

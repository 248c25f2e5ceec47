"""Gaussian-process layers for neural networks: plain ``torch.nn`` modules."""

from gpseq.nn.attention import SGPAttention
from gpseq.nn.divergence import kl_divergence
from gpseq.nn.generator import use_generator
from gpseq.nn.kep import KEPAttention
from gpseq.nn.rff import RFFAttention

__all__ = ["KEPAttention", "RFFAttention", "SGPAttention", "kl_divergence", "use_generator"]

"""Attention as a sparse Gaussian process: pure functions on tensors with a head axis."""

from gpseq.sgpa.causal import causal_linear_attention, prefix_kl
from gpseq.sgpa.decoding import DecodingState, decode
from gpseq.sgpa.decoupled import decoupled_posterior
from gpseq.sgpa.draws import joint_sample, marginal_sample, pathwise_noise
from gpseq.sgpa.inducing import inducing_features, inducing_posterior
from gpseq.sgpa.posterior import AttentionPosterior
from gpseq.sgpa.rbf import rbf_covariance, rbf_product
from gpseq.sgpa.scales import DiagonalScale, LowRankScale
from gpseq.sgpa.standard import standard_posterior
from gpseq.sgpa.weights import attention_weights
from gpseq.sgpa.whitening import Whitening, whiten

__all__ = [
    "AttentionPosterior",
    "DecodingState",
    "DiagonalScale",
    "LowRankScale",
    "Whitening",
    "attention_weights",
    "causal_linear_attention",
    "decode",
    "decoupled_posterior",
    "inducing_features",
    "inducing_posterior",
    "joint_sample",
    "marginal_sample",
    "pathwise_noise",
    "prefix_kl",
    "rbf_covariance",
    "rbf_product",
    "standard_posterior",
    "whiten",
]

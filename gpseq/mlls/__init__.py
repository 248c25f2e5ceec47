"""Objectives of training loops."""

from gpseq.mlls.streaming_elbo import StreamingELBO

__all__ = ["StreamingELBO"]

"""Variational strategies: what is believed about u, and what follows for f."""

from gpseq.variational import online
from gpseq.variational.interdomain import InterdomainVariationalStrategy
from gpseq.variational.online import OnlineState
from gpseq.variational.prior import Prior
from gpseq.variational.streaming import StreamingVariationalStrategy

__all__ = ["InterdomainVariationalStrategy", "OnlineState", "Prior", "StreamingVariationalStrategy", "online"]

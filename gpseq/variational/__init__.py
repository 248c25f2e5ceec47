"""Variational strategies: what is believed about u, and what follows for f."""

from gpseq.variational import online, sites
from gpseq.variational.belief import Belief
from gpseq.variational.decoupled_sgpa import DecoupledSGPAVariationalStrategy
from gpseq.variational.interdomain import InterdomainVariationalStrategy
from gpseq.variational.multitask import IndependentMultitaskVariationalStrategy, LMCVariationalStrategy
from gpseq.variational.online import OnlineState
from gpseq.variational.prior import ModelPrior, Prior
from gpseq.variational.sgpa import SGPAVariationalStrategy
from gpseq.variational.streaming import StreamingVariationalStrategy

__all__ = [
    "Belief",
    "DecoupledSGPAVariationalStrategy",
    "IndependentMultitaskVariationalStrategy",
    "InterdomainVariationalStrategy",
    "LMCVariationalStrategy",
    "ModelPrior",
    "OnlineState",
    "Prior",
    "SGPAVariationalStrategy",
    "StreamingVariationalStrategy",
    "online",
    "sites",
]

"""Gaussian-process layers for neural networks: plain ``torch.nn`` modules."""

from gpseq.nn.attention import SGPAttention
from gpseq.nn.calibration import Calibration, calibrate
from gpseq.nn.conversion import ConversionWarning
from gpseq.nn.covariance import fit_covariance
from gpseq.nn.diagnosis import Diagnosis, LayerDiagnosis, diagnose
from gpseq.nn.divergence import kl_divergence
from gpseq.nn.generator import use_generator
from gpseq.nn.kep import KEPAttention
from gpseq.nn.noise import calibrate_noise
from gpseq.nn.objective import linear_annealing, variational_loss
from gpseq.nn.placement import init_inducing
from gpseq.nn.refitting import CovarianceRefit
from gpseq.nn.rff import RFFAttention
from gpseq.nn.sampling import use_sampling
from gpseq.nn.surgery import replace_attention
from gpseq.nn.transformer import SGPATransformerEncoder, SGPATransformerEncoderLayer

__all__ = [
    "Calibration",
    "ConversionWarning",
    "CovarianceRefit",
    "Diagnosis",
    "KEPAttention",
    "LayerDiagnosis",
    "RFFAttention",
    "SGPATransformerEncoder",
    "SGPATransformerEncoderLayer",
    "SGPAttention",
    "calibrate",
    "calibrate_noise",
    "diagnose",
    "fit_covariance",
    "init_inducing",
    "kl_divergence",
    "linear_annealing",
    "replace_attention",
    "use_generator",
    "use_sampling",
    "variational_loss",
]

"""Sequence generative models: GP-prior VAEs over time, and pseudo-video self-supervision."""

from gpseq.generative.averaging import average_weights
from gpseq.generative.corruption_base import Compose, Corruption
from gpseq.generative.corruptions import (
    Downsample,
    GaussianBlur,
    GaussianNoise,
    Grayscale,
    Mask,
    SeparableCorruption,
    blur_matrix,
)
from gpseq.generative.diffusion import DiffusionTerms, VideoDiffusion
from gpseq.generative.frames import pseudo_video
from gpseq.generative.geco import Geco
from gpseq.generative.gp_vae import GPPriorVAE, GPPriorVAEOutput
from gpseq.generative.hvae import HVAE, HVAETerms
from gpseq.generative.image_features import ImageFeatures
from gpseq.generative.information import InformationReport, information_report
from gpseq.generative.markov import MarkovPosterior, MarkovPrior
from gpseq.generative.noise_schedule import NoiseSchedule
from gpseq.generative.observations import BernoulliObservations, GaussianObservations
from gpseq.generative.pseudo_video_dataset import PseudoVideo
from gpseq.generative.quantiser import CodebookUse, Quantised, VectorQuantiser, codebook_use
from gpseq.generative.sparse import SparsePosterior, SparsePrior
from gpseq.generative.token_prior import TokenPrior
from gpseq.generative.two_stage import VideoTokenModel
from gpseq.generative.unet import SpaceTimeUNet
from gpseq.generative.video_vq import VideoVQ, VideoVQTerms

__all__ = [
    "HVAE",
    "BernoulliObservations",
    "CodebookUse",
    "Compose",
    "Corruption",
    "DiffusionTerms",
    "Downsample",
    "GPPriorVAE",
    "GPPriorVAEOutput",
    "GaussianBlur",
    "GaussianNoise",
    "GaussianObservations",
    "Geco",
    "Grayscale",
    "HVAETerms",
    "ImageFeatures",
    "InformationReport",
    "MarkovPosterior",
    "MarkovPrior",
    "Mask",
    "NoiseSchedule",
    "PseudoVideo",
    "Quantised",
    "SeparableCorruption",
    "SpaceTimeUNet",
    "SparsePosterior",
    "SparsePrior",
    "TokenPrior",
    "VectorQuantiser",
    "VideoDiffusion",
    "VideoTokenModel",
    "VideoVQ",
    "VideoVQTerms",
    "average_weights",
    "blur_matrix",
    "codebook_use",
    "information_report",
    "pseudo_video",
]

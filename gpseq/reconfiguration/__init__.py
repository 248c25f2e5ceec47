"""Reconfiguration: a pre-trained transformer distilled into one probabilistic step that is applied again and again."""

from gpseq.reconfiguration.blocks import BlockKind, register_block
from gpseq.reconfiguration.calibration import calibrate_spread
from gpseq.reconfiguration.calls import Call
from gpseq.reconfiguration.distiller import Distiller
from gpseq.reconfiguration.kernel import GatedBlock, TransitionKernel
from gpseq.reconfiguration.masks import Masks
from gpseq.reconfiguration.objectives import gaussian_kl
from gpseq.reconfiguration.path import Path, Transition, capture, transitions
from gpseq.reconfiguration.rollout import Record, Rollout, drawing, recording_steps
from gpseq.reconfiguration.spread import Ensemble, GaussianAttention, MonteCarlo, teacher_moments
from gpseq.reconfiguration.stack import Stack, find_stack
from gpseq.reconfiguration.student import path_nll, with_steps

__all__ = [
    "BlockKind",
    "Call",
    "Distiller",
    "Ensemble",
    "GatedBlock",
    "GaussianAttention",
    "Masks",
    "MonteCarlo",
    "Path",
    "Record",
    "Rollout",
    "Stack",
    "Transition",
    "TransitionKernel",
    "calibrate_spread",
    "capture",
    "drawing",
    "find_stack",
    "gaussian_kl",
    "path_nll",
    "recording_steps",
    "register_block",
    "teacher_moments",
    "transitions",
    "with_steps",
]

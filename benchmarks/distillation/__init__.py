"""Transformers distilled into one probabilistic transition, beside their teachers and other ways to calibration."""

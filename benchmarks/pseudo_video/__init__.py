"""Pseudo-videos: families of models, their controls, one command, and the report."""

"""Gaussian-process sequences: sequence-aware Gaussian processes for GPyTorch.

``import gpseq`` costs nothing: the subpackages are imported when they are first used.

Example:
    >>> import gpseq
    >>> len(gpseq.datasets.load_solar())
    391
"""

# A literal above every import, so that building the package reads it without importing torch.
__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpseq import (
        continual,
        datasets,
        distributed,
        features,
        generative,
        hippo,
        integrations,
        kernels,
        likelihoods,
        linalg,
        logits,
        metrics,
        mlls,
        models,
        nn,
        plots,
        prediction,
        predictive,
        propagation,
        reconfiguration,
        sgpa,
        spread,
        storage,
        testing,
        training,
        variational,
    )
    from gpseq.prediction import predict
    from gpseq.predictive import Predictive

__all__ = [
    "Predictive",
    "__version__",
    "continual",
    "datasets",
    "distributed",
    "features",
    "generative",
    "hippo",
    "integrations",
    "kernels",
    "likelihoods",
    "linalg",
    "logits",
    "metrics",
    "mlls",
    "models",
    "nn",
    "plots",
    "predict",
    "prediction",
    "predictive",
    "propagation",
    "reconfiguration",
    "sgpa",
    "spread",
    "storage",
    "testing",
    "training",
    "variational",
]

# What stands at the top although it lives in a module.
_HOME = {"Predictive": "predictive", "predict": "prediction"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"gpseq.{_HOME[name]}"), name)
    if name in __all__:
        return import_module(f"gpseq.{name}")
    raise AttributeError(f"module 'gpseq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

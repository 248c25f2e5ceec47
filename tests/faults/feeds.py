"""What the tests of faults share: the command and its feed, and models that learn from tensors."""

import copy
import io
import math
import sys
from pathlib import Path
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

import gpseq
from gpseq import cli, stream_run, stream_setup
from gpseq.features import HippoFeatures
from gpseq.models import StreamingFleet, StreamingGP
from tests.oracles_streaming import F64, assert_close, draw, gpytorch_kernel

# The command

NUM_ROWS, CHUNK = 60, 15
HEADER = "t,y\n"


def rows(times: Any = None) -> list[str]:
    """Lines of a wave with a little noise."""
    noise = torch.randn(NUM_ROWS, generator=torch.Generator().manual_seed(1)).tolist()
    times = [i / 4 for i in range(NUM_ROWS)] if times is None else times
    return [f"{t},{50 * math.sin(t * 0.7) + noise[i]}\n" for i, t in enumerate(times)]


OPTIONS = ["--time", "t", "--target", "y", "--chunk", str(CHUNK), "--features", "20"]
FILES = ["--state", "state", "--out", "out.csv"]

_FITTED: dict[tuple[str, bytes, bytes], tuple[Kernel, GaussianLikelihood]] = {}


def fit_once(kernel: str, x: Tensor, y: Tensor) -> tuple[Kernel, GaussianLikelihood]:
    """The same rows are fitted once, with the same result: most of the time of a short run goes there."""
    key = kernel, x.numpy().tobytes(), y.numpy().tobytes()
    if key not in _FITTED:
        _FITTED[key] = stream_setup.fit(kernel, x, y)
    return copy.deepcopy(_FITTED[key])


def begin_quickly(patch: pytest.MonkeyPatch) -> None:
    """One start of the fit, and no fit twice: the faults come after it."""
    patch.setattr(stream_setup, "LENGTHSCALE_STARTS", (0.1,))
    patch.setattr(stream_run, "fit", fit_once)


class Command:
    """Runs ``gpseq stream`` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *options: str, feed: list[str] | None = None) -> int:
        data = "table.csv"
        if feed is not None:
            data, lines = "-", HEADER + "".join(feed)
            self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        status = cli.main(["stream", data, *OPTIONS, *options])
        self.out, self.err = self.capsys.readouterr()
        return status

    @property
    def committed(self) -> int:
        """Chunks that it has reported."""
        return sum(line[:5].strip().isdigit() for line in self.out.splitlines())

    def failed_with(self, message: str) -> None:
        """The one line of the error."""
        assert self.err == f"gpseq: error: {message}\n", self.err


def result() -> list[bytes | None]:
    """State and predictions, as far as they are there."""
    return [Path(name).read_bytes() if Path(name).exists() else None for name in ("state", "out.csv")]


# Models and their data

AT = torch.linspace(0, 10, 21, dtype=F64)


def fleet(num: int = 3, **options: Any) -> StreamingFleet:
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = torch.tensor(0.1, dtype=F64)
    options = {"horizon_growth": "fixed"} | options
    return StreamingFleet(num, HippoFeatures(16, 10.0), gpytorch_kernel(), likelihood, **options).eval()


def own_series(num: int = 3, n: int = 24) -> tuple[Tensor, Tensor]:
    pairs = [draw(n, seed=s) for s in range(num)]
    return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])


def assert_alike(one: StreamingGP, other: StreamingGP, tolerance: float) -> None:
    """Both say the same about all times up to 10."""
    found, expected = one(AT), other(AT)
    assert_close(found.mean, expected.mean, tolerance)
    assert_close(found.covariance_matrix, expected.covariance_matrix, tolerance)


def poisson() -> StreamingGP:
    return StreamingGP(HippoFeatures(14, 4.0), gpytorch_kernel(), gpseq.likelihoods.PoissonLikelihood().double()).eval()

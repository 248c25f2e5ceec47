"""Ctrl-C while the command waits, and at any line of an update.

What is killed is in tests/test_kills.py.
"""

import copy
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import gpytorch
import pytest
import torch

import gpseq
from gpseq.features import HippoFeatures
from gpseq.models import SpaceTimeStreamingGP, StreamingEnsemble
from gpseq.stream_run import StreamRun
from tests.faults.feeds import CHUNK, FILES, HEADER, OPTIONS, fleet, poisson, result, rows
from tests.oracles_streaming import F64, assert_identical, draw, snapshot, stream


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_while_a_feed_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real process, which waits for the next row; the same command goes on with the same bytes."""
    monkeypatch.chdir(tmp_path)
    feed = rows()

    def start() -> subprocess.Popen[str]:
        # One start of the fit.
        code = (
            "import sys; from gpseq import cli, stream_setup as s; s.LENGTHSCALE_STARTS = (0.1,); sys.exit(cli.main())"
        )
        path = os.pathsep.join([str(Path(gpseq.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        # A process that was started in the background has the signal ignored, and so would have what it starts.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                [sys.executable, "-c", code, "stream", "-", *OPTIONS, *FILES],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        finally:
            signal.signal(signal.SIGINT, before)

    def finish(feed: list[str]) -> list[bytes]:
        with start() as process:
            _, err = process.communicate(HEADER + "".join(feed), timeout=120)
        assert process.returncode == 0, err
        return result()

    # All in processes of their own: this one's past may show in the last bits of a fit.
    whole = finish(feed)
    for name in ("state", "out.csv"):
        Path(name).unlink()
    process = start()
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(HEADER + "".join(feed[:38]))  # two chunks, and part of a third
    process.stdin.flush()
    shown = ""
    while not shown.startswith("    2 "):  # it has committed the second
        shown = process.stdout.readline()
        assert shown, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "\ngpseq: interrupted\n"
    assert StreamRun.load("state").rows == 2 * CHUNK
    assert finish(feed[30:]) == whole  # the feed sends what was not committed once more


def interrupted_at(call: Callable[[], Any], number: int | None) -> list[str]:
    """Call something and interrupt it before a line of it.

    Lines are those of gpseq, and all that run while a model is replaced. Returns of each line that ran whether it is of
    "gpseq", of gpseq while a model was replaced, "own", or of others meanwhile, "foreign"; this means that the call
    ended before the line was reached.
    """
    found: list[str] = []
    replacing = [0]
    own = str(Path(gpseq.__file__).parent)

    def tracer(frame: Any, event: str, argument: Any) -> Any:
        inside = frame.f_code.co_filename.startswith(own)
        if not inside and not replacing[0]:
            return None
        enters = inside and frame.f_code.co_name in ("_replace", "_put_back")
        replacing[0] += enters

        def lines(frame: Any, event: str, argument: Any) -> Any:
            if event == "return":
                replacing[0] -= enters
            if event == "line":
                found.append(("own" if inside else "foreign") if replacing[0] else "gpseq")
                if len(found) - 1 == number:
                    raise KeyboardInterrupt
            return lines

        return lines

    before, grad, collects = sys.gettrace(), torch.is_grad_enabled(), gc.isenabled()
    gc.disable()  # it would run lines of its own at any moment: of finalizers, and of what others have it call
    sys.settrace(tracer)
    try:
        call()
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()
        # An interruption between the last line of a with block and its end skips the end.
        torch.set_grad_enabled(grad)
    assert number is None or len(found) <= number, "the interruption was swallowed"
    return found


def spread(lines: list[str], kind: str, most: int) -> list[int]:
    """Numbers of lines of a kind, evenly spaced, the last one included."""
    numbers = [number for number, line in enumerate(lines) if line == kind][::-1]
    return numbers[:: -(-len(numbers) // most)]


def ready(kind: str) -> tuple[Any, Callable[[Any], Any]]:
    """A model that has learnt something, and an update that changes as much as can change at once."""
    x, y = draw(12, 4.0)
    more = draw(6, 9.0, 3.0, seed=1)
    if kind == "stretching":
        return stream(12, 4.0).update(x, y), lambda model: model.update(*more)
    if kind == "learning":
        return stream(12, 4.0, learn="basis_change").update(x, y), lambda model: model.update(*more)
    if kind == "counts":
        return poisson().update(x, y.abs().round()), lambda model: model.update(more[0], more[1].abs().round())
    if kind == "rebase":
        return stream(12, 4.0).update(x, y), lambda model: model.rebase(HippoFeatures(9, 6.0))
    if kind == "ensemble":
        members = [stream(12, 4.0, lengthscale=scale) for scale in (0.8, 1.3)]
        return StreamingEnsemble(members).update(x, y), lambda model: model.update(*more)
    if kind == "fleet":
        return fleet(horizon_growth=1.25).update(x, y.expand(3, -1)), lambda model: model.update(
            2 * more[0],  # behind its horizon
            more[1].expand(3, -1),
        )
    if kind == "some of a fleet":
        model = fleet().update(x, y.expand(3, -1))
        model.update(x[:2], y[:2].expand(1, -1), streams=[1])  # from now on the state is the fleet's own
        return model, lambda model: model.update(more[0], more[1].expand(2, -1), streams=[2, 0])
    assert kind == "space and time"
    places = torch.rand(4, 2, dtype=F64)
    kernels = gpytorch.kernels.RBFKernel().double(), gpytorch.kernels.RBFKernel().double()
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = SpaceTimeStreamingGP(HippoFeatures(10, 4.0), places[:3], places, *kernels, likelihood)
    model.update(x, y[:, None].expand(-1, 4))
    return model, lambda model: model.update(more[0], more[1][:, None].expand(-1, 4))


#: How many lines of each sort are tried: more where an update is quick, or puts back more than one thing.
KINDS = {
    "stretching": 4,
    "learning": 2,
    "counts": 2,
    "rebase": 5,
    "ensemble": 3,
    "fleet": 3,
    "some of a fleet": 7,
    "space and time": 3,
}


@pytest.mark.filterwarnings("ignore::gpseq.models.CapacityWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_at_any_line_of_an_update(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is the old one or the new one, whole; and the old one learns the same as if nothing had happened."""
    monkeypatch.setattr("gpseq.models.learning.STEPS", 1)
    model, update = ready(kind)
    update(copy.deepcopy(model))  # so that what is cached is cached

    def fresh() -> Any:
        new = copy.deepcopy(model)
        if kind == "some of a fleet":
            new.variational_strategy.belief._exclusive = True
        return new

    before, whole = snapshot(model), fresh()
    lines = interrupted_at(partial(update, whole), None)
    after = snapshot(whole)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert lines.count("own") > 4
    chosen = [number for at in ("own", "foreign", "gpseq") for number in spread(lines, at, KINDS[kind])]
    ends, uninterrupted = {"old": 0, "new": 0}, 0
    for number in chosen:
        hit, ended = fresh(), False
        with suppress(KeyboardInterrupt):
            interrupted_at(partial(update, hit), number)
            ended = True
        now = snapshot(hit)
        same = now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
        ends["old" if same else "new"] += 1
        uninterrupted += ended
        if ended or not same:
            assert_identical(hit, after)
        elif ends["old"] % 10 == 2:
            update(hit)
            assert_identical(hit, after)
    assert ends["old"] > ends["new"]
    assert uninterrupted <= 1  # the last line, should another run be a line shorter

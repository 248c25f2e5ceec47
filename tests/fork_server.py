"""Runs ``gpseq``, and jobs with checkpoints, in children that can be killed, and pays for the imports once.

A script. It imports everything, in one thread, and then answers each request, a line of JSON on standard input, with a
line of JSON on standard output. Request: ``argv`` of the command, or ``job`` and ``directory`` (see ``kill_jobs.py``),
and when the child dies by SIGKILL: ``kill_after`` (seconds), or ``kill_at`` (just before the n-th call that makes
something durable, from 1), or never. Answer: ``killed``, ``status``, ``seconds``.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch  # noqa: F401
import torch._dynamo  # noqa: F401  (torch.optim imports it at its first use)

from gpseq import cli, plots, stream_run, stream_setup  # noqa: F401
from tests.kill_jobs import JOBS

DURABLE = ("fsync", "replace")


def kill_at(count: int) -> None:
    """Let this process die before its ``count``-th durable call."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in DURABLE:
        setattr(os, name, counted(getattr(os, name)))


def child(request: dict[str, Any]) -> None:
    """What the child does; it does not return."""
    status = 99
    try:
        with open(os.devnull, "w") as quiet:
            sys.stdout, keep = quiet, sys.stdout
            if request.get("kill_at"):
                kill_at(request["kill_at"])
            if "job" in request:
                JOBS[request["job"]](Path(request["directory"]))
                status = 0
            else:
                status = cli.main(request["argv"])
            sys.stdout = keep
    finally:
        os._exit(status)


def main() -> None:
    """Answer requests until the input ends."""
    stream_setup.LENGTHSCALE_STARTS = (0.1,)
    for line in sys.stdin:
        request = json.loads(line)
        begun = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(request)
        if request.get("kill_after") is not None:
            time.sleep(request["kill_after"])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        answer = {"killed": os.WIFSIGNALED(status), "status": status, "seconds": time.monotonic() - begun}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""What the tests share: poisoned torch.empty, free ports, and processes that form a gloo group on loopback."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
_libc = ctypes.CDLL(None)          # loaded before any fork


def poison_empty(patch: Callable[[object, str, object], None] = setattr) -> None:
    """Make torch.empty, empty_like and Tensor.new_empty return NaN where they return floats.

    Memory that is read before it is written then shows, instead of being zero by luck. `patch` sets an attribute.
    """
    def poisoned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = function(*args, **kwargs)
            if tensor.is_floating_point() and kwargs.get("out") is None:
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor
        return call

    for owner, names in [(torch, ("empty", "empty_like", "empty_strided")),
                         (torch.Tensor, ("new_empty", "new_empty_strided"))]:
        for name in names:
            patch(owner, name, poisoned(getattr(owner, name)))


def free_port() -> int:
    """A TCP port that is free on loopback now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_parent() -> None:
    """Called in a child before it is another program: the kernel kills it when the process that started it ends."""
    PR_SET_PDEATHSIG = 1
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_distributed(nproc: int, script: str | Path, args: Sequence[str] = (), *, timeout: float = 280,
                    env: dict[str, str] | None = None, poison: bool = True, check: bool = True) -> list[str]:
    """Run `script args…` in `nproc` processes with torchrun's environment, on the CPU over loopback.

    Returns the output (stdout and stderr) of every rank. With `check`, an AssertionError that carries the outputs
    when a rank fails; a TimeoutError when they outlast `timeout` seconds. No process outlives the call,
    or this process.
    """
    base = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")])),
    } | (env or {})
    runner = [str(REPO / "tests" / "worker.py")] if poison else []
    logs = [tempfile.TemporaryFile("w+") for _ in range(nproc)]
    processes: list[subprocess.Popen] = []
    try:
        for rank, log in enumerate(logs):
            processes.append(subprocess.Popen(
                [sys.executable, *runner, str(script), *map(str, args)], stdout=log, stderr=subprocess.STDOUT,
                cwd=REPO, env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True,
                preexec_fn=die_with_parent))
        finished = _wait(processes, timeout)
    finally:
        for process in processes:
            _reap(process)
    outputs = []
    for log in logs:
        log.seek(0)
        outputs.append(log.read())
        log.close()
    told = "\n".join(f"--- rank {rank}, exit {process.returncode}\n{output[-4000:]}"
                     for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)))
    if not finished:
        raise TimeoutError(f"{nproc} processes of {script} outlasted {timeout} s\n{told}")
    assert not check or all(process.returncode == 0 for process in processes), told
    return outputs


def _wait(processes: list[subprocess.Popen], timeout: float) -> bool:
    """Until all have ended, or one has failed and the others had 5 s to follow; False on timeout."""
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        if time.monotonic() > end:
            return False
        if any(process.poll() for process in processes):
            end = min(end, time.monotonic() + 5)
            while time.monotonic() < end and any(process.poll() is None for process in processes):
                time.sleep(0.05)
            return True
        time.sleep(0.05)
    return True


def _reap(process: subprocess.Popen) -> None:
    """End the process and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

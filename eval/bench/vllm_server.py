"""A server of vLLM in a process of its own, from the environment that this one runs in."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Self
from urllib.error import URLError
from urllib.request import urlopen

from ...adapters.serving.versions import INSTALL
from ...prune.errors import VlmpruneError
from ..models.loading import ModelLoadError

_SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` is not in all distributions of it
_SLOWEST = 3600.0  # seconds: large weights from a slow disk, graphs of all batch sizes
_POLITE = 20.0
NAME = "served"
"""What requests call the model."""


class VllmServer(AbstractContextManager["VllmServer"]):
    """Started on entering; it answers once `wait` has returned."""

    def __init__(
        self,
        model: str,
        *,
        overrides: Mapping[str, object] | None,
        flags: Sequence[str],
        log: Path,
        port: int | None = None,
    ) -> None:
        """
        Args:
            model: a folder or a name on the Hub.
            overrides: what `vlmprune.vllm_args` gives as `hf_overrides`; None: vLLM's own model.
            flags: further ones of the server; what comes last counts.
            log: the file of all that it says.
            port: of this machine alone; None: one that is free.
        """
        self.port = _free_port() if port is None else port
        given = [] if overrides is None else ["--hf-overrides", json.dumps(overrides)]
        self._command = [sys.executable, "-m", _SERVER, "--model", model, "--host", "127.0.0.1"]
        self._command += ["--port", str(self.port), "--served-model-name", NAME]
        self._command += ["--trust-request-mm-kwargs", *given, *flags]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        with self._log.open("wb") as log:
            self._guard = _guard()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **quiet},
                process_group=self._guard.pid,  # its processes are ended together
            )
        return self

    def __exit__(self, *error: object) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLITE)
        self.kill()

    def kill(self) -> None:
        """End all its processes, at once."""
        if self._guard is None or self._process is None:
            return
        os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.communicate()
        self._process.wait()
        self._guard = self._process = None

    def wait(self) -> None:
        """Until it answers.

        Raises:
            ModelLoadError: it stopped, or takes too long; with the last it said.
        """
        until = time.monotonic() + _SLOWEST
        while time.monotonic() < until:
            if self._process is None or self._process.poll() is not None:
                raise ModelLoadError(f"vLLM stopped before it answered: {self._last_words()}")
            try:
                with urlopen(f"{self.url}/health", timeout=5):
                    return
            except (URLError, OSError):
                time.sleep(0.25)
        raise ModelLoadError(f"vLLM does not answer after {_SLOWEST:.0f} s: {self._last_words()}")

    def _last_words(self) -> str:
        """The last error in its log, else its last line."""
        lines = [one.strip() for one in self._log.read_text(errors="replace").splitlines()]
        errors = [one for one in lines if "Error" in one and "Engine core init" not in one]
        return (errors or [one for one in lines if one] or ["it said nothing"])[-1]


def _guard() -> subprocess.Popen[bytes]:
    """The first process of a new group, which kills the group once this process has ended, however
    it did: nobody else holds the other end of its input."""
    return subprocess.Popen(
        ["sh", "-c", "cat; kill -KILL 0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        process_group=0,
    )


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Where this process is told to end meanwhile, it leaves its blocks first, and with them the
    servers, which would else outlive it."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def refuse_without_vllm() -> None:
    """
    Raises:
        VlmpruneError: vLLM is not in this environment.
    """
    if find_spec("vllm") is None:
        raise VlmpruneError(
            f"vLLM is not installed here: --engine vllm runs in vLLM's own environment, which "
            f"adapters/serving/README.md says how to make ({INSTALL})."
        )


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])

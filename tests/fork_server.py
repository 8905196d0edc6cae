"""Processes that run a file of `examples/`, forked from one that has imported the package already.

Importing torch, diffusers and transformers takes seconds of each process, and tests of interrupted runs start many.
A forked process ends as any other: Python is finalized, with its handlers, and signals are those of a new process.
Unlike others, all have the same hashes of strings.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from tests.paths import ROOT


class Forked:
    """A process that [`start`] forked, with the methods of `subprocess.Popen`."""

    def __init__(self, record: Path, server: subprocess.Popen):
        self._record = record  # its process id, and later its exit code
        end = time.monotonic() + 120
        while not self._lines():
            assert time.monotonic() < end, "the server of forked processes does not answer"
            assert server.poll() is None, f"the server of forked processes ended with code {server.returncode}"
            time.sleep(0.002)
        self.pid = int(self._lines()[0])

    def _lines(self) -> list[str]:
        text = self._record.read_text() if self._record.exists() else ""
        return text[: text.rfind("\n") + 1].split()

    @property
    def returncode(self) -> int | None:
        lines = self._lines()
        return int(lines[1]) if len(lines) > 1 else None

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.returncode) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self._record), timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# one thread, no accelerator; output comes at once, and on SIGABRT Python prints where it stands
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
# and what they import in functions
MODULES = ("diffusers_vdm.commands.train_loop", "diffusers_vdm.commands.evaluate", "matplotlib.pyplot", "pandas",
           "sklearn.datasets", "torch.utils.flop_counter")  # fmt: skip
_records = tempfile.TemporaryDirectory()  # of all servers
_servers: dict[str, subprocess.Popen] = {}  # at most one


def start(command: list[str], place: dict[str, str], log: Path) -> Forked | subprocess.Popen:
    """Starts a script with arguments; its output is added to the file `log`.

    Its environment is that of this process, [`ENVIRONMENT`], and `place`. Each environment without its `place` has a
    server of its own, because much of it is read when modules are imported.
    """
    own = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} | ENVIRONMENT
    if not hasattr(os, "waitid"):
        with open(log, "ab") as stream:
            return subprocess.Popen([sys.executable, *command], env=own | place, stdout=stream, stderr=stream)
    key = json.dumps(own, sort_keys=True)
    if key not in _servers or _servers[key].poll() is not None:
        _close()
        words = [sys.executable, "-m", __name__]
        _servers[key] = subprocess.Popen(words, cwd=ROOT, env=own, stdin=subprocess.PIPE, text=True)
    record = str(Path(_records.name) / str(time.monotonic_ns()))
    request = {"command": command, "environment": own | place, "log": str(log), "record": record}
    print(json.dumps(request | {"folder": str(Path.cwd())}), file=_servers[key].stdin, flush=True)
    return Forked(Path(record), _servers[key])


@atexit.register
def _close() -> None:
    while _servers:
        _, server = _servers.popitem()
        with suppress(BrokenPipeError):
            server.stdin.close()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


# ---- in the server -----------------------------------------------------------------------------------------------


def serve() -> dict | None:
    """Forks for each request on standard input; returns it in the new process, and `None` at the end of the input."""
    for name in MODULES:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch
    for line in sys.stdin:
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return request
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with open(request["record"], "a") as record:
            print(pid, file=record, flush=True)
            # the process id is not free for others before the exit code is written
            end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            print(end.si_status if end.si_code == os.CLD_EXITED else -end.si_status, file=record, flush=True)
        os._exit(0)
    return None


def become(request: dict) -> None:
    """Makes this process the one of the request, and runs its script."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    np.random.seed()  # noqa: NPY002 - not that of the server
    sys.argv = request["command"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    found = serve()
    if found is not None:
        become(found)

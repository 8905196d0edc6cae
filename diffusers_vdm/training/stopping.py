"""Stop all processes of a run together, after a signal or a failure."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopped(Exception):
    """Raised by a request to stop within [`StopRequest.at_once`]."""


class StopRequest:
    """Handles SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 as requests to stop all processes between the same two steps.

    A context manager: within it, signals are recorded. Another Ctrl-C more than five seconds after the first ends the
    program immediately (a launcher may forward the first one twice).
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, num_processes: int = 1):
        self.signal: str | None = None
        self.error: Exception | None = None
        self.has_failed = False
        self._since = math.inf
        self._at_once = False
        # processes agree over a group on the CPU, which does not synchronize the accelerator
        self._group = torch.distributed.new_group(backend="gloo") if num_processes > 1 else None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        again = time.monotonic() - self._since > 5
        if self.signal is None:
            self.signal, self._since = signal.Signals(number).name, time.monotonic()
            print(f"\n{self.signal}: saving and stopping after this step", file=sys.stderr, flush=True)
        if self._at_once:
            raise Stopped(self.signal)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the context, a request raises [`Stopped`] immediately, for work that can be discarded.

        Each process raises on its own. If a collective fails because another process has left it, that error becomes
        `Stopped` as well.
        """
        self._at_once = True
        try:
            if self.signal is not None:
                raise Stopped(self.signal)
            yield
        except Exception as error:
            if self.signal is not None and not isinstance(error, Stopped):
                raise Stopped(self.signal) from error
            raise
        finally:
            self._at_once = False

    def fail(self, error: Exception) -> None:
        """Records an error of this process that prevents further steps; [`agreed`] reports it to the others."""
        self.error = error

    def agreed(self) -> bool:
        """Whether any process was asked to stop or failed; all must call it at the same step and get the same answer.

        Afterwards `has_failed` is whether any process failed; `error` is that of this process.
        """
        asked = 2.0 if self.error is not None else float(self.signal is not None)
        if self._group is not None:
            flag = torch.tensor(asked)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, self._group)
            asked = float(flag)
        self.has_failed = asked == 2
        if asked == 1 and self.signal is None:
            self.signal = "another process"
        return asked > 0

"""torch.compile for training: of the network alone, and only while it trains.

The objectives around the network check their inputs and register hooks, which would break the graph. Evaluations and
samples use the network without compilation, so that bits/dim do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_requested(accelerator: Any) -> bool:
    """Whether Accelerate is configured to compile, as by `accelerate launch --dynamo_backend inductor`."""
    return accelerator.state.dynamo_plugin.backend.value != "NO"


@contextmanager
def not_compiled_by(accelerator: Any) -> Iterator[None]:
    """Within the context, Accelerate compiles nothing; it would compile the whole objective."""
    from accelerate.utils import DynamoBackend

    plugin = accelerator.state.dynamo_plugin
    backend, plugin.backend = plugin.backend, DynamoBackend.NO
    try:
        yield
    finally:
        plugin.backend = backend


def compile_network(unet: nn.Module, accelerator: Any) -> None:
    """Compiles a network in place, at its first call, with the settings of Accelerate's configuration.

    Raises: `ValueError` if the compiler does not work here, after a trial with a small function.
    """
    settings = accelerator.state.dynamo_plugin.to_kwargs() if is_requested(accelerator) else {}
    try:
        torch.compile(lambda x: x.exp() + 1, **settings)(torch.zeros(2, device=accelerator.device))
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"compile needs a working compiler, which on a CPU is a C++ compiler such as g++, got {reason!r}; install "
            "one, or train without compilation."
        ) from error
    unet.compile(**settings)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within the context, compiled networks run as they do without compilation."""
    with torch.compiler.set_stance("force_eager"):
        yield

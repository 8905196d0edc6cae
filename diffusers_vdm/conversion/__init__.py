"""Convert official JAX checkpoints, addtt's PyTorch checkpoints and diffusers' DDPM pipelines."""

from importlib import import_module
from typing import Any

# γ(0) and γ(1) of the paper, which the checkpoints do not store
PAPER_ENDS = (-13.3, 5.0)

_MODULE_OF = {
    "load_official": "official",
    "save_official": "official",
    "load_addtt": "addtt",
    "save_addtt": "addtt",
    "load_diffusers": "diffusers",
    "scheduler_of": "diffusers",
}
__all__ = ["PAPER_ENDS", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)

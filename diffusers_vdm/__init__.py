"""Likelihood-based diffusion for Hugging Face Diffusers: Variational Diffusion Models and DDPM.

Names are imported on first use, so `import diffusers_vdm` imports neither torch nor diffusers.
"""

from importlib import import_module

from .components import MODULE_OF as _COMPONENTS

__version__ = "0.1.0"

_MODULE_OF = {
    **_COMPONENTS,
    "NoiseSchedule": "noise_schedules",
    "UNET_PRESETS": "unet",
    "VariationalBound": "objectives",
    "SimpleObjective": "objectives",
    "evaluate_bound": "evaluation.monte_carlo",
    "evaluate_bpd": "evaluation.all_terms",
    "best_timesteps": "evaluation.all_terms",
    "evaluate_ode": "evaluation.ode_density",
    "noise_schedule_of": "diffusers_schedulers",
    "VDMPipeline": "pipeline",
    "register": "registration",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])

"""Likelihood-based diffusion for Hugging Face Diffusers: Variational Diffusion Models and DDPM.

Names are imported on first use, so that `import diffusers_vdm` costs neither torch nor diffusers.
"""

from importlib import import_module

__version__ = "0.1.0"

_MODULE_OF = {
    "FixedLinearGamma": "noise_schedules",
    "LearnedLinearGamma": "noise_schedules",
    "MonotoneGammaNetwork": "noise_schedules",
    "LinearBetaGamma": "noise_schedules",
    "BetaGamma": "noise_schedules",
    "TableGamma": "noise_schedules",
    "NoiseSchedule": "noise_schedules",
    "VDMScheduler": "schedulers",
    "LinearBetaScheduler": "schedulers",
    "VDMUNet2DModel": "unet",
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

"""Likelihood-based diffusion for Hugging Face Diffusers: Variational Diffusion Models and DDPM.

Names are imported on first use, so `import diffusers_vdm` imports neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .components import MODULE_OF as _COMPONENTS

if TYPE_CHECKING:  # what `__getattr__` imports on first use
    from .calibration import Calibration
    from .diffusers_schedulers import noise_schedule_of
    from .evaluation.all_terms import best_timesteps, evaluate_bpd, evaluate_vlb
    from .evaluation.calibrate import calibrate
    from .evaluation.classes import evaluate_classes
    from .evaluation.monte_carlo import evaluate_bound, evaluate_mc
    from .evaluation.ode_density import evaluate_ode
    from .guidance import GuidedNetwork
    from .multiscale import MULTISCALE_PRESETS, VDMMultiscale2DModel
    from .noise_schedules import (
        BetaGamma,
        FixedLinearGamma,
        LearnedLinearGamma,
        LinearBetaGamma,
        MonotoneGammaNetwork,
        NoiseSchedule,
        TableGamma,
    )
    from .objectives import SimpleObjective, VariationalBound
    from .pipeline import VDMPipeline
    from .registration import register
    from .schedulers import LinearBetaScheduler, VDMScheduler
    from .text_unet import VDMUNet2DConditionModel
    from .unet import UNET_PRESETS, VDMUNet2DModel

__version__ = "0.1.0"

_MODULE_OF = {
    **_COMPONENTS,
    "NoiseSchedule": "noise_schedules",
    "UNET_PRESETS": "unet",
    "MULTISCALE_PRESETS": "multiscale",
    "VariationalBound": "objectives",
    "SimpleObjective": "objectives",
    "evaluate_mc": "evaluation.monte_carlo",
    "evaluate_vlb": "evaluation.all_terms",
    "evaluate_ode": "evaluation.ode_density",
    "best_timesteps": "evaluation.all_terms",
    "calibrate": "evaluation.calibrate",
    "evaluate_classes": "evaluation.classes",
    "GuidedNetwork": "guidance",
    "Calibration": "calibration",
    "noise_schedule_of": "diffusers_schedulers",
    "VDMPipeline": "pipeline",
    "register": "registration",
}

# names of earlier versions, which still work
_EARLIER_NAMES = {"evaluate_bound": "evaluate_mc", "evaluate_bpd": "evaluate_vlb"}

__all__ = ["__version__", *_MODULE_OF, *_EARLIER_NAMES]


def __getattr__(name: str) -> Any:
    current = _EARLIER_NAMES.get(name, name)
    if current not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[current]}", __name__), current)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF, *_EARLIER_NAMES])

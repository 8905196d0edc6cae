"""Register our classes with diffusers, for loading with `DiffusionPipeline`."""

import diffusers
from diffusers.pipelines import pipeline_loading_utils

from .components import MODULES
from .pipeline import VDMPipeline


def register() -> None:
    """Lets `DiffusionPipeline.from_pretrained` load our pipelines in this process.

    It adds two things and replaces nothing: the attribute `diffusers.VDMPipeline`, where diffusers looks up pipelines,
    and the modules of our components in `LOADABLE_CLASSES`, the libraries from which diffusers loads components. The
    format of saved pipelines does not change. Repeated calls have no further effect. `VDMPipeline.from_pretrained`
    does not need it and has stricter checks: `DiffusionPipeline` downloads and loads as diffusers does.

    Raises: `RuntimeError` if diffusers defines another class of that name.
    """
    found = getattr(diffusers, "VDMPipeline", VDMPipeline)
    if found is not VDMPipeline:
        raise RuntimeError(f"diffusers has its own VDMPipeline, {found}; use diffusers_vdm.VDMPipeline to load.")
    setattr(diffusers, "VDMPipeline", VDMPipeline)  # noqa: B010  type checkers do not know the attribute
    methods = ["save_pretrained", "from_pretrained"]
    for module in MODULES:
        base = "SchedulerMixin" if module == "schedulers" else "ModelMixin"
        pipeline_loading_utils.LOADABLE_CLASSES.setdefault(f"{__package__}.{module}", {base: methods})

"""Our classes made known to diffusers, for those who load by `DiffusionPipeline`."""

import diffusers
from diffusers.pipelines import pipeline_loading_utils

from .pipeline import VDMPipeline

_MODULES = ("noise_schedules", "schedulers", "unet")


def register() -> None:
    """Lets `DiffusionPipeline.from_pretrained` load our pipelines, until the process ends.

    Adds, and replaces nothing: the attribute `diffusers.VDMPipeline`, where diffusers looks pipelines up, and the
    three modules of our components to the table of libraries that diffusers loads components from
    (`LOADABLE_CLASSES`). The format of saved pipelines stays what it is; to call it twice is to call it once.
    `VDMPipeline.from_pretrained` needs none of this, and refuses more: `DiffusionPipeline` fetches and loads as
    diffusers does.

    Raises: `RuntimeError` if diffusers has another class of that name by now.
    """
    if getattr(diffusers, "VDMPipeline", VDMPipeline) is not VDMPipeline:
        raise RuntimeError(f"diffusers has a VDMPipeline of its own, {diffusers.VDMPipeline}: load by ours instead.")
    diffusers.VDMPipeline = VDMPipeline
    methods = ["save_pretrained", "from_pretrained"]
    for module in _MODULES:
        base = "SchedulerMixin" if module == "schedulers" else "ModelMixin"
        pipeline_loading_utils.LOADABLE_CLASSES.setdefault(f"{__package__}.{module}", {base: methods})

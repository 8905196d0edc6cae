"""Load pipelines of ours and of diffusers: register our classes with diffusers, and choose the class that loads."""

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
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


def pipeline_class(index: Mapping[str, Any]) -> Any:
    """The class that loads a saved pipeline with this index: [`VDMPipeline`] for its own, else `DiffusionPipeline`.

    Args:
        index (`Mapping`): the content of model_index.json, as `VDMPipeline.load_config` returns it.
    """
    return VDMPipeline if index["_class_name"] == "VDMPipeline" else DiffusionPipeline

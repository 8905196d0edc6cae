"""The classes that saved pipelines name, and their modules, which `model_index.json` stores: they never move."""

# class → module of this package; a new noise schedule that pipelines can hold is one more line
MODULE_OF = {
    "VDMUNet2DModel": "unet",
    "VDMScheduler": "schedulers",
    "LinearBetaScheduler": "schedulers",
    "FixedLinearGamma": "noise_schedules",
    "LearnedLinearGamma": "noise_schedules",
    "MonotoneGammaNetwork": "noise_schedules",
    "LinearBetaGamma": "noise_schedules",
    "BetaGamma": "noise_schedules",
    "TableGamma": "noise_schedules",
}
MODULES = tuple(dict.fromkeys(MODULE_OF.values()))
NOISE_SCHEDULES = tuple(name for name, module in MODULE_OF.items() if module == "noise_schedules")

PIPELINE = "VDMPipeline"
# the arguments of VDMPipeline.__init__ that are components, and whether a pipeline can be without
IS_OPTIONAL = {"unet": False, "scheduler": False, "noise_schedule": True}

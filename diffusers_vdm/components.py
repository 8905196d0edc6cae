"""Classes in saved pipelines and their modules. `model_index.json` stores both, so a class must never move."""

# class → module of this package; add a line for a new noise schedule that pipelines can contain
MODULE_OF = {
    "VDMUNet2DModel": "unet",
    "VDMMultiscale2DModel": "multiscale",
    "VDMUNet2DConditionModel": "text_unet",
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
# the arguments of VDMPipeline.__init__ that are components, and whether each is optional
IS_OPTIONAL = {"unet": False, "scheduler": False, "noise_schedule": True, "text_encoder": True, "tokenizer": True}
# those that are of transformers
OF_TRANSFORMERS = ("text_encoder", "tokenizer")

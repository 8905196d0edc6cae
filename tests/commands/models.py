"""A model that is measured, and the images that `evaluate` would measure it on."""

from pathlib import Path

from diffusers_vdm import FixedLinearGamma, VDMPipeline, VDMScheduler
from diffusers_vdm.commands.evaluate_options import load_data, load_model, parse_options
from tests.models import tiny_unet


def save_tiny_pipeline(tmp_path: Path, num_classes: int | None = None) -> Path:
    """The folder of a pipeline for images of 4×4 pixels, conditional if `num_classes` are given."""
    unet = tiny_unet(sample_size=4, num_class_embeds=num_classes, null_class=num_classes is not None)
    folder = tmp_path / f"model-{num_classes}"
    VDMPipeline(unet, VDMScheduler.from_noise_schedule(FixedLinearGamma())).save_pretrained(folder)
    return folder


def evaluation_data(tmp_path: Path, folder: Path, *arguments):
    """The images that evaluate.py takes with these arguments; `SystemExit` is the error that it ends with."""
    given = ["--model", str(folder), *map(str, arguments), "--cache_dir", str(tmp_path / "cache")]
    unet, _, num_levels, _, names = load_model(str(folder))
    return load_data(parse_options("", given), num_levels, unet.config.num_class_embeds, names, progress_bar=False)

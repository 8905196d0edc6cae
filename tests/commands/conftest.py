"""Models, images and trainings that several tests of the commands use."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from tests.models import tiny_preset, tiny_unet
from tests.pictures import picture, write_image_folder
from tests.running import SHORT_TRAINING, TRAINING_OPTIONS, run_example


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> tuple[Path, str]:
    """A folder that train.py left after six steps, which no test writes to; and what it printed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = run_example("train.py", "--output_dir", folder, *SHORT_TRAINING.split(), new_process=True)
    return folder, done.stdout


@pytest.fixture(scope="module")
def training_options(tmp_path_factory) -> list[str]:
    """Options of a training whose network has a few thousand parameters."""
    folder = tmp_path_factory.mktemp("network")
    tiny_preset().save_config(folder)
    return ["--model_config_name_or_path", str(folder), *TRAINING_OPTIONS.split()]


@pytest.fixture
def ddpm_and_images(tmp_path) -> list:
    """Options of evaluate.py: a checkpoint of diffusers with 100 steps, and seven images."""
    rng = np.random.default_rng(0)
    data = write_image_folder(tmp_path / "data", [picture(rng) for _ in range(8)])
    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(tiny_unet(UNet2DModel), scheduler).save_pretrained(tmp_path / "ddpm")
    return ["--model", tmp_path / "ddpm", "--data_dir", data, "--split", "train", "--cache_dir", tmp_path / "cache"]

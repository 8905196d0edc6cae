"""conversion/diffusers.py: pipelines and networks of diffusers become ours, or are refused."""

import json

import pytest
import torch

from diffusers_vdm import (
    LinearBetaScheduler,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
)
from diffusers_vdm.commands import convert
from diffusers_vdm.conversion.diffusers import load_diffusers
from tests.conversion.converted import ddpm_pipeline, samples


def test_a_pipeline_and_a_network_alone_are_converted(tmp_path, generator, capsys):
    theirs = ddpm_pipeline(
        num_train_timesteps=50, beta_end=0.03, prediction_type="v_prediction", variance_type="fixed_large"
    )
    theirs.save_pretrained(tmp_path / "ddpm")
    convert.main(["diffusers", str(tmp_path / "ddpm"), str(tmp_path / "ours")])
    assert "fixed_large" in capsys.readouterr().out
    arguments = ["diffusers", str(tmp_path / "ddpm" / "unet"), str(tmp_path / "two")]
    with pytest.raises(SystemExit, match="has no scheduler"):
        convert.main(arguments)
    convert.main([*arguments, "--scheduler", str(tmp_path / "ddpm" / "scheduler")])
    z = torch.randn(2, 3, 8, 8, generator=generator)
    for folder in ("ours", "two"):
        pipe = VDMPipeline.from_pretrained(tmp_path / folder)
        assert isinstance(pipe.unet, VDMUNet2DModel) and isinstance(pipe.scheduler, LinearBetaScheduler)
        with torch.no_grad():
            assert torch.equal(pipe.unet(z, 17).sample, theirs.unet(z, 17).sample)
        assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.clip_sample
        torch.testing.assert_close(pipe.scheduler.betas.float(), theirs.scheduler.betas, rtol=1e-5, atol=0)
        samples(pipe, tmp_path / "again")


def test_other_betas_become_a_table_of_levels(tmp_path):
    ddpm_pipeline(beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path / "cosine")
    pipe = load_diffusers(tmp_path / "cosine")
    pipe.save_pretrained(tmp_path / "ours")
    pipe = VDMPipeline.from_pretrained(tmp_path / "ours")
    theirs = ddpm_pipeline(beta_schedule="squaredcos_cap_v2").scheduler
    assert isinstance(pipe.scheduler, VDMScheduler) and pipe.scheduler.config.timestep_type == "index"
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [({"rescale_betas_zero_snr": True}, "zero SNR"), ({"thresholding": True}, "thresholding")],
    ids=["no signal", "thresholding"],
)
def test_schedulers_that_ours_cannot_hold_are_refused(tmp_path, scheduler, message):
    ddpm_pipeline(**scheduler).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        load_diffusers(tmp_path / "other")


def test_latent_models_are_refused(tmp_path):
    ddpm_pipeline().save_pretrained(tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    content = json.loads(index.read_text()) | {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="LDMPipeline of .*latent models"):
        load_diffusers(tmp_path / "other")


def test_a_scheduler_of_another_class_is_refused(tmp_path):
    ddpm_pipeline().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="must be one of diffusers' SchedulerMixin classes, got UNet2DModel"):
        load_diffusers(tmp_path / "other" / "unet", scheduler=tmp_path / "other" / "scheduler")


def test_a_network_of_another_class_is_refused(tmp_path):
    ddpm_pipeline().save_pretrained(tmp_path / "other")
    config = tmp_path / "other" / "unet" / "config.json"
    config.write_text(config.read_text().replace("UNet2DModel", "UNet2DConditionModel"))
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        load_diffusers(tmp_path / "other" / "unet")

"""whole_models.py: a model is loaded with all of its tensors, or not at all."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_vdm import MonotoneGammaNetwork, VDMPipeline, VDMScheduler
from tests.models import tiny_preset


@pytest.mark.parametrize(
    "model", [tiny_preset(), MonotoneGammaNetwork(-7.5, 5.0, hidden_dim=16)], ids=["unet", "gamma"]
)
def test_a_tensor_less_or_one_too_many_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(loaded.state_dict()[name], tensors[name])
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(ValueError, match=f"they lack {name}"):
        type(model).from_pretrained(tmp_path)
    save_file(tensors | {"another.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"too many, for another\.weight"):
        type(model).from_pretrained(tmp_path)


def test_a_pipeline_with_a_tensor_less_is_refused(tmp_path):
    pipeline = VDMPipeline(tiny_preset(), VDMScheduler(), None, num_levels=17)
    pipeline.save_pretrained(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in list(tensors)[:5]:
        del tensors[name]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="they lack .* and 2 more"):
        VDMPipeline.from_pretrained(tmp_path)

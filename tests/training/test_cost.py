"""training/cost.py: FLOPs by hand, and memory by what a real backward pass keeps."""

import pytest
import torch
from torch import nn

from diffusers_vdm import VDMUNet2DModel
from diffusers_vdm.training.cost import matmul_flops_per_second, training_cost
from tests.models import fixed_weights, tiny_preset


class OneConvolution(nn.Module):
    config = None

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, z_t, timesteps, return_dict=False):
        return (self.conv(z_t),)


def test_cost_of_a_convolution_by_hand():
    cost = training_cost(OneConvolution(), (3, 8, 8), num_averages=2)
    forward = 2 * 3 * 3 * 9 * 64
    assert cost.num_parameters == 3 * 3 * 9 + 3
    # a backward pass computes the gradient of the weights, and none of the images
    assert cost.flops_per_image == 2 * forward
    assert cost.activation_bytes_per_image == 4 * 3 * 64 and cost.fixed_bytes == 4 * 84 * 6
    assert cost.memory_bytes(10) == 4 * 84 * 6 + 10 * 4 * 3 * 64


def test_the_cost_of_a_network_on_a_device_is_that_on_a_cpu():
    unet = tiny_preset(num_class_embeds=3, null_class=True)
    assert training_cost(unet, (1, 8, 8)) == training_cost(unet.to("meta"), (1, 8, 8))


@pytest.mark.parametrize("conditional", [False, True])
def test_the_estimated_memory_is_what_a_network_keeps_for_its_backward_pass(conditional):
    labels = {"num_class_embeds": 3, "null_class": True} if conditional else {}
    with fixed_weights():
        unet = VDMUNet2DModel.from_preset("digits", dropout=0.0, **labels)
    state = [p.clone() for p in unet.parameters()]
    cost = training_cost(unet, (1, 8, 8))
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    conditions = {"class_labels": torch.zeros(8, dtype=torch.int64)} if conditional else {}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = unet(torch.zeros(8, 1, 8, 8), torch.zeros(8), return_dict=False, **conditions)[0]
    real = sum(storage.nbytes() for key, storage in kept.items() if key not in weights) / 8
    del output
    assert cost.activation_bytes_per_image == pytest.approx(real, rel=0.15)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(state, unet.parameters(), strict=True))
    assert cost.num_parameters == sum(p.numel() for p in unet.parameters())


def test_attention_adds_its_flops():
    """Each image attends over 64 tokens: 4 N² C for a forward pass, twice that for a backward pass."""
    plain, attending = (
        training_cost(tiny_preset(down_block_types=(block,), up_block_types=("UpBlock2D",)), (1, 8, 8)).flops_per_image
        for block in ("DownBlock2D", "AttnDownBlock2D")
    )
    projections = 4 * 2 * 64 * 8 * 8
    assert attending - plain == 3 * (projections + 4 * 64 * 64 * 8)


def test_the_rate_of_matrix_products_is_one():
    assert 1e8 < matmul_flops_per_second("cpu") < 1e14

"""training/optimizer.py: which weights Muon trains, what a step of it is, and what it shares with AdamW."""

import copy

import pytest
import torch
from torch import nn

from diffusers_vdm import MonotoneGammaNetwork, VDMMultiscale2DModel, VDMUNet2DModel
from diffusers_vdm.training.checkpoints import load_optimizer_tensors, optimizer_tensors
from diffusers_vdm.training.optimizer import MuonAdamW, parameter_groups
from tests.models import tiny_unet
from tests.tensors import normal, seeded

MULTISCALE = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 8}


def random_gradients(parameters, seed: int) -> None:
    generator = seeded(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    "unet", [tiny_unet(VDMUNet2DModel), VDMMultiscale2DModel(**MULTISCALE)], ids=["unet", "multiscale"]
)
def test_muon_trains_the_matrices_between_hidden_layers(unet):
    schedule = MonotoneGammaNetwork(hidden_dim=4, learn_ends=True)
    rest, of_gamma, hidden = parameter_groups(unet, schedule, 1e-2, 0.05)
    names = {id(parameter): name for name, parameter in unet.named_parameters()}
    found = {names[id(parameter)] for parameter in hidden["params"]}
    expected = {
        name
        for name, parameter in unet.named_parameters()
        if name.endswith("weight") and "norm" not in name and parameter.ndim > 1
        and not name.startswith(("conv_in", "conv_out", "time_embedding")) and ".time_emb_proj" not in name
    }  # fmt: skip
    assert found == expected and len(found) > 5
    assert len(rest["params"]) + len(hidden["params"]) == len(names)
    assert {id(p) for p in of_gamma["params"]} == {id(p) for p in schedule.parameters()}
    assert of_gamma["weight_decay"] == 0.0 and hidden["lr"] == 0.05


def test_a_step_of_muon_has_the_learning_rate_as_its_spectral_norm():
    """PyTorch's five iterations map singular values to 0.7 … 1.2; kernels are matrices with a row for each output."""
    kernel, matrix = nn.Parameter(normal(16, 8, 3, 3).float()), nn.Parameter(normal(64, 16, seed=1).float())
    before = [kernel.detach().clone(), matrix.detach().clone()]
    optimizer = MuonAdamW([{"params": [kernel, matrix], "lr": 0.1, "use_muon": True}], 1e-3, weight_decay=0.0)
    random_gradients([kernel, matrix], seed=2)
    optimizer.step()
    for parameter, old, scale in zip((kernel, matrix), before, (1.0, 2.0), strict=True):
        values = torch.linalg.svdvals((parameter.detach() - old).flatten(1)) / (0.1 * scale)
        assert 0.6 < float(values.min()) and float(values.max()) < 1.3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch 2.9 has the first torch.optim.Muon")
def test_steps_are_those_of_the_muon_of_pytorch():
    """Also for matrices of one shape, which are updated together, and for weight decay."""
    shapes = [(6, 4, 3, 3), (6, 36), (6, 4, 3, 3), (12, 5), (12, 5)]
    ours = [nn.Parameter(normal(*shape, seed=i).float()) for i, shape in enumerate(shapes)]
    theirs = [nn.Parameter(parameter.detach().flatten(1).clone()) for parameter in ours]
    own = MuonAdamW([{"params": ours, "lr": 0.1, "use_muon": True}], 1e-3, weight_decay=0.3)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, momentum=0.95)
    for step in range(4):
        random_gradients(ours, seed=step)
        for parameter, matrix in zip(ours, theirs, strict=True):
            matrix.grad = parameter.grad.flatten(1).clone()
        own.step()
        reference.step()
    for parameter, matrix in zip(ours, theirs, strict=True):
        torch.testing.assert_close(parameter.detach().flatten(1), matrix.detach(), rtol=0, atol=1e-5)


def test_the_other_groups_are_those_of_adamw():
    a, b = (nn.Parameter(normal(5, seed=s).float()) for s in (0, 1))
    matrix = nn.Parameter(normal(4, 4, seed=2).float())
    same = copy.deepcopy([a, b])
    groups = [{"params": [a]}, {"params": [b], "lr": 0.3, "weight_decay": 0.0}]
    own = MuonAdamW([*groups, {"params": [matrix], "lr": 0.1, "use_muon": True}], 0.01, (0.9, 0.99), 1e-8, 0.02)
    adamw = torch.optim.AdamW(
        [{"params": [same[0]]}, {"params": [same[1]], "lr": 0.3, "weight_decay": 0.0}], 0.01, (0.9, 0.99), 1e-8, 0.02,
        fused=True,
    )  # fmt: skip
    for step in range(4):
        random_gradients([a, b, matrix], seed=step)
        random_gradients(same, seed=step)
        own.step()
        adamw.step()
    assert torch.equal(a, same[0]) and torch.equal(b, same[1])
    assert len(own.param_groups) == 3


def test_steps_with_gradients_that_are_not_finite_change_nothing():
    kernel, bias = nn.Parameter(normal(4, 4, 3, 3).float()), nn.Parameter(normal(4).float())
    optimizer = MuonAdamW([{"params": [bias]}, {"params": [kernel], "lr": 0.1, "use_muon": True}], 1e-2)
    random_gradients([kernel, bias], seed=0)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    before = [kernel.clone(), bias.clone(), optimizer.state[kernel]["momentum_buffer"].clone()]
    kernel.grad[0, 0, 0, 0] = torch.nan
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    after = [kernel, bias, optimizer.state[kernel]["momentum_buffer"]]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    random_gradients([kernel, bias], seed=1)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(kernel, before[0]) and torch.isfinite(kernel).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_its_state_is_saved_and_loaded(memory_format):
    def build():
        kernel = nn.Parameter(normal(6, 4, 3, 3).float().to(memory_format=memory_format))
        bias = nn.Parameter(normal(6).float())
        return MuonAdamW([{"params": [bias]}, {"params": [kernel], "lr": 0.1, "use_muon": True}], 1e-2), [kernel, bias]

    (whole, parameters), (first, half) = build(), build()
    for step in range(3):
        random_gradients(parameters, seed=step)
        whole.step()
        random_gradients(half, seed=step)
        first.step()
    second, loaded = build()
    for new, old in zip(loaded, half, strict=True):
        new.data.copy_(old)
    load_optimizer_tensors(second, {k: v.clone() for k, v in optimizer_tensors(first).items()})
    for step in range(3, 6):
        for optimizer, tensors in ((whole, parameters), (second, loaded)):
            random_gradients(tensors, seed=step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, loaded, strict=True))


def test_the_memory_format_changes_nothing():
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        kernel = nn.Parameter(normal(6, 4, 3, 3).float().to(memory_format=memory_format))
        optimizer = MuonAdamW([{"params": [kernel], "lr": 0.1, "use_muon": True}], 1e-2)
        for step in range(3):
            random_gradients([kernel], seed=step)
            optimizer.step()
        results.append(kernel.detach())
    torch.testing.assert_close(*results)

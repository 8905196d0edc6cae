"""`VariationalBound` as one module under FSDP2: two real processes on the CPU, each with half of every parameter."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from diffusers_vdm import MonotoneGammaNetwork, VariationalBound, VDMUNet2DModel, training

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (world,))


def build():
    torch.manual_seed(0)
    unet = VDMUNet2DModel.from_preset(
        "digits", block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, attention_head_dim=8, dropout=0.0
    )
    return VariationalBound(unet, MonotoneGammaNetwork(-7.5, 5.0, hidden_dim=16, learn_ends=True), num_levels=17)


def step(bound, rows):
    optimizer = torch.optim.AdamW(bound.parameters(), 1e-3)
    averages = training.WeightAverages(list(bound.parameters()), [0.5])
    losses = []
    for k in range(3):
        generator = torch.Generator().manual_seed(k)
        images = torch.randint(0, 17, (8, 1, 8, 8), generator=generator)
        t = (torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(8) / 8) % 1
        eps, eps_0 = torch.randn(2, 8, 1, 8, 8, generator=generator)
        out = bound(images[rows], t=t[rows], eps=eps[rows], eps_0=eps_0[rows])
        optimizer.zero_grad()
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(bound.parameters(), 1.0)
        optimizer.step()
        averages.step()
        loss = out.loss.detach().clone()
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
            dist.all_reduce(loss)
            loss /= world
        losses += [float(loss), float(norm)]
    whole = lambda p: p.full_tensor() if isinstance(p, DTensor) else p
    with averages.lent():
        averaged = [whole(p.detach()).clone() for p in bound.parameters()]
    return losses, [whole(p.detach()) for p in bound.parameters()], averaged


expected = step(build(), slice(0, 8))
sharded = build()
for block in [*sharded.unet.down_blocks, sharded.unet.mid_block, *sharded.unet.up_blocks]:
    fully_shard(block, mesh=mesh)
fully_shard(sharded, mesh=mesh)
assert all(isinstance(p, DTensor) for p in sharded.parameters())
held = sum(p.to_local().numel() for p in sharded.parameters())
assert held < 0.6 * sum(p.numel() for p in sharded.parameters()), held
found = step(sharded, slice(4 * rank, 4 * rank + 4))
torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-6)
for name, ones, others in zip(("weights", "averages"), expected[1:], found[1:]):
    for a, b in zip(ones, others, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5, msg=name)
state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
if rank == 0:  # what is saved is what an unsharded model loads
    build().load_state_dict(state)
    print("the same")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_sharded_bound_trains_as_a_whole_one(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[1],
            )  # fmt: skip
        )
    outputs = [process.communicate(timeout=250) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][1][-3000:] + outputs[1][1][-1000:]
    assert "the same" in outputs[0][0]

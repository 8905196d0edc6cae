"""training/sharding.py: FSDP2 in two processes on the CPU, each with half of every parameter."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from diffusers_vdm import VDMPipeline
from tests.models import tiny_preset
from tests.paths import ROOT
from tests.running import TRAIN, TRAINING_OPTIONS, ranks, state_of, train

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from diffusers_vdm import MonotoneGammaNetwork, VariationalBound, VDMUNet2DModel
from diffusers_vdm.training.averages import WeightAverages
from diffusers_vdm.training.optimizer import MuonAdamW, parameter_groups

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (world,))


def build():
    torch.manual_seed(0)
    unet = VDMUNet2DModel.from_preset(
        "digits", block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, attention_head_dim=8, dropout=0.0
    )
    bound = VariationalBound(unet, MonotoneGammaNetwork(-7.5, 5.0, hidden_dim=16, learn_ends=True), num_levels=17)
    return bound.double()  # AdamW divides by √v, which in float32 turns rounding into steps of the learning rate


def step(bound, rows, kind):
    groups = parameter_groups(bound.unet, bound.noise_schedule, 1e-2, 1e-3 if kind == "muon" else None)
    optimizer = MuonAdamW(groups, 1e-3) if kind == "muon" else torch.optim.AdamW(groups, 1e-3)
    averages = WeightAverages(list(bound.parameters()), [0.5])
    losses = []
    for k in range(3):
        generator = torch.Generator().manual_seed(k)
        images = torch.randint(0, 17, (8, 1, 8, 8), generator=generator)
        t = (torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(8) / 8) % 1
        eps, eps_0 = torch.randn(2, 8, 1, 8, 8, generator=generator, dtype=torch.float64)
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
    with averages.applied():
        averaged = [whole(p.detach()).clone() for p in bound.parameters()]
    return losses, [whole(p.detach()) for p in bound.parameters()], averaged


for kind in ("adamw", "muon"):
    expected = step(build(), slice(0, 8), kind)
    sharded = build()
    for block in [*sharded.unet.down_blocks, sharded.unet.mid_block, *sharded.unet.up_blocks]:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    held = sum(p.to_local().numel() for p in sharded.parameters())
    assert held < 0.6 * sum(p.numel() for p in sharded.parameters()), held
    found = step(sharded, slice(4 * rank, 4 * rank + 4), kind)
    losses = [torch.tensor(values[0], dtype=torch.float64) for values in (found, expected)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0.0)
    for name, ones, others in zip(("weights", "averages"), expected[1:], found[1:]):
        for a, b in zip(ones, others, strict=True):
            torch.testing.assert_close(b, a, rtol=0.0, atol=1e-10, msg=f"{kind}: {name}")
state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
if rank == 0:  # what is saved is what an unsharded model loads
    build().load_state_dict(state)
    print("the same", flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # a thread of gloo may abort while Python is finalized (torch 2.13)
"""


def two(command, **environment):
    """Two processes of a program, to their end: their exit codes, and what each wrote."""
    processes = []
    for place in ranks(2):
        own = os.environ | {"OMP_NUM_THREADS": "1"} | place | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([sys.executable, *command], env=own, cwd=ROOT, **pipes))
    outputs = [process.communicate(timeout=280) for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.mark.slow
def test_a_sharded_bound_trains_as_a_whole_one(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SCRIPT)
    codes, outputs = two([str(script)])
    assert codes == [0, 0], outputs[0][1][-3000:] + outputs[1][1][-1000:]
    assert "the same" in outputs[0][0]


# Accelerate shards only on accelerators; with the CPU declared as one, it runs the same code
AS_ON_A_GPU = """
import runpy, sys
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}  # fmt: skip


@pytest.fixture(scope="module")
def train_sharded(tmp_path_factory):
    """`train_sharded(folder, *options)` runs train.py under FSDP2 and returns what it printed; its common options."""
    root = tmp_path_factory.mktemp("sharding")
    tiny_preset().save_config(root / "network")
    options = ["--model_config_name_or_path", str(root / "network"), *TRAINING_OPTIONS.split(), "--dropout", "0",
               "--max_train_steps", "8", "--logging_steps", "1", "--lr_scheduler", "constant"]  # fmt: skip
    script = root / "as_on_a_gpu.py"
    script.write_text(AS_ON_A_GPU)

    def train_sharded(folder, *more):
        command = [str(script), str(TRAIN), "--output_dir", str(folder), "--train_batch_size", "2", *options, *more]
        codes, outputs = two([*command, "--resume_from_checkpoint", "latest"], **FSDP2)
        assert codes == [0, 0], outputs[0][1][-3000:] + outputs[1][1][-1000:]
        return outputs[0][0]

    return train_sharded, options


@pytest.fixture(scope="module")
def sharded_run(train_sharded, tmp_path_factory):
    """The folder of a sharded run of eight steps, which no test writes to."""
    folder = tmp_path_factory.mktemp("runs") / "sharded"
    train_sharded[0](folder)
    return folder


def losses_of(folder, name="train_bpd"):
    return [line[name] for line in state_of(folder)[2] if name in line]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sharded_run_has_the_losses_of_a_run_with_whole_weights(train_sharded, sharded_run, tmp_path):
    train(tmp_path / "whole", train_sharded[1], processes=2, batch_size=2)
    for name in ("train_bpd", "eval_bpd", "eval_bpd_ema_0.9"):
        whole, sharded = (losses_of(folder, name) for folder in (tmp_path / "whole", sharded_run))
        assert whole == pytest.approx(sharded, rel=2e-4) and whole, name


@pytest.mark.slow
def test_a_sharded_network_is_not_compiled(train_sharded, tmp_path):
    with pytest.raises(AssertionError, match="FSDP shards cannot be compiled; leave out --compile"):
        train_sharded[0](tmp_path / "compiled", "--compile")
    assert not list((tmp_path / "compiled").glob("checkpoint*"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sharded_run_in_half_precision_saves_float32(train_sharded, sharded_run, tmp_path):
    half = tmp_path / "half"
    train_sharded[0](half, "--mixed_precision", "bf16", "--max_train_steps", "3", "--eval_steps", "0")
    losses = [losses_of(folder)[:3] for folder in (sharded_run, half)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    parameters = VDMPipeline.from_pretrained(half).unet.parameters()
    assert all(p.dtype.is_floating_point and p.element_size() == 4 for p in parameters)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sharded_run_is_resumed_bit_for_bit_and_by_one_process(train_sharded, sharded_run, tmp_path):
    (run, options), twice = train_sharded, tmp_path / "twice"
    run(twice, "--max_train_steps", "6", "--allow_changed", "max_train_steps")
    assert "resuming from" in run(twice, "--allow_changed", "max_train_steps")
    one, other = state_of(sharded_run), state_of(twice)
    assert one[0].keys() == other[0].keys() and [name for name in one[0] if one[0][name] != other[0][name]] == []
    # its checkpoints hold whole weights, so one process resumes from them
    train(twice, [*options, "--max_train_steps", "10", "--allow_changed", "max_train_steps"], batch_size=4)
    assert json.loads((twice / "options.json").read_text())["num_processes"] == 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_pipeline_of_a_sharded_run_has_the_averaged_weights(sharded_run):
    saved = load_file(sharded_run / "checkpoint-8" / "ema_0.999.safetensors")
    pipeline = VDMPipeline.from_pretrained(sharded_run)
    named = [*pipeline.unet.parameters(), *pipeline.noise_schedule.parameters()]
    assert all((saved[str(i)] == p).all() for i, p in enumerate(named)) and len(named) == len(saved) - 1

"""What only a GPU shows: no waiting within a step, one graph, the same numbers as on a CPU, the same run again.

pytest -m gpu tests/test_gpu.py
"""

import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from diffusers_vdm import MonotoneGammaNetwork, VariationalBound, evaluate_mc
from diffusers_vdm.commands.precision import bf16_speedup
from tests.models import curved_pipeline, network, tiny_multiscale
from tests.paths import EXAMPLES
from tests.running import SHORT_TRAINING, metrics_of, run_python, state_of
from tests.tensors import normal, random_levels, seeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),  # of other versions of torch
]
ON_GPU = {"ACCELERATE_USE_CPU": "0"}
# runs train.py, and prints where the process waits for the GPU within a step, for all but the first two
CHECKED = """
import runpy, sys, warnings
import torch
from diffusers_vdm.training.run import Run

train_step = Run.train_step

def checked(run):
    torch.cuda.set_sync_debug_mode("warn" if run.step >= 2 else "default")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        train_step(run)
    torch.cuda.set_sync_debug_mode("default")
    for warning in found:
        if "synchroniz" in str(warning.message):
            print(f"WAITS {warning.filename}:{warning.lineno}")

Run.train_step = checked
sys.argv[0] = PROGRAM
runpy.run_path(PROGRAM, run_name="__main__")
"""


def on_gpu(folder: Path, *options: str, program: tuple = (EXAMPLES / "train.py",)):
    """A short training on the GPU; returns the finished process."""
    given = ["--output_dir", folder, *SHORT_TRAINING.split(), "--logger", "none", *options]
    return run_python(*program, *given, environment=ON_GPU, timeout=280)


@pytest.mark.parametrize("preset", ["digits", "digits-fast"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_training_step_waits_for_the_gpu_at_most_once(tmp_path, preset, precision):
    """For the width of p(x | z_0), which depends on the learned γ_0."""
    program = ("-c", CHECKED.replace("PROGRAM", repr(str(EXAMPLES / "train.py"))))
    options = ("--preset", preset, "--mixed_precision", precision, "--random_flip", "--importance_sampling")
    done = on_gpu(tmp_path / "run", *options, "--class_conditional", program=program)
    assert metrics_of(tmp_path / "run")[-1]["step"] == 6
    waits = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("WAITS")]
    assert len(waits) == 4 and all("diffusion.py" in place for place in waits), waits


@pytest.mark.parametrize("options", [(), ("--mixed_precision", "bf16"), ("--preset", "digits", "--dropout", "0.1")])
def test_a_run_is_resumed_bit_for_bit(tmp_path, options):
    on_gpu(tmp_path / "whole", *options)
    (tmp_path / "resumed").mkdir()
    for name in ("options.json", "metrics.jsonl"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "resumed")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    on_gpu(tmp_path / "resumed", *options, "--resume_from_checkpoint", "latest")
    assert state_of(tmp_path / "whole") == state_of(tmp_path / "resumed")


@pytest.mark.parametrize("make", [network, tiny_multiscale])
def test_bits_per_dimension_are_those_of_a_cpu(make, monkeypatch):
    net, schedule = make(in_channels=3) if make is tiny_multiscale else make(), MonotoneGammaNetwork(hidden_dim=16)
    bound = VariationalBound(net, schedule)
    images = random_levels(6, 3, 8, 8)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as evaluate.py sets it
    found = [evaluate_mc(bound.to(device), images, num_samples=2, batch_size=4) for device in ("cpu", "cuda")]
    torch.testing.assert_close(found[1].draws_bpd.cpu(), found[0].draws_bpd, rtol=1e-5, atol=0)


def test_samples_are_those_of_a_cpu():
    pipe = curved_pipeline()
    drawn = [
        pipe.to(device)(batch_size=2, num_inference_steps=5, generator=seeded(3), output_type="latent").images.cpu()
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("make", [network, tiny_multiscale])
def test_a_network_trains_as_one_graph_without_recompilation(make):
    torch.compiler.reset()
    counters.clear()
    nets = [make(in_channels=3) if make is tiny_multiscale else make() for _ in range(2)]
    plain, compiled = (VariationalBound(net.train(), MonotoneGammaNetwork(hidden_dim=16)).cuda() for net in nets)
    compiled.unet.compile(fullgraph=True)
    for seed in range(3):
        draws = {"t": torch.tensor([0.2, 0.7]), "eps": normal(2, 3, 8, 8, seed=seed), "eps_0": normal(2, 3, 8, 8)}
        draws = {name: value.float().cuda() for name, value in draws.items()}
        losses = [bound(random_levels(2, 3, 8, 8, seed=seed).cuda(), **draws).loss for bound in (plain, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
        for loss in losses:
            loss.backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_half_precision_is_measured_to_be_faster():
    assert bf16_speedup(torch.device("cuda")) > 1.2

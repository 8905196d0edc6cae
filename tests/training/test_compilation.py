"""training/compilation.py: the network trains as one graph, and everything else is as without compilation."""

import re
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters

from diffusers_vdm import MonotoneGammaNetwork, VariationalBound
from diffusers_vdm.commands import train_budget
from diffusers_vdm.commands.train_options import parse_options
from diffusers_vdm.data.images import load_digits_split
from diffusers_vdm.training.compilation import uncompiled
from tests.models import network, tiny_multiscale, tiny_preset
from tests.running import SHORT_TRAINING, run_example, state_of, train
from tests.tensors import normal, random_levels

# of torch 2.13, which looks at the gradient of z_t, and of functions of diffusers; neither is printed by a training
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:Dynamo detected a call to")
# inductor itself uses what torch 2.13 deprecates
uses_inductor = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


def num_graphs() -> int:
    """The number of graphs that were compiled in this test."""
    return counters["stats"]["unique_graphs"]


def gradients(net: torch.nn.Module, seed: int, **conditions) -> list[torch.Tensor]:
    """The gradients of a training step with the images and noise of `seed`."""
    net.zero_grad()
    bound = VariationalBound(net, MonotoneGammaNetwork(hidden_dim=16))
    draws = {"t": torch.tensor([0.2, 0.7]), "eps": normal(2, 3, 8, 8, seed=seed + 1), "eps_0": normal(2, 3, 8, 8)}
    torch.manual_seed(seed)  # of dropout
    bound(random_levels(2, 3, 8, 8, seed=seed), **draws, **conditions).loss.backward()
    return [p.grad.clone() for p in bound.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("make", "flags"), [(network, {"augmentation_flag": True}), (tiny_multiscale, {"num_augmentation_flags": 1})]
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_network_trains_as_one_graph_without_recompilation(make, flags, checkpointed):
    given = {"in_channels": 3, "num_class_embeds": 3, "null_class": True, "dropout": 0.1} | flags
    plain, compiled = (make(**given).double().train() for _ in range(2))
    for net in (plain, compiled) if checkpointed else ():
        net.enable_gradient_checkpointing()
    given = {"class_labels": torch.tensor([1, 3]), "augmentation_flags": torch.tensor([0.0, 1.0])}
    expected = [gradients(plain, seed, **given) for seed in range(3)]
    compiled.compile(backend="aot_eager", fullgraph=True)
    found = [gradients(compiled, seed, **given) for seed in range(3)]
    assert num_graphs() == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) > 20
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@uses_inductor
@pytest.mark.slow
def test_inductor_computes_the_same_gradients():
    plain, compiled = (tiny_multiscale(in_channels=3).double() for _ in range(2))
    compiled.compile(fullgraph=True)
    for seed in range(2):
        expected, found = (gradients(net, seed) for net in (plain, compiled))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_context_runs_a_compiled_network_without_compilation():
    net = tiny_multiscale()
    net.compile(backend="aot_eager")
    z_t = normal(2, 1, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        with uncompiled():
            net(z_t, 500.0)
        assert num_graphs() == 0
        net(z_t, 500.0)
        assert num_graphs() == 1


def test_accelerates_setting_compiles_the_network_alone(tmp_path, monkeypatch):
    """Accelerate itself would compile the whole objective, in a dozen graphs; evaluations are not compiled."""
    tiny_preset().save_config(tmp_path / "network")
    options = ["--model_config_name_or_path", str(tmp_path / "network"), *SHORT_TRAINING.split(), "--logger", "none"]
    options += ["--dropout", "0.1"]
    train(tmp_path / "plain", options)
    assert num_graphs() == 0
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    train(tmp_path / "compiled", options)
    assert num_graphs() == 2  # one is the trial whether compilation works at all
    for plain, compiled in zip(state_of(tmp_path / "plain"), state_of(tmp_path / "compiled"), strict=True):
        assert plain == compiled  # this backend calls the same operations


@uses_inductor
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_run_resumes_bit_for_bit(tmp_path):
    tiny_multiscale(num_levels=17, gamma_min=-7.5).save_config(tmp_path / "network")
    options = ["--model_config_name_or_path", str(tmp_path / "network"), *SHORT_TRAINING.split(), "--compile"]
    options += ["--logger", "none", "--dropout", "0.1"]
    train(tmp_path / "whole", options)
    (tmp_path / "resumed").mkdir()
    for name in ("options.json", "metrics.jsonl"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "resumed")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    torch.compiler.reset()
    train(tmp_path / "resumed", options)
    assert state_of(tmp_path / "whole") == state_of(tmp_path / "resumed")


@uses_inductor
def test_a_compiler_that_does_not_work_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no_compiler"),))
    done = run_example("train.py", "--compile", "--output_dir", tmp_path / "run", *SHORT_TRAINING.split(), check=False)
    assert done.returncode and re.search("compile needs a working compiler.*g\\+\\+.*got .*install one", done.stderr)
    assert "Traceback" not in done.stderr and not list((tmp_path / "run").glob("checkpoint*"))


def test_hours_are_measured_with_the_compiled_network(monkeypatch, tmp_path):
    """The width is chosen without compilation, and the steps follow from the speed of the compiled network."""
    measured = []

    def seconds(args, data, unet, *_):
        measured.append(unet._compiled_call_impl is not None)
        return 1e-3 if measured[-1] else 2e-3

    tiny_multiscale().save_config(tmp_path / "network")
    arguments = ["--model_config_name_or_path", str(tmp_path / "network"), "--max_hours", "1", "--compile"]
    monkeypatch.setattr(train_budget, "_seconds_per_image", seconds)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    args = parse_options("", arguments)
    train_budget.resolve_budget(args, load_digits_split()[0], Accelerator(cpu=True))
    assert measured[-1] and not any(measured[:-1]) and len(measured) > 1
    assert args.max_train_steps == int(3600 / 1e-3 / args.train_batch_size)

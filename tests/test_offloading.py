"""Pipelines on the devices that accelerate assigns: on a CPU, no placement of the weights changes the numbers."""

import copy
import logging

import accelerate
import diffusers
import pytest
import torch

from diffusers_vdm import (
    BetaGamma,
    FixedLinearGamma,
    LearnedLinearGamma,
    LinearBetaGamma,
    LinearBetaScheduler,
    TableGamma,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
)
from diffusers_vdm.sharing.remote_code import save_code
from tests.models import curved_gamma, network, pipeline, sample
from tests.running import run_python


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    schedule = curved_gamma()
    pipeline(VDMScheduler.from_noise_schedule(schedule), schedule).save_pretrained(folder)
    return folder


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    return sample(pipe)


def with_device_map(saved, folder):
    return VDMPipeline.from_pretrained(saved, device_map="cpu")


def balanced(saved, folder):
    return VDMPipeline.from_pretrained(saved, device_map="balanced", max_memory={"cpu": "1GB"})


def network_on_the_disk(saved, folder):
    """Accelerate splits between the blocks that `_no_split_modules` names, here for lack of memory."""
    whole = (saved / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    options = {"device_map": "auto", "max_memory": {"cpu": int(0.7 * whole)}, "offload_folder": folder}
    unet = VDMUNet2DModel.from_pretrained(saved, subfolder="unet", **options)
    assert {"disk", "cpu"} == set(unet.hf_device_map.values())
    return VDMPipeline.from_pretrained(saved, unet=unet)


def model_offload(saved, folder):
    pipe = VDMPipeline.from_pretrained(saved)
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def group_offload(saved, folder):
    pipe, cpu = VDMPipeline.from_pretrained(saved), torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    return pipe


def pipeline_group_offload(saved, folder):
    pipe, cpu = VDMPipeline.from_pretrained(saved), torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    return pipe


def parameters_offload(saved, folder):
    pipe = VDMPipeline.from_pretrained(saved)
    for module in modules(pipe):  # `enable_sequential_cpu_offload` does this, to an accelerator
        accelerate.cpu_offload(module, "cpu", offload_buffers=True)
    return pipe


@pytest.mark.parametrize(
    "how", [with_device_map, balanced, network_on_the_disk, model_offload, group_offload, parameters_offload]
)
def test_samples_do_not_depend_on_the_placement_of_the_weights(saved, tmp_path, how):
    if how is group_offload and diffusers.__version__.startswith("0.35"):
        pytest.skip("this version asks an accelerator for its type, where there is none")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    # weights at another place in memory are summed in another order
    expected = drawn(VDMPipeline.from_pretrained(saved))
    torch.testing.assert_close(drawn(how(saved, str(tmp_path))), expected, rtol=1e-3, atol=1e-3)


# ---- what a pipeline asks of its noise schedule ------------------------------------------------------------------

SCHEDULES = {
    "none": lambda: None,
    "fixed": FixedLinearGamma,
    "learned line": LearnedLinearGamma,
    "network": curved_gamma,
    "linear betas": LinearBetaGamma,
    "betas": lambda: BetaGamma([0.001, 0.01, 0.1, 0.3]),
    "table": lambda: TableGamma([-9.0, 0.0, 4.0]),
}
EVERY_SCHEDULE = pytest.mark.parametrize("kind", SCHEDULES)


def pipeline_with(kind):
    schedule = SCHEDULES[kind]()
    pipe = pipeline(VDMScheduler(), schedule)
    return pipe if schedule is None else VDMPipeline(pipe.unet, scheduler_of(schedule), schedule)


def scheduler_of(schedule):
    if isinstance(schedule, LinearBetaGamma):
        return LinearBetaScheduler.from_noise_schedule(schedule)
    if isinstance(schedule, BetaGamma):
        return VDMScheduler(len(schedule.table()), trained_gammas=schedule.table().tolist(), timestep_type="index")
    return VDMScheduler.from_noise_schedule(schedule)


@EVERY_SCHEDULE
def test_a_pipeline_samples_with_every_schedule_built_loaded_or_copied(kind, tmp_path):
    pipe = pipeline_with(kind)
    expected = drawn(pipe)
    pipe.save_pretrained(tmp_path)
    for other in (VDMPipeline.from_pretrained(tmp_path), VDMPipeline.from_pipe(pipe), copy.deepcopy(pipe)):
        assert type(other.noise_schedule) is type(pipe.noise_schedule)
        torch.testing.assert_close(drawn(other), expected, rtol=1e-3, atol=1e-3)


@EVERY_SCHEDULE
@pytest.mark.parametrize(
    "how", [with_device_map, balanced, model_offload, parameters_offload, group_offload, pipeline_group_offload]
)
def test_every_schedule_goes_where_accelerate_puts_it(kind, how, tmp_path):
    if "group" in how.__name__ and diffusers.__version__.startswith("0.35"):
        pytest.skip("this version asks an accelerator for its type, where there is none")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipe = pipeline_with(kind)
    pipe.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(drawn(how(tmp_path / "saved", tmp_path)), drawn(pipe), rtol=1e-3, atol=1e-3)


@EVERY_SCHEDULE
def test_device_and_dtype_of_a_pipeline_are_those_of_its_network(kind, tmp_path):
    pipe, meta, cpu = pipeline_with(kind), torch.device("meta"), torch.device("cpu")
    pipe.save_pretrained(tmp_path)
    assert pipe.device == pipe._execution_device == cpu
    pipe.unet.to(meta)  # only the network is moved
    assert pipe.device == pipe._execution_device == meta
    pipe = VDMPipeline.from_pretrained(tmp_path)
    if pipe.noise_schedule is not None:
        pipe.noise_schedule.to(meta)
        assert pipe.noise_schedule.device == meta
    assert pipe.device == pipe._execution_device == cpu
    pipe.to(meta)
    assert {module.device for module in modules(pipe)} == {pipe.device} == {meta}
    pipe = VDMPipeline.from_pretrained(tmp_path).to(torch.bfloat16)
    assert pipe.dtype == pipe.unet.dtype == torch.bfloat16 and pipe.device == cpu
    assert all(module.dtype == torch.float32 for module in modules(pipe) if module is not pipe.unet)


def modules(pipe):
    return [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]


@pytest.mark.parametrize("kind", [kind for kind in SCHEDULES if kind != "none"])
def test_a_schedule_remembers_where_it_was_moved(kind):
    schedule = SCHEDULES[kind]()
    both = torch.nn.ModuleList([schedule, torch.nn.Linear(1, 1)])
    assert schedule.device == torch.device("cpu")
    both.to("meta").to(torch.float16)  # a cast moves nothing
    assert schedule.device == both[1].weight.device == torch.device("meta")
    assert both.to_empty(device="cpu")[0].device == torch.device("cpu")
    schedule.to("meta")
    if next(schedule.parameters(), None) is None:  # such a schedule has no data on the device
        assert schedule.to("cpu").device == torch.device("cpu")
        assert not schedule.state_dict() and not [*schedule.buffers()]


@EVERY_SCHEDULE
# its new name, `dtype`, is not known to the oldest diffusers that is supported
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
def test_casts_log_no_warning_and_keep_schedules_in_float32(kind, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="diffusers")
    filters = list(logging.getLogger("diffusers.models.modeling_utils").filters)
    pipe = pipeline_with(kind)
    pipe.save_pretrained(tmp_path)
    pipes = [
        VDMPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16),
        copy.deepcopy(pipe).to(dtype=torch.bfloat16),
        VDMPipeline.from_pipe(copy.deepcopy(pipe), torch_dtype=torch.float16),
        pipe.to("cpu", torch.float16, silence_dtype_warnings=True),
    ]
    for other in pipes:
        assert other.unet.dtype in (torch.float16, torch.bfloat16)
        assert all(m.dtype == torch.float32 for m in modules(other) if m is not other.unet)
        assert drawn(other).isfinite().all()
    assert not [record.getMessage() for record in caplog.records if "float32" in record.getMessage()]
    assert logging.getLogger("diffusers.models.modeling_utils").filters == filters


def test_a_schedule_without_parameters_loads_with_the_arguments_of_a_model(tmp_path):
    FixedLinearGamma(-9.0, 4.0).save_pretrained(tmp_path)
    loaded, info = FixedLinearGamma.from_pretrained(tmp_path, output_loading_info=True, device_map={"": "meta"})
    assert loaded.device == torch.device("meta") and not any(info.values())
    assert FixedLinearGamma.from_pretrained(tmp_path, device_map="auto").device == torch.device("cpu")


def test_regional_compilation_finds_the_blocks_that_are_repeated():
    unet = network()
    x, t = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(3.0)
    with torch.no_grad():
        expected = unet(x, t).sample
        unet.compile_repeated_blocks(backend="eager")
        compiled = [type(m).__name__ for m in unet.modules() if m._compiled_call_impl is not None]
        assert set(compiled) == {"ResnetBlock2D", "Attention"} == set(unet._repeated_blocks)
        torch.testing.assert_close(unet(x, t).sample, expected, rtol=1e-5, atol=1e-5)


REMOTE = """
import sys, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(7), "output_type": "latent"}
    print(float(pipe(**arguments).images.sum()), pipe.to("meta").device, "diffusers_vdm" in sys.modules)
"""


def test_every_schedule_samples_by_the_code_beside_its_weights(tmp_path):
    expected = []
    for kind in SCHEDULES:
        pipe = pipeline_with(kind)
        pipe.save_pretrained(tmp_path / kind)
        save_code(tmp_path / kind)
        expected.append(float(drawn(pipe).sum()))
    folders = [tmp_path / kind for kind in SCHEDULES]
    done = run_python("-c", REMOTE, *folders, environment={"HF_MODULES_CACHE": str(tmp_path / "modules")})
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[1:] for line in lines] == [["meta", "False"]] * len(SCHEDULES)
    assert [float(line[0]) for line in lines] == pytest.approx(expected, rel=1e-3, abs=0.05)

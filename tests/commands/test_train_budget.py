"""commands/train_budget.py and training/scaling.py: steps and width for a budget, and the same ones after a stop."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from diffusers_vdm import VDMMultiscale2DModel
from diffusers_vdm.commands import train_budget
from diffusers_vdm.commands.train_budget import budget_text, resolve_budget
from diffusers_vdm.commands.train_options import build, parse_options, resumed_description
from diffusers_vdm.data.images import load_digits_split
from diffusers_vdm.training.cost import training_cost
from diffusers_vdm.training.scaling import BATCHES, RULE, WIDTHS, best_shape
from tests.models import tiny_preset
from tests.running import run_example

SMALL = (
    "--eval_samples 1 --num_images 1 --ddpm_num_inference_steps 2 --logger none --train_batch_size 4 --eval_steps 0"
)


@pytest.fixture
def data():
    return load_digits_split()[0]


@pytest.fixture
def config(tmp_path):
    """A small multiscale network, in a file."""
    channels = {"block_out_channels": (8, 16), "norm_num_groups": 2, "attention_head_dim": 8}
    VDMMultiscale2DModel(**channels, layers_per_block=1).save_config(tmp_path / "network")
    return ["--model_config_name_or_path", str(tmp_path / "network"), "--output_dir", str(tmp_path / "run")]


def test_steps_are_those_that_the_flops_pay(data, config):
    args = parse_options("", [*config, "--max_flops", "1e10", "--width", "12"])
    resolve_budget(args, data, Accelerator(cpu=True))
    unet = build(args, data)[0]
    text = budget_text(args, unet, 100, data.shape, 1e10)
    assert list(unet.config.block_out_channels) == [12, 24] and args.width == 12
    each = training_cost(unet, data.shape).flops_per_image * args.train_batch_size
    assert {"max_train_steps", "width"} <= set(args.given) and "max_flops" not in args.given
    assert each * args.max_train_steps <= 1e10 < each * (args.max_train_steps + 1)
    assert "1e+10 FLOPs" in text and f"{args.max_train_steps} steps, 12 channels" in text


def test_bits_are_expected_where_the_rule_was_fitted(config):
    """Below, the rule is more than the 8 bits/dim of uniform values; above, it is marked as an extrapolation."""
    unet = VDMMultiscale2DModel.from_preset("cifar10-fast")
    each = training_cost(unet, (3, 32, 32)).flops_per_image
    for images, found in (
        (1_000, "no bits/dim are expected"),
        (56_464, "3.4"),
        (1_000_000, "extrapolated from 2.6e+14"),
    ):
        args = parse_options("", [*config, "--max_flops", str(images * each)])
        args.max_train_steps = images // 16
        text = budget_text(args, unet, images, (3, 32, 32), images * each)
        assert found in text and ("are expected (" in text) == (images > 1_000)
    count = sum(parameter.numel() for parameter in unet.parameters())
    args.max_train_steps = 56_464 // 512
    assert "extrapolated from batches of 128 images" in budget_text(args, unet, 56_464, (3, 32, 32), 56_464 * each)
    args.max_train_steps = 56_464 // 16
    wide = VDMMultiscale2DModel.from_preset("cifar10-fast", block_out_channels=(64, 128, 256))
    assert "extrapolated from 2,197,275 parameters" in budget_text(args, wide, 56_464, (3, 32, 32), 56_464 * each)
    text = budget_text(args, unet, 56_464, (3, 32, 32), 56_464 * each)
    assert (
        f"{RULE.expected_bpd(count, 56_464):.3f} bits/dim are expected (error of the fit {RULE.error_bpd:.3f})" in text
    )


@pytest.mark.parametrize("budget", [["--max_flops", "1e7"], ["--max_hours", "1e-9"]])
def test_less_than_a_step_is_refused(data, config, budget, monkeypatch):
    monkeypatch.setattr(train_budget, "MEASURED_SECONDS", 0.05)
    args = parse_options("", [*config, *budget, "--width", "8"])
    with pytest.raises(ValueError, match=f"{budget[0]} .* is less than one step of .* images"):
        resolve_budget(args, data, Accelerator(cpu=True))


@pytest.mark.slow
def test_more_computation_buys_a_wider_network_and_more_steps(data):
    found = []
    for flops in ("1e12", "1e15"):
        args = parse_options("", ["--preset", "cifar10-fast", "--dataset_name", "x", "--max_flops", flops])
        resolve_budget(args, data, Accelerator(cpu=True))
        found.append((args.width, args.max_train_steps))
    assert found == sorted(found) and found[0][0] < found[-1][0] and {w for w, _ in found} <= set(WIDTHS)


@pytest.mark.parametrize("preset", [[], ["--preset", "digits"]])
def test_a_network_of_one_size_only_gets_its_steps(data, preset):
    args = parse_options("", ["--max_flops", "1e12", *preset])
    resolve_budget(args, data, Accelerator(cpu=True))
    assert args.width is None and "expected" not in budget_text(args, build(args, data)[0], 100, data.shape, 1e12)
    each = training_cost(build(args, data)[0], data.shape).flops_per_image * args.train_batch_size
    assert args.max_train_steps == int(1e12 / each)


def test_the_chosen_width_minimizes_the_rule():
    def cost(width, batch):
        return 1000 * width**2, 1e6 * width**2

    for budget in (1e12, 1e14, 1e16):
        width, batch, images = best_shape(budget, cost)
        expected = {w: RULE.expected_bpd(cost(w, 16)[0], budget / cost(w, 16)[1]) for w in WIDTHS}
        assert width == min(expected, key=expected.get) and images == budget / cost(width, 16)[1]
        assert batch == 16  # larger ones cost the same for each image, and need more of them


@pytest.mark.parametrize("processes", [1, 8])
def test_batches_grow_where_a_step_takes_as_long_for_any_number_of_images(processes):
    """As on a GPU that waits for its next kernel; the batch that is chosen has the least expected bits/dim."""

    def cost(width, batch):
        return 1000 * width**2, (40e-3 + 1e-4 * batch) / batch / processes

    width, batch, images = best_shape(90.0, cost, processes=processes)
    expected = {
        (w, b): RULE.expected_bpd(cost(w, b)[0], 90.0 / cost(w, b)[1], b * processes) for w in WIDTHS for b in BATCHES
    }
    assert (width, batch) == min(expected, key=expected.get) and batch > 16
    assert images == 90.0 / cost(width, batch)[1]
    assert best_shape(90.0, cost, [24], [32], processes)[:2] == (24, 32)


def test_a_batch_that_does_not_fit_into_memory_is_not_chosen():
    def cost(width, batch):
        return None if batch > 64 else (1000 * width**2, 40e-3 / batch)

    assert best_shape(90.0, cost)[1] == 64


def test_a_network_that_does_not_fit_into_memory_is_not_chosen():
    """Also if the middle width does not fit with the smallest batch; if none does, an error names the options."""

    def fits_up_to(widest):
        return lambda width, batch: None if width > widest else (1000 * width**2, 40e-3 / batch)

    width, batch, images = best_shape(1e3, fits_up_to(24))
    assert width <= 24 and batch > 16 and images
    with pytest.raises(ValueError, match="train_batch_size 16 does not fit into memory with 16 channels"):
        best_shape(1e3, fits_up_to(0))


@pytest.mark.parametrize("widest", [16, 0])
def test_too_little_memory_for_a_width_is_no_error(data, monkeypatch, widest):
    def seconds(args, *_):
        if args.width > widest:
            raise torch.OutOfMemoryError
        return 1e-1 / args.train_batch_size

    monkeypatch.setattr(train_budget, "_seconds_per_image", seconds)
    args = parse_options("", ["--preset", "cifar10-fast", "--dataset_name", "x", "--max_hours", "0.1"])
    if widest:
        resolve_budget(args, data, Accelerator(cpu=True))
        assert args.width == 16
    else:
        with pytest.raises(ValueError, match="does not fit into memory"):
            resolve_budget(args, data, Accelerator(cpu=True))


def test_a_batch_that_was_given_stays(data, config, monkeypatch):
    """Also the one of the preset, and the default of the option."""
    monkeypatch.setattr(train_budget, "_seconds_per_image", lambda args, *_: 1e-1 / args.train_batch_size)
    own = ["--preset", "cifar10-fast", "--dataset_name", "x", "--max_hours", "0.1"]
    for options, expected in (
        (own, None),
        ([*own, "--train_batch_size", "16"], 16),
        ([*own, "--train_batch_size", "32"], 32),
        ([*config, "--max_hours", "0.1"], None),
        ([*config, "--max_hours", "0.1", "--train_batch_size", "64"], 64),
    ):
        args = parse_options("", options)
        resolve_budget(args, data, Accelerator(cpu=True))
        assert args.train_batch_size == expected if expected else args.train_batch_size > 64
        assert args.max_train_steps == int(3600 * 0.1 / 1e-1) and "train_batch_size" in args.given


@pytest.mark.parametrize(("processes", "batch"), [(1, 96), (2, 48), (5, None)])
def test_a_resumed_run_has_the_batch_that_was_chosen_for_it(data, tmp_path, processes, batch):
    """Split over the processes that there are now."""
    own = ["--preset", "cifar10-fast", "--dataset_name", "x", "--max_hours", "0.1", "--output_dir", str(tmp_path)]
    args = parse_options("", own)
    saved = {**vars(args), "given": None, "width": 24, "train_batch_size": 96}
    written = {"options": saved, "total_steps": 700, "global_batch_size": 96}
    (tmp_path / "options.json").write_text(json.dumps(written))
    resumed = parse_options("", [*own, "--resume_from_checkpoint", "latest"])
    several = SimpleNamespace(num_processes=processes)
    if batch is None:
        with pytest.raises(ValueError, match="96 images per step, which 5 = processes × gradient_accumulation_steps"):
            resolve_budget(resumed, data, several, resumed_description(resumed))
    else:
        resolve_budget(resumed, data, several, resumed_description(resumed))
        assert (resumed.train_batch_size, resumed.width, resumed.max_train_steps) == (batch, 24, 700)


def test_the_rule_chooses_nothing_for_a_network_that_predicts_levels(data):
    """The digits have 17 levels, so the preset for own data predicts them."""
    args = parse_options("", ["--preset", "cifar10-fast", "--dataset_name", "x", "--max_flops", "1e12"])
    args.preset, args.digits = "fast", True
    resolve_budget(args, data, Accelerator(cpu=True))
    assert args.width is None and args.train_batch_size == 16


def test_hours_are_measured_once(data, config, tmp_path, monkeypatch):
    """A resumed run takes its steps from options.json, and does not measure again."""
    speeds = iter([1e-3])
    monkeypatch.setattr(train_budget, "_seconds_per_image", lambda *_: next(speeds))
    args = parse_options("", [*config, "--max_hours", "0.01", "--width", "8", "--train_batch_size", "6"])
    resolve_budget(args, data, Accelerator(cpu=True))
    assert args.max_train_steps == 6000
    saved = {"options": {**vars(args), "given": None}, "total_steps": 6000}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "options.json").write_text(json.dumps(saved))
    again = [*config, "--max_hours", "0.01", "--width", "8", "--train_batch_size", "6"]
    for name in ("latest", str(tmp_path / "run" / "checkpoint-3")):
        resumed = parse_options("", [*again, "--resume_from_checkpoint", name])
        resolve_budget(resumed, data, Accelerator(cpu=True), resumed_description(resumed))
        assert (resumed.max_train_steps, resumed.width) == (6000, 8)
    other = parse_options("", [*config, "--max_hours", "0.02", "--resume_from_checkpoint", "latest"])
    with pytest.raises(StopIteration):  # another budget is measured
        resolve_budget(other, data, Accelerator(cpu=True), resumed_description(other))


def test_the_measured_speed_is_that_of_training(data, config, monkeypatch):
    monkeypatch.setattr(train_budget, "MEASURED_SECONDS", 0.05)
    args = parse_options("", [*config, "--max_hours", "1", "--width", "8"])
    unet, schedule = build(args, data)
    seconds = train_budget._seconds_per_image(args, data, unet, schedule, Accelerator(cpu=True))
    assert 0 < seconds < 1 and math.isfinite(seconds)


@pytest.mark.slow
def test_a_run_with_a_budget_ends_at_it_and_resumes(config, tmp_path):
    command = [*config, "--max_flops", "3e8", "--width", "8", *SMALL.split()]
    done = run_example("train.py", *command)
    assert "budget:" in done.stdout
    options = json.loads((tmp_path / "run" / "options.json").read_text())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == options["total_steps"] and 2e8 < last["train_flops"] <= 3e8
    again = run_example("train.py", *command, "--resume_from_checkpoint", "latest")
    assert "nothing to do" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_hours", "1", "--max_train_steps", "5"], "give --max_train_steps or --max_hours, not both"),
        (["--max_hours", "1", "--max_flops", "1e9"], "give --max_hours or --max_flops, not both"),
        (["--max_hours", "-1"], "--max_hours must be positive"),
        (["--max_flops", "inf"], "--max_flops must be positive and finite, got inf"),
        (["--max_flops", "0"], "--max_flops must be positive, got 0"),
        (["--max_train_steps", "0"], "--max_train_steps must be positive, got 0"),
        (["--num_epochs", "0"], "--num_epochs must be positive, got 0"),
        (["--preset", "digits", "--width", "16"], "--width needs a multiscale network"),
    ],
)
def test_budgets_that_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_options("", arguments)
    assert message in capsys.readouterr().err


def test_a_width_that_cannot_be_normalized_is_refused_by_its_name(data):
    args = parse_options("", ["--width", "20"])
    with pytest.raises(ValueError, match="--width must be a multiple of the 8 groups of GroupNorm, got 20"):
        build(args, data)


def test_a_missing_config_is_an_error_of_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_options("", ["--model_config_name_or_path", str(tmp_path / "none"), "--width", "16"])
    assert ": error: " in capsys.readouterr().err


def test_width_is_refused_for_the_config_of_another_network(tmp_path, capsys):
    tiny_preset().save_config(tmp_path)
    with pytest.raises(SystemExit):
        parse_options("", ["--model_config_name_or_path", str(tmp_path), "--width", "16"])
    assert "--width needs a multiscale network" in capsys.readouterr().err

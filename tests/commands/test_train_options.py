"""commands/train_options.py: options that are refused, and what each preset trains, by its paper and its page."""

import json
import math

import pytest
import torch
from accelerate import Accelerator

from diffusers_vdm import MULTISCALE_PRESETS, UNET_PRESETS, VariationalBound, VDMMultiscale2DModel, VDMUNet2DModel
from diffusers_vdm.commands.train_options import PRESET_DATA, build, parse_options
from diffusers_vdm.data.images import ImageSet, load_digits_split
from diffusers_vdm.sharing.card_sections import training_command
from diffusers_vdm.training.description import RunDescription
from diffusers_vdm.training.run import Run
from tests.models import tiny_preset


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rate", "-1"], "--learning_rate must be positive"),
        (["--objective", "ddpm", "--schedule", "learned"], "cannot train γ"),
        (["--gamma_min", "6"], "must be below --gamma_max"),
        (["--dataset_name", "a", "--train_data_dir", "b"], "not both"),
        (["--train_data_dir", "does/not/exist"], "is not a folder"),
        (["--max_train_steps", "5", "--num_epochs", "1"], "not both"),
        (["--preset", "digit"], "did you mean 'digits'"),
        (["--lr_scheduler", "cosin"], "did you mean 'cosine'"),
        (["--use_emma"], "unrecognized arguments"),
        (["--use_ema", "False"], "unrecognized arguments"),
        (["--lr_warmup_steps", "-5"], "--lr_warmup_steps must be within"),
        (["--ema_max_decay", "2"], "--ema_max_decay must be within"),
        (["--dropout", "1"], "--dropout must be within"),
        (["--ddpm_num_steps", "5"], "--ddpm_num_steps must be within"),
        (["--resolution", "16"], "--resolution needs a data set"),
        (["--schedule", "linear_beta", "--gamma_min", "-3"], "come from its betas"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, message, tmp_path, capsys):
    from diffusers_vdm.commands.train_options import parse_options

    with pytest.raises(SystemExit) as stop:
        parse_options("", ["--output_dir", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


CIFAR10 = ("uoft-cs/cifar10", "img", "label", "train", "test")
OF_DATA = ("dataset_name", "image_column", "label_column", "train_split", "eval_split")
LINEAR_BETA = (-9.2102, 10.1179)  # log((1 − ᾱ)/ᾱ) of β = 1e-4 … 0.02 at T = 1000, at t = 1 and t = T [DDPM §4]
# batch, steps, learning rate, Adam's betas, weight decay of the network, ends of γ, its learning rate, dropout
# [google-research/vdm configs/*.py; DDPM app. B]
STATED = {
    "digits": (64, 2500, 4e-3, (0.9, 0.99), 0.01, (-7.5, 5.0), 4e-2, 0.05),
    "cifar10": (128, 10_000_000, 2e-4, (0.9, 0.99), 0.01, (-13.3, 5.0), 2e-3, 0.1),
    "cifar10-aug": (128, 10_000_000, 2e-4, (0.9, 0.99), 0.01, (-13.3, 5.0), 2e-3, 0.05),
    "imagenet32": (128, 2_000_000, 2e-4, (0.9, 0.99), 0.01, (-13.3, 5.0), 2e-3, 0.0),
    "imagenet64": (128, 2_000_000, 2e-4, (0.9, 0.99), 0.01, (-13.3, 5.0), 2e-3, 0.0),
    "ddpm-cifar10": (128, 800_000, 2e-4, (0.9, 0.999), 0.0, LINEAR_BETA, None, 0.1),
    "ddpm-ffhq128": (64, 500_000, 2e-5, (0.9, 0.999), 0.0, LINEAR_BETA, None, 0.0),
}
LARGE = ("cifar10-aug", "imagenet32", "imagenet64", "ddpm-ffhq128")  # more than 100 million parameters


def options_of(preset, *more):
    own = [] if preset.startswith("digits") or PRESET_DATA.get(preset) else ["--dataset_name", "user/images"]
    return parse_options("", ["--preset", preset, *own, *more])


def images_of(preset):
    if preset == "digits":
        return load_digits_split()[0]
    size = UNET_PRESETS[preset]["sample_size"]
    return ImageSet(torch.zeros(64, 3, size, size, dtype=torch.uint8), None, 256, "images")


def plain(config):
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if k != "_use_default_values"}


def test_the_table_of_this_file_has_every_preset():
    assert STATED.keys() == UNET_PRESETS.keys()
    assert PRESET_DATA.keys() | {"digits", "digits-fast", "fast"} == UNET_PRESETS.keys() | MULTISCALE_PRESETS.keys()
    assert not UNET_PRESETS.keys() & MULTISCALE_PRESETS.keys()


@pytest.mark.parametrize("preset", MULTISCALE_PRESETS)
def test_a_fast_preset_is_a_multiscale_network_trained_by_muon(preset, tmp_path):
    o = options_of(preset, "--output_dir", str(tmp_path), "--logger", "none")
    stated = MULTISCALE_PRESETS[preset]
    size, channels, levels = stated.get("sample_size", 32), stated.get("in_channels", 3), stated.get("num_levels", 256)
    data = ImageSet(torch.zeros(64, channels, size, size, dtype=torch.uint8), None, levels, "images")
    unet, noise_schedule = build(o, data)
    assert isinstance(unet, VDMMultiscale2DModel)
    same = VDMMultiscale2DModel.from_preset(preset, dropout=o.dropout, sample_size=size)
    assert plain(same.config) == plain(unet.config)
    run = Run(o, Accelerator(cpu=True), data, unet, noise_schedule)
    rest, of_gamma, hidden = run.optimizer.param_groups
    of_muon = 0.03 if preset == "digits-fast" else 0.6 / math.sqrt(run.total)
    assert (rest["initial_lr"], of_gamma["initial_lr"]) == (4e-3, 2e-2)
    assert (
        hidden["initial_lr"] == pytest.approx(min(0.05, of_muon), rel=5e-3)
        and o.muon_learning_rate == hidden["initial_lr"]
    )
    assert hidden["use_muon"] and not rest["use_muon"] and of_gamma["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("size", "channels", "layers"),
    [
        ((8, 8), (32, 64), (2, 1)),
        ((9, 9), (32,), (3,)),
        ((28, 28), (32, 64, 128), (2, 2, 1)),
        ((32, 32), (32, 64, 128), (2, 2, 1)),
        ((64, 64), (32, 64, 128, 256), (2, 2, 2, 1)),
        ((256, 128), (32, 64, 128, 256, 256), (2, 2, 2, 2, 1)),
        ((30, 32), (32, 64), (2, 1)),
    ],
)
def test_the_network_for_own_images_follows_their_size_number_and_levels(size, channels, layers):
    o = parse_options("", ["--dataset_name", "user/images"])
    assert o.preset == "fast" and "preset" not in o.given and o.optimizer == "muon"
    unet, _ = build(o, ImageSet(torch.zeros(64, 3, *size, dtype=torch.uint8), None, 256, "images"))
    config = plain(unet.config)
    assert (config["block_out_channels"], config["layers_per_block"]) == (list(channels), list(layers))
    assert (
        config["dropout"] == o.dropout == 0.1 and not config["level_logits"] and not config["num_augmentation_flags"]
    )
    many = ImageSet(torch.zeros(1, 1, *size, dtype=torch.uint8).expand(10_000, -1, -1, -1), None, 17, "images")
    o = parse_options("", ["--dataset_name", "user/images", "--width", "16", "--random_flip"])
    config = plain(build(o, many)[0].config)
    assert config["block_out_channels"] == [c // 2 for c in channels] and config["dropout"] == 0.0
    assert config["level_logits"] and config["num_augmentation_flags"] == 6


@pytest.mark.parametrize(
    "more", [["--objective", "ddpm"], ["--schedule", "linear_beta"], ["--prediction_type", "v_prediction"]]
)
def test_own_images_that_a_multiscale_network_cannot_model_get_the_layout_of_the_paper(more):
    o = parse_options("", ["--dataset_name", "user/images", *more])
    assert o.preset == "digits" and o.optimizer == "adamw"


def test_a_multiscale_network_follows_the_data_and_the_noise_schedule(tmp_path):
    VDMMultiscale2DModel(block_out_channels=(8, 16), norm_num_groups=2, layers_per_block=1,
                         attention_head_dim=8).save_config(tmp_path)  # fmt: skip
    o = parse_options("", ["--model_config_name_or_path", str(tmp_path), "--gamma_min", "-9", "--gamma_max", "4"])
    unet, noise_schedule = build(o, load_digits_split()[0])
    config = unet.config
    assert isinstance(unet, VDMMultiscale2DModel)
    assert (config.num_levels, config.in_channels, config.sample_size) == (17, 1, 8)
    assert (config.gamma_min, config.gamma_max) == (-9.0, 4.0)
    VariationalBound(unet, noise_schedule, num_levels=17)  # which checks that they belong together


@pytest.mark.parametrize("preset", [pytest.param(p, marks=[pytest.mark.slow] * (p in LARGE)) for p in UNET_PRESETS])
def test_a_preset_builds_its_network_with_the_initialization_of_its_paper(preset):
    o, data = options_of(preset), images_of(preset)
    unet, noise_schedule = build(o, data)
    stated, built = plain(UNET_PRESETS[preset]), plain(unet.config)
    assert {name: built[name] for name in stated} == stated
    assert stated["zero_init"] is (preset != "digits")  # ours, and measured to be better so
    assert UNET_PRESETS[preset].get("dropout", 0.0) == o.dropout == STATED[preset][7]
    with torch.device("meta"):  # by the package alone
        assert plain(VDMUNet2DModel.from_preset(preset, dropout=o.dropout).config) == built
    # its input back [the official network], or nothing [DDPM's]; smaller images than its own, for time
    side = 8 if preset == "digits" else 16
    z = torch.randn(1, data.shape[0], side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = unet.eval()(z, 500.0).sample
    start = torch.zeros_like(z) if preset.startswith("ddpm") else z
    assert torch.equal(out, start) is (preset != "digits")
    assert [float(end.detach()) for end in noise_schedule.ends()] == pytest.approx(STATED[preset][5], abs=1e-3)


@pytest.mark.parametrize("preset", UNET_PRESETS)
def test_a_preset_is_optimized_as_stated(preset, tmp_path):
    o, data = options_of(preset, "--output_dir", str(tmp_path), "--logger", "none"), images_of(preset)
    batch, steps, rate, betas, decay, _, gamma_rate, _ = STATED[preset]
    noise_schedule = build(options_of("digits", "--objective", o.objective), load_digits_split()[0])[1]
    levels = len(UNET_PRESETS[preset].get("down_block_types", [0]))
    narrow = {"block_out_channels": (16,) * levels, "layers_per_block": 1, "norm_num_groups": 4}
    unet = VDMUNet2DModel.from_preset(preset, attention_head_dim=8, **narrow)
    run = Run(o, Accelerator(cpu=True), data, unet, noise_schedule)
    groups = run.optimizer.param_groups
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in unet.parameters()}
    found = [(g["initial_lr"], tuple(g["betas"]), g["weight_decay"], g["eps"]) for g in groups]
    assert found[0] == (rate, betas, decay, 1e-8)
    assert found[1:] == ([] if gamma_rate is None else [(gamma_rate, betas, 0.0, 1e-8)])
    if gamma_rate is not None:  # γ never decays
        assert {id(p) for p in groups[1]["params"]} == {id(p) for p in noise_schedule.parameters()}
    assert (run.global_rows, run.total, run.decays) == (batch, steps, [0.9999])
    assert type(run.objective).__name__ == ("SimpleObjective" if preset.startswith("ddpm") else "VariationalBound")


@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize("class_name", ["VDMUNet2DModel", "UNet2DModel", None])
def test_a_config_file_sets_the_initialization(tmp_path, said, class_name):
    """A file of our class without the key means our default, one of diffusers' class PyTorch's start."""
    tiny_preset().save_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | {"zero_init": said}
    config["_class_name"] = class_name
    config = {k: v for k, v in config.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    o = parse_options("", ["--model_config_name_or_path", str(tmp_path)])
    unet, _ = build(o, load_digits_split()[0])
    expected = class_name == "VDMUNet2DModel" if said is None else said
    assert unet.config.zero_init is expected
    assert bool(unet.conv_out.weight.any()) is not expected


# ---- data --------------------------------------------------------------------------------------------------------


def data_of(*arguments):
    o = parse_options("", list(arguments))
    return tuple(getattr(o, name) for name in OF_DATA)


@pytest.mark.parametrize("preset", ["cifar10", "cifar10-aug", "ddpm-cifar10"])
def test_a_preset_uses_the_data_set_that_it_is_named_after(preset, tmp_path):
    assert data_of("--preset", preset) == CIFAR10
    assert data_of("--preset", preset, "--dataset_name", "uoft-cs/cifar10") == CIFAR10
    slices = data_of("--preset", preset, "--train_split", "train[:500]", "--label_column", "coarse")
    assert slices == ("uoft-cs/cifar10", "img", "coarse", "train[:500]", "test")
    # what belongs to that data set is not asked of another
    assert data_of("--preset", preset, "--dataset_name", "user/x") == ("user/x", None, None, "train", "test")
    assert data_of("--preset", preset, "--train_data_dir", str(tmp_path)) == (None, None, None, "train", "test")


@pytest.mark.parametrize("preset", [name for name in PRESET_DATA if not PRESET_DATA[name]])
def test_a_preset_without_public_images_asks_for_them_by_name(preset, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options("", ["--preset", preset, "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and "--dataset_name or --train_data_dir" in printed and preset in printed
    assert data_of("--preset", preset, "--dataset_name", "user/x")[0] == "user/x"


def test_the_digits_network_takes_other_images():
    assert data_of("--preset", "digits", "--dataset_name", "user/x") == ("user/x", None, None, "train", "test")
    assert data_of("--dataset_name", "user/x") == ("user/x", None, None, "train", "test")
    assert parse_options("", ["--preset", "digits"]).digits and parse_options("", []).digits


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--preset", "cifar10"],
        ["--preset", "cifar10", "--dataset_name", "uoft-cs/cifar10", "--train_split", "train[:100]"],
        ["--preset", "cifar10-aug", "--no-random_flip", "--num_epochs", "3"],
        ["--preset", "ddpm-cifar10", "--dataset_name", "user/x", "--image_column", "img", "--class_conditional"],
        ["--preset", "cifar10", "--data_dir", "faces", "--resolution", "32"],
        ["--preset", "ddpm-ffhq128", "--train_data_dir", "faces", "--eval_split", "train[:10]"],
        ["--preset", "imagenet32", "--dataset_name", "user/x", "--streaming", "--ema_decays", "0.99", "0.5"],
    ],
    ids=" ".join,
)
def test_the_command_on_a_card_makes_the_same_run(arguments, tmp_path, monkeypatch):
    (tmp_path / "faces").mkdir()
    monkeypatch.chdir(tmp_path)
    o = parse_options("", arguments)
    recorded = json.loads(
        json.dumps({"options": {k: v for k, v in vars(o).items() if k != "given"}, "given": o.given})
    )
    words = training_command(RunDescription.from_json(recorded)).replace("\\\n", " ").replace("'", "").split()
    again = parse_options("", words[words.index("examples/train.py") + 1 :])
    assert vars(again) == vars(o)

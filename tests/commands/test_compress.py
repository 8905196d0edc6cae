"""The commands compress, decompress and inspect: what a user types, sees, and gets back."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusers_vdm import UNET_PRESETS, FixedLinearGamma, VDMPipeline, VDMScheduler
from diffusers_vdm.codec import CodecError, decompress
from diffusers_vdm.commands import compress, inspect
from diffusers_vdm.commands import decompress as decompress_command
from diffusers_vdm.data.images import load_digits_split
from tests.models import network, tiny_unet
from tests.paths import DIGITS_MODEL, FIXTURES
from tests.pictures import picture
from tests.running import ENVIRONMENT, run_command, run_python, wait_for

GOLDEN = FIXTURES / "digits_v1.vdm"  # 20 digits at T = 12, see fixtures/README.md


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A file of 60 digits, whose size the command has printed."""
    path = tmp_path_factory.mktemp("packed") / "digits.vdm"
    done = run_command(
        "compress",
        "--model",
        DIGITS_MODEL,
        "--split",
        "test[:60]",
        "--num_steps",
        12,
        "--output",
        path,
        check=True,
        new_process=True,
    )
    return path, done.stdout


@pytest.fixture(scope="module")
def color_model(tmp_path_factory):
    """The folder of a pipeline for 8×8 RGB images."""
    folder = tmp_path_factory.mktemp("color")
    scheduler = VDMScheduler.from_noise_schedule(FixedLinearGamma(gamma_min=-13.3, gamma_max=5.0))
    VDMPipeline(tiny_unet(), scheduler).save_pretrained(folder)
    return folder


def run(command, *arguments):
    command.main([str(argument) for argument in arguments])


# ---- what a user gets ----------------------------------------------------------------------------------------------


def test_digits_come_back(packed, tmp_path):
    run(decompress_command, "--model", DIGITS_MODEL, "--input", packed[0], "--output_dir", tmp_path / "out")
    back = np.load(tmp_path / "out" / "images.npz")["images"]
    assert np.array_equal(back, load_digits_split()[1].images[:60].numpy())


def test_the_summary_has_all_sizes(packed):
    path, text = packed
    rows = dict(re.findall(r"^    (\S.*?)\s{2,}(\d+\.\d+)", text, flags=re.MULTILINE))
    assert {"whole file", "an image in it", "bound, T = 12", "PNG", "WebP"} <= set(rows)
    assert float(rows["whole file"]) == pytest.approx(8 * path.stat().st_size / (60 * 64), abs=1e-4)
    assert float(rows["an image in it"]) < float(rows["whole file"]) < float(rows["PNG"])
    assert "another process has decoded it" in text and "bytes in float32" in text


def test_the_golden_file_of_version_1_decodes():
    """A file that an earlier version wrote, on another machine: what users have must stay readable."""
    pipe = VDMPipeline.from_pretrained(DIGITS_MODEL)
    assert decompress(pipe, GOLDEN, progress_bar=False).equal(load_digits_split()[1].images[:20])


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp"])
def test_a_folder_of_several_sizes_keeps_names_and_pixels(tmp_path, color_model, suffix):
    rng = np.random.default_rng(0)
    pictures = {}
    for name, size in {"b": (8, 8), "a/c": (13, 5), "a/b d": (1, 1), "z": (20, 17)}.items():
        pictures[name] = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures[name]).save(tmp_path / "in" / f"{name}{suffix}", lossless=True)
    Image.fromarray(pictures["b"][:, :, 0]).save(tmp_path / "in" / f"gray{suffix}", lossless=True)
    (tmp_path / "in" / "readme.txt").write_text("no image", encoding="utf-8")
    run(compress, "--model", color_model, "--data_dir", tmp_path / "in", "--output", tmp_path / "f", "--num_steps", 3,
        "--no-verify", "--device", "cpu")  # fmt: skip
    run(decompress_command, "--model", color_model, "--input", tmp_path / "f", "--output_dir", tmp_path / "out")
    for name, pixels in pictures.items():
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{name}.png")), pixels)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 5
    with Image.open(tmp_path / "out" / "gray.png") as gray:
        assert gray.mode == ("RGB" if suffix == ".webp" else "L")  # WebP has no gray
        assert np.array_equal(np.asarray(gray)[..., 0] if gray.mode == "RGB" else gray, pictures["b"][:, :, 0])


def test_a_data_set_comes_back_as_files(tmp_path, color_model):
    import datasets

    rng = np.random.default_rng(0)
    images = [picture(rng) for _ in range(12)]
    columns = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": images}, features=columns)
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "set")
    run(compress, "--model", color_model, "--dataset_name", tmp_path / "set", "--split", "test[2:]", "--num_steps", 2,
        "--no-verify", "--output", tmp_path / "f")  # fmt: skip
    run(decompress_command, "--model", color_model, "--input", tmp_path / "f", "--output_dir", tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(10)]
    assert all(np.array_equal(Image.open(f), image) for f, image in zip(files, images[2:], strict=True))


def test_an_array_comes_back_in_its_layout(tmp_path, color_model):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images)
    run(compress, "--model", color_model, "--data_dir", tmp_path / "a.npz", "--output", tmp_path / "f",
        "--num_steps", 2, "--no-verify", "--no-compare")  # fmt: skip
    run(decompress_command, "--model", color_model, "--input", tmp_path / "f", "--output_dir", tmp_path / "out")
    assert np.array_equal(np.load(tmp_path / "out" / "images.npz")["images"], images)


def test_inspect_shows_the_header_and_where_the_bits_went(packed, tmp_path, capsys):
    run(inspect, packed[0])
    text = capsys.readouterr().out
    assert "60 of 8×8 pixels" in text and "12, even levels, posterior variance" in text and "tiles" in text
    run(inspect, packed[0], "--model", DIGITS_MODEL, "--output", tmp_path / "f.png")
    text = capsys.readouterr().out
    with Image.open(tmp_path / "f.png") as figure:
        assert figure.size[0] > 1000
    parts = [float(bits) for bits in re.findall(r"(?:decoder|prior|γ .*?)\s+(\d+\.\d{4})$", text, flags=re.MULTILINE)]
    [mean] = re.findall(r"mean (\d+\.\d+)", text)
    # the terms of the bound at the latents, and the bits of the images
    assert sum(parts) == pytest.approx(float(mean), abs=0.35)


def test_the_plain_code_is_named(tmp_path, color_model, capsys):
    np.savez(tmp_path / "a.npz", np.zeros((1, 8, 8, 3), dtype=np.uint8))
    run(compress, "--model", color_model, "--data_dir", tmp_path / "a.npz", "--output", tmp_path / "f", "--no-compare",
        "--no-verify")  # fmt: skip
    assert "plain code" in capsys.readouterr().out
    run(inspect, tmp_path / "f", "--model", color_model)
    assert "no noise levels" in capsys.readouterr().out


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "f"], "--model must be given"),
        (["--model", "m"], "--output must be given"),
        (["--model", "m", "--output", "."], "--output must name a file"),
        (["--model", "m", "--output", "none/f"], "--output must name a file in an existing folder"),
        (["--model", "m", "--output", "f", "--data_dir", "none"], "--data_dir must be"),
        (["--model", "m", "--output", "f", "--num_steps", "0"], "--num_steps must be"),
        (["--model", "m", "--output", "f", "--spacing", "9"], "--spacing must be"),
        (["--model", "m", "--output", "f", "--split", "all"], "--split of the digits"),
        (["--model", "m", "--output", "f", "--data_dir", ".", "--dataset_name", "d"], "not both"),
        (["--model", "m", "--output", "f", "--data_dir", ".", "--split", "train"], "--split needs"),
    ],
)
def test_wrong_options_of_compress_are_named(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(compress, *arguments)
    assert message in capsys.readouterr().err


def test_a_folder_without_images_and_a_missing_model_are_named(tmp_path, color_model):
    with pytest.raises(SystemExit, match=r"compress: --data_dir .* has no image files"):
        run(compress, "--model", color_model, "--data_dir", tmp_path, "--output", tmp_path / "f")
    with pytest.raises(SystemExit, match=r"--model must be a folder or repository"):
        run(compress, "--model", tmp_path / "none", "--output", tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_a_pipeline_with_an_autoencoder_is_refused(tmp_path):
    index = {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"], "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"--model must work on pixels"):
        run(compress, "--model", tmp_path, "--output", tmp_path / "f")


def test_digits_of_other_levels_are_refused(tmp_path, color_model):
    with pytest.raises(SystemExit, match=r"channels"):
        run(compress, "--model", color_model, "--output", tmp_path / "f")


def test_decompress_refuses_a_full_folder_and_damage(packed, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit):
        run(decompress_command, "--model", DIGITS_MODEL, "--input", packed[0], "--output_dir", tmp_path / "full")
    assert "new or empty folder" in capsys.readouterr().err
    content = bytearray(packed[0].read_bytes())
    content[-40] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    with pytest.raises(SystemExit, match=r"decompress: the file is damaged"):
        run(decompress_command, "--model", DIGITS_MODEL, "--input", tmp_path / "damaged", "--output_dir",
            tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match=r"inspect: the file is not one"):
        run(inspect, __file__)


def test_a_model_that_needs_conditions_is_refused_without_them(tmp_path):
    scheduler = VDMScheduler(gamma_min=-13.3)
    VDMPipeline(tiny_unet(num_class_embeds=3), scheduler).save_pretrained(tmp_path / "m")
    np.savez(tmp_path / "a.npz", np.zeros((2, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(SystemExit, match="--conditions must name a safetensors file with class_labels"):
        run(compress, "--model", tmp_path / "m", "--data_dir", tmp_path / "a.npz", "--output", tmp_path / "f")
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("name", ["bits.xyz", "none/bits.png", "folder"])
def test_inspect_checks_its_figure_before_it_decodes(packed, tmp_path, name, capsys):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit):
        run(inspect, packed[0], "--model", "none", "--output", tmp_path / name)
    assert "--output must name a figure" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_command_leaves_nothing(tmp_path, number):
    (tmp_path / "f").write_bytes(b"earlier")
    command = ["-m", "diffusers_vdm.commands", "compress", "--model", DIGITS_MODEL, "--output", tmp_path / "f",
               "--num_steps", "200"]  # fmt: skip
    process = subprocess.Popen([sys.executable, *map(str, command)], env=os.environ | ENVIRONMENT, text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    with process:
        wait_for(lambda: (tmp_path / ".f.tmp").exists(), [process])
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "diffusers-vdm compress: stopped" in errors and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_bytes() == b"earlier"


# ---- other processes -----------------------------------------------------------------------------------------------

DECODE = """
import sys, torch
from diffusers_vdm import VDMPipeline
from diffusers_vdm.codec import decompress
torch.set_num_threads(int(sys.argv[3]))
images = decompress(VDMPipeline.from_pretrained(sys.argv[1]), sys.argv[2], batch_size=int(sys.argv[4]))
print(int(images.long().sum()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "batch_size", "environment"),
    [
        (2, 5, {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}),
        (1, 64, {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    ],
)
def test_a_process_with_other_instructions_decodes(packed, threads, batch_size, environment):
    environment |= {
        "OMP_WAIT_POLICY": "PASSIVE"
    }  # waiting threads do not spin, which a busy machine would suffer from
    done = run_python("-c", DECODE, DIGITS_MODEL, packed[0], threads, batch_size, environment=environment)
    assert int(done.stdout) == int(load_digits_split()[1].images[:60].long().sum())


@pytest.mark.slow
def test_a_file_that_another_process_cannot_decode_is_not_written(tmp_path):
    """A network whose numbers depend on the number of threads, far beyond the tolerance."""
    from diffusers_vdm.codec import compress as write

    pipe = VDMPipeline.from_pretrained(DIGITS_MODEL)
    images = load_digits_split()[1].images[:40]
    pipe.unet.conv_out.register_forward_hook(lambda module, inputs, output: output + 1e-3)  # not in the saved pipeline
    with pytest.raises(CodecError, match=r"could not be decoded in another process"):
        write(pipe, images, tmp_path / "f", num_steps=16, progress_bar=False)
    assert not list(tmp_path.iterdir())


def test_the_presets_have_a_size():
    """The codec needs `sample_size`, which every preset has."""
    assert all(preset.get("sample_size") for preset in UNET_PRESETS.values())


def test_a_summary_is_json(tmp_path):
    from diffusers_vdm.codec import compress as write

    pipe = VDMPipeline.from_pretrained(DIGITS_MODEL)
    summary = write(pipe, torch.zeros(1, 1, 8, 8, dtype=torch.uint8), tmp_path / "f", verify=False, progress_bar=False)
    assert json.loads(json.dumps(summary.to_json()))["marginal_bpd"] is None


# ---- conditions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed_classes(tmp_path_factory):
    """The folder of a model with ten classes, the file of the classes of 60 digits, and a file of these digits."""
    folder = tmp_path_factory.mktemp("classes")
    unet = network(1, num_class_embeds=10, null_class=True)
    scheduler = VDMScheduler.from_noise_schedule(FixedLinearGamma(gamma_min=-8.0, gamma_max=5.0))
    VDMPipeline(unet, scheduler, num_levels=17).save_pretrained(folder / "model")
    labels = load_digits_split()[1].labels[:60]
    save_file({"class_labels": labels}, folder / "labels.safetensors")
    model = ("--model", folder / "model")
    run(compress, *model, "--split", "test[:60]", "--num_steps", 3, "--conditions", folder / "labels.safetensors",
        "--no-compare", "--output", folder / "digits.vdm")  # fmt: skip
    return folder, model


def test_digits_of_known_classes_come_back(packed_classes, tmp_path, capsys):
    folder, model = packed_classes
    conditions = ("--conditions", folder / "labels.safetensors")
    run(decompress_command, *model, "--input", folder / "digits.vdm", "--output_dir", tmp_path / "out", *conditions)
    back = np.load(tmp_path / "out" / "images.npz")["images"]
    assert np.array_equal(back, load_digits_split()[1].images[:60].numpy())
    run(inspect, folder / "digits.vdm", *model, *conditions, "--output", tmp_path / "bits.png")
    assert re.search(r"conditions +class_labels\n", capsys.readouterr().out)


def test_a_file_of_known_classes_needs_them(packed_classes, tmp_path):
    folder, model = packed_classes
    command = (*model, "--input", folder / "digits.vdm", "--output_dir", tmp_path / "out")
    with pytest.raises(SystemExit, match=r"coded with class_labels.*--conditions"):
        run(decompress_command, *command)
    with pytest.raises(SystemExit, match="conditions must be a safetensors file"):
        run(decompress_command, *command, "--conditions", folder / "digits.vdm")
    save_file({"class_labels": torch.zeros(60, dtype=torch.long)}, tmp_path / "other")
    with pytest.raises(SystemExit, match="coded with other class_labels"):
        run(decompress_command, *command, "--conditions", tmp_path / "other")
    assert not (tmp_path / "out").exists()

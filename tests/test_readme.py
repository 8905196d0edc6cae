"""What the README says is so: its names exist, its code runs, its commands parse."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import diffusers_vdm
from diffusers_vdm.diffusers_schedulers import EXPORTABLE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_paper_and_code_names_what_exists():
    rows = re.findall(r"^\|.*\| (`[^|]*`) \| ([\w., /]+\.py) \|$", README, flags=re.MULTILINE)
    assert len(rows) > 12
    for names, files in rows:
        modules = [
            importlib.import_module(f"diffusers_vdm.{f.strip()[:-3].replace('/', '.')}") for f in files.split(",")
        ]
        for name in re.findall(r"`(\w+)", names):
            assert any(hasattr(module, name) for module in modules), (name, files)


def test_every_public_class_is_in_the_readme():
    missing = [n for n in diffusers_vdm.__all__ if n[0].isupper() and n not in README and n not in
               ("NoiseSchedule", "TableGamma", "UNET_PRESETS")]  # fmt: skip
    assert missing == []


def test_the_commands_parse():
    from diffusers_vdm.commands.evaluate_options import parse_options as parse_evaluation
    from diffusers_vdm.commands.train_options import parse_options

    evaluations = re.findall(r"accelerate launch [^\n#]*?examples/evaluate\.py((?:[^\n#\\]|\\\n)*)", README)
    assert len(evaluations) >= 3
    for command in evaluations:
        parse_evaluation("", shlex.split(command.replace("\\\n", " ").split("`")[0]))
    commands = re.findall(r"accelerate launch [^\n#]*?examples/train\.py((?:[^\n#\\]|\\\n)*)", README)
    assert len(commands) >= 5
    for command in commands:
        arguments = shlex.split(command.replace("\\\n", " ").split("`")[0])
        if "--train_data_dir" not in arguments:  # that folder is the reader's
            parse_options("", ["--output_dir", "does-not-exist", *arguments])


# diffusers hands float64 tensors to NumPy in a way that NumPy 2 will drop
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.slow
def test_the_code_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    blocks = [block for block in blocks if "push_to_hub" not in block]  # that runs in tests/test_hub.py, with a Hub
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    scope = {"images_uint8": images, "test_uint8": images}
    exec(blocks[1], scope)
    assert scope["out"].total.shape == (2,) and scope["result"].num_images == 2
    scope |= {"scheduler": diffusers_vdm.VDMScheduler()}
    exec(
        blocks[2].replace("1000", "3").replace("25)", "2)").replace("test_uint8)", "test_uint8, rtol=1, atol=1)"),
        scope,
    )
    assert scope["ode"].num_images == 2 and len(scope["timesteps"]) == 2
    scope |= {"pipe": diffusers_vdm.VDMPipeline.from_pretrained("my-vdm")}
    exec(blocks[3], scope)
    assert type(scope["pipe"].scheduler).__name__ == "UniPCMultistepScheduler"
    # the first block is of a model that the demo makes: this one will do
    exec(blocks[0].replace("runs/digits", "my-vdm").replace("250", "2").replace("16", "1"), scope)
    assert scope["images"][0].size == (32, 32)


def test_the_table_of_schedulers_is_what_can_be_exported():
    rows = dict(re.findall(r"^\| `(\w+Scheduler)` \| (.*) \|$", README, flags=re.MULTILINE))
    assert rows == EXPORTABLE

"""The wheel by itself, in a fresh environment and far from the repository, does all that README.md shows."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.paths import ROOT

FEW = (
    "--max_train_steps 4 --train_batch_size 8 --eval_steps 0 --eval_samples 1 --max_eval_images 20 --num_images 2 "
    "--ddpm_num_inference_steps 3 --lr_warmup_steps 1 --logger none --num_threads 1 --output_dir run"
)


def shell(*command, **more):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, check=False, **more)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources alone."""
    source = tmp_path_factory.mktemp("source")
    for name in ("diffusers_vdm", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, source / name, ignore=ignored) if path.is_dir() else shutil.copy(path, source / name)
    folder = tmp_path_factory.mktemp("wheel")
    shell(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_and_the_console_script(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "diffusers-vdm = diffusers_vdm.commands.__main__:main" in file.read(entry).decode()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "diffusers_vdm").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`python(*arguments)` of an environment with the wheel, in a folder far from the repository; its two folders.

    The other packages are those of this environment: the new one sees them, but not our package.
    """
    folder = tmp_path_factory.mktemp("installed")
    environment = folder / "environment"
    shell(sys.executable, "-m", "venv", "--without-pip", environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    shell(sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--target", packages, wheel)
    here = next(path for path in map(Path, sys.path) if (path / "torch").is_dir())
    others = folder / "others"
    others.mkdir()
    for path in here.iterdir():
        if not path.name.lower().startswith(("diffusers_vdm", "__editable__")):
            (others / path.name).symlink_to(path)
    (packages / "others.pth").write_text(str(others))
    away = folder / "away"
    away.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1", "PYTHONNOUSERSITE": "1"}

    def python(*arguments):
        return shell(environment / "bin" / "python", *arguments, cwd=away, env=variables)

    return python, packages, away


@pytest.fixture(scope="module")
def vdm(installed):
    """`vdm(*arguments)`: the console script of the wheel."""
    python, packages, _ = installed
    script = packages / "bin" / "diffusers-vdm"
    if not script.exists():
        script = packages.parents[2] / "bin" / "diffusers-vdm"
    return lambda *arguments: python(script, *arguments)


@pytest.fixture(scope="module")
def trained(vdm):
    """What `train` printed; its run is in the folder `run`."""
    return vdm("train", *FEW.split())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_package_of_the_wheel_is_imported(installed):
    python, packages, _ = installed
    assert Path(python("-c", "import diffusers_vdm; print(diffusers_vdm.__file__)").strip()).is_relative_to(packages)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_console_script_prints_its_help_the_environment_and_a_plan(vdm):
    assert "train" in vdm("--help") and "diffusers" in vdm("env")
    assert "parameters" in vdm("train", "--dry_run", *FEW.split())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_trains_and_samples(trained, vdm):
    assert "bits/dim on 297 held-out images" in trained
    vdm("sample", "--model", "run", "--num_images", "2", "--num_inference_steps", "2", "--output", "grid.png")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_compresses_and_verifies_in_another_process(trained, vdm):
    text = vdm("compress", "--model", "run", "--split", "test[:3]", "--num_steps", "2", "--output", "digits.vdm")
    assert "another process has decoded it" in text
    assert "3 images" in vdm("decompress", "--model", "run", "--input", "digits.vdm", "--output_dir", "digits")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_measures_and_writes_the_number_on_a_card(trained, installed, vdm):
    python, _, away = installed
    vdm("evaluate", "--model", "run", "--num_samples", "1", "--split", "test[:10]", "--output", "run/report.json")
    assert "written: " in vdm("card", "run")
    report = json.loads((away / "run" / "report.json").read_text(encoding="utf-8"))
    assert str(report["bpd"]) in (away / "run" / "README.md").read_text(encoding="utf-8")
    # the same by `accelerate launch`
    launch = (
        "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    )
    module = [*launch.split(), "-m", "diffusers_vdm.commands.evaluate", "--model", "run", "--num_samples", "1"]
    python(*module, "--split", "test[:10]", "--output", "again.json")
    assert json.loads((away / "again.json").read_text(encoding="utf-8"))["bpd"] == report["bpd"]

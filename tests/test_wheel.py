"""The wheel by itself, in an environment of its own and far from the repository, does all that README shows."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
    """Built of a copy of the sources alone, as of a fresh clone."""
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_the_repository_it_trains_measures_samples_and_writes_a_card(wheel, tmp_path):
    """The locked versions are those of this environment: its packages are seen by the new one, but for ours."""
    environment = tmp_path / "environment"
    shell(sys.executable, "-m", "venv", "--without-pip", environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    shell(sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--target", packages, wheel)
    here = next(path for path in map(Path, sys.path) if (path / "torch").is_dir())
    others = tmp_path / "others"
    others.mkdir()
    for path in here.iterdir():
        if not path.name.lower().startswith(("diffusers_vdm", "__editable__")):
            (others / path.name).symlink_to(path)
    (packages / "others.pth").write_text(str(others))
    script = packages / "bin" / "diffusers-vdm"
    if not script.exists():
        script = environment / "bin" / "diffusers-vdm"
    away = tmp_path / "away"
    away.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1", "PYTHONNOUSERSITE": "1"}
    python = environment / "bin" / "python"

    def vdm(*arguments):
        return shell(python, script, *arguments, cwd=away, env=variables)

    place = shell(python, "-c", "import diffusers_vdm; print(diffusers_vdm.__file__)", cwd=away, env=variables).strip()
    assert Path(place).is_relative_to(packages)
    assert "train" in vdm("--help") and "diffusers" in vdm("env")
    assert "parameters" in vdm("train", "--dry_run", *FEW.split())
    assert "bits/dim on 297 held-out images" in vdm("train", *FEW.split())
    vdm("sample", "--model", "run", "--num_images", "2", "--num_inference_steps", "2", "--output", "grid.png")
    vdm("evaluate", "--model", "run", "--num_samples", "1", "--split", "test[:10]", "--output", "run/report.json")
    assert "written: " in vdm("card", "run")
    report = json.loads((away / "run" / "report.json").read_text(encoding="utf-8"))
    assert str(report["bpd"]) in (away / "run" / "README.md").read_text(encoding="utf-8")
    launched = (
        "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    )
    module = [*launched.split(), "-m", "diffusers_vdm.commands.evaluate", "--model", "run", "--num_samples", "1"]
    shell(python, *module, "--split", "test[:10]", "--output", "again.json", cwd=away, env=variables)
    assert json.loads((away / "again.json").read_text(encoding="utf-8"))["bpd"] == report["bpd"]

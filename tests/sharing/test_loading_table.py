"""The table of docs/sharing.md, made by trying each call; `python -m tests.sharing.test_loading_table` prints it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import hub_server
from tests.models import curved_gamma, pipeline
from tests.paths import ROOT

PAGE = ROOT / "docs" / "sharing.md"
CALLS = [
    'VDMPipeline.from_pretrained("user/vdm")',
    'VDMUNet2DModel.from_pretrained("user/vdm", subfolder="unet")',
    'VDMScheduler.from_pretrained("user/vdm", subfolder="scheduler")',
    'MonotoneGammaNetwork.from_pretrained("user/vdm", subfolder="noise_schedule")',
    'DDIMScheduler.from_pretrained("user/vdm", subfolder="scheduler")',
    'DiffusionPipeline.from_pretrained("user/vdm")',
    'DiffusionPipeline.from_pretrained("user/vdm", trust_remote_code=True)',
    'VDMPipeline.from_pretrained("user/vdm-with-code")',
    'DiffusionPipeline.from_pretrained("user/vdm-with-code")',
    'DiffusionPipeline.from_pretrained("user/vdm-with-code", trust_remote_code=True)',
]
PUSH = """
import sys
from diffusers_vdm import VDMPipeline
pipe = VDMPipeline.from_pretrained(sys.argv[1])
pipe.push_to_hub("user/vdm")
pipe.push_to_hub("user/vdm-with-code", include_code=True)
"""
TRY = """
import json, sys
calls, column = json.loads(sys.argv[1]), sys.argv[2]
if column == "diffusers alone":
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "diffusers_vdm":
                raise ImportError(f"{name} is blocked")
    sys.meta_path.insert(0, Blocked())
else:
    import diffusers_vdm
    from diffusers_vdm import MonotoneGammaNetwork, VDMPipeline, VDMScheduler, VDMUNet2DModel
    if column == "`register()`":
        diffusers_vdm.register()
from diffusers import DDIMScheduler, DiffusionPipeline
import diffusers
diffusers.utils.logging.set_verbosity_error()
def cell(call):
    if call.split(".")[0] not in globals():
        return "–"
    try:
        loaded = eval(call)
        if hasattr(loaded, "unet"):
            loaded.set_progress_bar_config(disable=True)
            loaded(num_inference_steps=1)
        return "yes"
    except Exception:
        return "no"
print(json.dumps([cell(call) for call in calls]))
"""
COLUMNS = ["our package", "`register()`", "diffusers alone"]


def table() -> str:
    """Each call in a process of each column, against a Hub on this machine."""
    hub = hub_server.HubServer()
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"HF_TOKEN": "hf_user"}
        for name, value in hub_server.environment(hub, home).items():
            if name != "HF_TOKEN":
                environment = {k: v for k, v in environment.items() if k != name} | ({name: value} if value else {})

        def python(*arguments: str) -> str:
            command = [sys.executable, "-c", *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        from diffusers_vdm import VDMScheduler

        schedule = curved_gamma()
        pipeline(VDMScheduler.from_noise_schedule(schedule), schedule).save_pretrained(Path(home) / "saved")
        python(PUSH, str(Path(home) / "saved"))
        columns = [json.loads(python(TRY, json.dumps(CALLS), name).splitlines()[-1]) for name in COLUMNS]
    hub.shutdown()
    hub.server_close()
    lines = ["| call | " + " | ".join(COLUMNS) + " |", "| --- |" + " :-: |" * len(COLUMNS)]
    lines += [
        f"| `{call}` | " + " | ".join(row) + " |" for call, row in zip(CALLS, zip(*columns, strict=True), strict=True)
    ]
    return "\n".join(lines)


@pytest.mark.slow
def test_the_table_of_the_documentation_is_what_happens():
    assert table() in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table())

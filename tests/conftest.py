"""Fixtures that all tests share, and the guards of the global random number generators.

House rule: every random draw takes a `generator`; nothing in the package reads or seeds the global state. Two guards:

* `poisoned_global_rng` (every test, by itself) seeds the global generators of torch, NumPy and Python from the name of
  the test and from a salt, `VDM_TEST_SALT`. The salt is the current commit unless it is set, so a test that depends on
  the global state gives other numbers after the next commit. The header of a run prints the salt:
  `VDM_TEST_SALT=… pytest …` repeats its numbers.
* `untouched_global_rng` fails the test if any of the three generators was used or seeded in it. A file takes it with
  `pytestmark = pytest.mark.usefixtures("untouched_global_rng")`. Building a network draws from the global generator:
  build it within `fixed_weights()` of models.py, which puts the generator back.
"""

import multiprocessing
import os
import random
import subprocess
import zlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from diffusers_vdm import MonotoneGammaNetwork, VDMPipeline, VDMScheduler, __version__
from tests import hub_server
from tests.models import fixed_weights, tiny_preset
from tests.paths import ROOT


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(20210701)


@pytest.fixture(scope="module")
def hub():
    """A Hub on this machine; `hub.reset()` empties it."""
    hub = hub_server.HubServer()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="session")
def client(tmp_path_factory):
    """A process with a Hub and the client that talks to it, for the tests marked `in_client`."""
    context = multiprocessing.get_context("spawn")
    home = tmp_path_factory.mktemp("hf_home")
    with ProcessPoolExecutor(1, mp_context=context, initializer=hub_server.start, initargs=(home,)) as pool:
        yield pool


@pytest.fixture(scope="module")
def digits_pipeline(tmp_path_factory):
    """The folder of a saved pipeline for the digits, of a few thousand parameters."""
    folder = tmp_path_factory.mktemp("model")
    with fixed_weights():
        schedule = MonotoneGammaNetwork(gamma_min=-7.5, gamma_max=5.0)
    scheduler = VDMScheduler.from_noise_schedule(schedule)
    VDMPipeline(tiny_preset(), scheduler, schedule, num_levels=17).save_pretrained(folder)
    return folder


# ---- the global random state -------------------------------------------------------------------------------------


def pytest_configure(config):
    # processes that pytest starts, those of xdist among them, inherit the environment: all take the same salt
    os.environ.setdefault("VDM_TEST_SALT", _commit() or __version__)


def pytest_report_header(config):
    return f"global random state: VDM_TEST_SALT={os.environ['VDM_TEST_SALT']}"


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.stats.get("failed"):  # `pytest -q` prints no header
        terminalreporter.write_line(f"VDM_TEST_SALT={os.environ['VDM_TEST_SALT']} repeats the global random state")


def _commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@pytest.fixture(autouse=True)
def poisoned_global_rng(request):
    seed = zlib.crc32(f"{os.environ['VDM_TEST_SALT']} {request.node.nodeid}".encode())
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the global state is what is guarded here
    random.seed(seed)


@pytest.fixture
def untouched_global_rng(poisoned_global_rng):
    before = _global_states()
    yield
    used = [name for name, state in _global_states().items() if state != before[name]]
    if used:
        pytest.fail(
            f"the global generator of {', '.join(used)} was used: pass a generator, or build networks within "
            "fixed_weights() of tests/models.py."
        )


def _global_states() -> dict[str, bytes]:
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": keys.tobytes() + repr((name, position, has_gauss, gauss)).encode(),
        "random": repr(random.getstate()).encode(),
    }

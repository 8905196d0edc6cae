"""Fixtures that every test file shares, and the watch over the global random number generators.

House rule: every random draw takes a `generator`; nothing in the package reads or seeds the global state. Two guards:

* `poisoned_global_rng` (every test, by itself) seeds the global generators of torch, NumPy and Python from the name of
  the test and from `VDM_TEST_SALT`. A test that leans on them gives other numbers under another salt
  (`VDM_TEST_SALT=1 pytest`), in another file and under another name: it cannot pass by a lucky seed for long.
* `untouched_global_rng` fails the test if any of the three generators was used or seeded in it. A file takes it with
  `pytestmark = pytest.mark.usefixtures("untouched_global_rng")`. Building a fresh network draws from the global
  generator, and rightly so; do that within `torch.random.fork_rng()`, or do not take this fixture.
"""

import os
import random
import zlib

import numpy as np
import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(20210701)


@pytest.fixture(scope="module")
def hub():
    """A Hub on this machine; `hub.reset()` empties it."""
    import hub_server

    hub = hub_server.HubServer()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(autouse=True)
def poisoned_global_rng(request):
    salt = os.environ.get("VDM_TEST_SALT", "0")
    seed = zlib.crc32(f"{salt} {request.node.nodeid}".encode())
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
            "torch.random.fork_rng()."
        )


def _global_states() -> dict[str, bytes]:
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": keys.tobytes() + repr((name, position, has_gauss, gauss)).encode(),
        "random": repr(random.getstate()).encode(),
    }

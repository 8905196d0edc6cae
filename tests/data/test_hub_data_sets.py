"""Data sets of image files on the Hub: files that `datasets` would put into two splits or into none are refused."""

import json
import os
import subprocess
import sys

import pytest

from tests import hub_server
from tests.pictures import png

OPEN = """
import json, sys
from diffusers_vdm.data.image_sources import shared_with_other_splits
from diffusers_vdm.data.images import load_images
from diffusers_vdm.data.image_stream import ImageStream
name, split, cache = sys.argv[1:]
try:
    data = load_images(name, split, cache_dir=cache, progress_bar=False)
    stream = ImageStream(name, split, cache_dir=cache).batch(range(len(data)))[0]
    found = [sorted(images[:, 0, 0, 0].tolist()) for images in (data.images, stream)]
    shared = shared_with_other_splits(name, split, cache_dir=cache, progress_bar=False)
    print(json.dumps([*found, data.class_names, shared]))
except ValueError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture
def opened(hub, tmp_path):
    """What a separate process finds in a split of a repository with some image files."""

    def opened(split, *names):
        hub.reset()
        hub.create("datasets/user/pictures", {name: png(i) for i, name in enumerate(names)})
        environment = os.environ | hub_server.environment(hub, tmp_path / "home")
        environment = {name: value for name, value in environment.items() if value}
        command = [sys.executable, "-c", OPEN, "user/pictures", split, str(tmp_path / "cache")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return opened


@pytest.mark.slow
def test_unambiguous_splits_and_classes_are_used(opened):
    names = ["train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png"]
    assert opened("test", *names) == [[2, 3], [2, 3], ["a", "b"], {}]
    assert opened("test", "train/1.png", "test/2.png") == [[1], [1], None, {}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/apple/1.png", "train/train/2.png", "test/apple/3.png", "test/train/4.png"], "is in the splits"),
        (["1.png", "2.png", "photo of a train.png", "photo of test tubes.png"], "are in no split, the first '1.png'"),
    ],
)
def test_files_in_two_splits_or_in_none_are_refused(opened, names, message):
    for split in ("train", "test"):
        assert message in opened(split, *names)

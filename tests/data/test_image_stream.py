"""data/image_stream.py: the order depends on seed and position alone, and an epoch holds every image once."""

import json
import tarfile
from io import BytesIO
from itertools import chain

import datasets
import numpy as np
import pytest
import torch

from diffusers_vdm.data import image_stream as module
from diffusers_vdm.data.image_stream import ImageStream
from diffusers_vdm.data.images import load_images
from tests.pictures import DEEP, parquet_folder, picture, plain, write_image_folder

N = 23


@pytest.fixture
def folder(tmp_path):
    """23 images in 4 parquet files of unequal length; the pixels of image i are i, its class i mod 2."""
    return parquet_folder(tmp_path / "data", [(plain(i), i % 2) for i in range(N)], shards=4)


@pytest.fixture
def stream(folder, tmp_path):
    def open_stream(path=folder, split="train", **options):
        return ImageStream(path, split, **{"cache_dir": str(tmp_path / "cache"), "buffer_size": 5, **options})

    return open_stream


def identities(stream, positions):
    images, labels = stream.batch(positions)
    assert images.dtype == torch.uint8 and images.shape[1:] == stream.shape
    found = images[:, 0, 0, 0].tolist()
    assert bool((images == images[:, :1, :1, :1]).all())
    assert labels.dtype == torch.int64 and labels.tolist() == [i % 2 for i in found]
    return found


def test_a_stream_has_the_attributes_that_training_reads(stream, folder):
    data = stream()
    assert (data.shape, data.num_levels, data.num_classes) == ((3, 4, 4), 256, 2)
    assert data.name == f"{folder}, train, streamed" and len(data.fingerprint) == 16
    assert data.num_images is None and data.has_labels
    assert stream(num_images=N).num_images == N


def test_every_epoch_holds_every_image_once_in_an_order_of_its_own(stream):
    data = stream()
    epochs = [identities(data, range(e * N, (e + 1) * N)) for e in range(4)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and epochs[0] != list(range(N))
    assert data.num_images == N
    assert identities(stream(seed=1), range(N)) != epochs[0]
    # shards are shuffled too: within an epoch an image moves by the length of the buffer at most
    assert len({tuple(i // 6 for i in epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("size", [1, 7, 30])
def test_the_order_does_not_depend_on_the_batches(stream, size):
    expected = identities(stream(), range(60))
    data = stream()
    assert list(chain(*(identities(data, range(p, min(p + size, 60))) for p in range(0, 60, size)))) == expected


@pytest.mark.parametrize("processes", [2, 3])
def test_the_rows_of_several_processes_are_those_of_one(stream, processes):
    expected = identities(stream(), range(60))
    together = [None] * 60
    for rank in range(processes):
        data = stream()
        for start in range(0, 60, 12):  # each takes its rows of every global batch
            rows = [p for p in range(start, start + 12) if p % processes == rank]
            for p, found in zip(rows, identities(data, rows), strict=True):
                together[p] = found
    assert together == expected


@pytest.mark.parametrize("position", [0, 3, 5, 22, 23, 31, 50])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("known", [None, N])
def test_a_resumed_run_gets_the_same_images(stream, position, with_state, known):
    expected = identities(stream(), range(70))
    before, after = stream(num_images=known), stream(num_images=known)
    if position:
        identities(before, range(position))
    if with_state:
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert identities(after, range(position, 70)) == expected[position:]


def test_batches_are_read_from_any_position(stream):
    expected = identities(stream(), range(100))
    data = stream()
    for start in (40, 0, 99, 22, 23, 24, 70, 69):
        assert identities(data, range(start, min(start + 9, 100))) == expected[start : start + 9]


def test_a_loaded_state_resumes_without_reading_earlier_shards(stream, monkeypatch):
    data, fresh, resumed = stream(), stream(), stream()
    identities(data, range(20))
    resumed.load_state_dict(data.state_dict())
    opened = []
    real = ImageStream._shard
    monkeypatch.setattr(ImageStream, "_shard", lambda self, i: opened.append(i) or real(self, i))
    expected = identities(fresh, [20])
    assert len(opened) == 4
    opened.clear()
    assert identities(resumed, [20]) == expected
    assert len(opened) == 1


def test_only_the_rows_that_are_asked_for_are_decoded(stream, monkeypatch):
    data, real, decoded = stream(), module.decode, []
    monkeypatch.setattr(module, "decode", lambda *arguments: decoded.append(1) or real(*arguments))
    identities(data, [2, 9, 30])
    assert len(decoded) == 3


def test_a_stream_reads_no_further_ahead_than_its_buffer(stream, monkeypatch):
    real, read = ImageStream._source, []

    def counted(self, epoch, start):
        for row in real(self, epoch, start):
            read.append(row)
            yield row

    monkeypatch.setattr(ImageStream, "_source", counted)
    data = stream()
    for position in range(N):
        identities(data, [position])
        assert len(read) <= position + 1 + 5


@pytest.mark.parametrize("wrong", [N - 1, N + 1, N - 20])
@pytest.mark.parametrize("size", [1, 10])
def test_a_wrong_number_of_images_is_refused(stream, wrong, size):
    data = stream(num_images=wrong)
    with pytest.raises(ValueError, match="num_images"):
        for start in range(0, 40, size):
            data.batch(range(start, start + size))


BAD = {
    "size": (plain(7, (4, 5)), "set resolution"),
    "mode": (plain(7, mode="L"), "set image_mode"),
    "cut": (plain(7)[:50], "cannot be decoded"),
    "depth": (DEEP["RGB;16B"], "more than 8 bits"),
    "nothing": (None, "cannot be decoded"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_image_is_named(stream, tmp_path, bad):
    content, message = BAD[bad]
    rows = [(content if i == 7 else plain(i), 0) for i in range(12)]
    data = stream(parquet_folder(tmp_path / "bad", rows, shards=3))
    with pytest.raises(ValueError, match=message) as error:
        for position in range(12):
            data.batch([position])
    assert "image 3 of shard 1 of" in str(error.value) and ("file 007.png" in str(error.value)) == (
        content is not None
    )
    # the other images can still be read
    good = [p for p in range(12) if p != position]
    assert sorted(data.batch(good)[0][:, 0, 0, 0].tolist()) == [i for i in range(12) if i != 7]


def test_classes_that_are_missing(stream, tmp_path):
    path = parquet_folder(tmp_path / "none", [(plain(i), None) for i in range(3)])
    data = stream(path)
    assert not data.has_labels and data.batch(range(3))[1] is None and data.num_classes is None
    with pytest.raises(ValueError, match="holds no class"):
        stream(path, label_column="label")
    path = parquet_folder(tmp_path / "some", [(plain(i), (1, None)[i % 2]) for i in range(3)])
    with pytest.raises(ValueError, match="image 1 of shard 0.*holds no class"):
        stream(path).batch(range(3))
    assert stream(path, label_column="").batch(range(3))[1] is None


def test_a_class_that_the_data_set_does_not_have(stream, tmp_path):
    kinds = {"label": datasets.Value("int64")}
    path = parquet_folder(tmp_path / "data2", [(plain(i), i) for i in range(3)], **kinds)
    data = stream(path, label_column="label")
    assert data.num_classes is None and sorted(data.batch(range(3))[1].tolist()) == [0, 1, 2]


def test_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [picture(rng, (10, 6)) for _ in range(9)]
    path = write_image_folder(tmp_path / "data", pictures)
    options = {"is_folder": True, "cache_dir": str(tmp_path / "cache"), "buffer_size": 100}
    data = ImageStream(path, "train", **options)
    images, labels = data.batch(range(8))
    assert data.shape == (3, 6, 10) and data.num_classes == 2 and sorted(labels.tolist()) == [0] * 4 + [1] * 4
    expected = sorted(np.asarray(image).transpose(2, 0, 1).tobytes() for image in pictures[:8])
    assert sorted(image.numpy().tobytes() for image in images) == expected
    assert len(set(map(tuple, (labels.tolist(), data.batch(range(8, 16))[1].tolist())))) == 2
    # each image has one crop, in every epoch
    crops = ImageStream(path, "train", resolution=6, **options)
    first, second = ({i.numpy().tobytes() for i in crops.batch(range(e * 8, e * 8 + 8))[0]} for e in (0, 1))
    assert first == second and crops.shape == (3, 6, 6)
    gray = ImageStream(path, "train", image_mode="L", resolution=4, center_crop=True, **options)
    assert gray.shape == (1, 4, 4) and gray.batch([3])[0].shape == (1, 1, 4, 4)


def test_a_folder_of_tar_files(tmp_path):
    """WebDataset's format: members of one name and several endings are a row."""
    (tmp_path / "data").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "data" / f"train-{shard}.tar", "w") as file:
            for i in range(shard * 3, shard * 3 + 3):
                for ending, content in (("png", plain(i)), ("cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(f"{i:03d}.{ending}")
                    member.size = len(content)
                    file.addfile(member, BytesIO(content))
    options = {"label_column": "cls", "cache_dir": str(tmp_path / "cache")}
    data = ImageStream(str(tmp_path / "data"), "train", buffer_size=2, **options)
    assert sorted(identities(data, range(6))) == list(range(6))
    whole = load_images(str(tmp_path / "data"), "train", progress_bar=False, **options)
    assert whole.images[:, 0, 0, 0].tolist() == list(range(6)) and whole.labels.tolist() == [0, 1] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train[:10]"}, "slices"),
        ({"split": "validation"}, "nknown split"),
        ({"path": "does/not/exist"}, "no data files"),
        ({"image_column": "img"}, "image_column"),
        ({"image_mode": "RGBA"}, "image_mode"),
        ({"buffer_size": 0}, "buffer_size"),
        ({"num_images": 0}, "num_images"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_of_a_stream_are_refused(stream, options, message):
    with pytest.raises(ValueError, match=message):
        stream(**options)


@pytest.mark.parametrize("positions", [[-1], []], ids=["negative", "none"])
def test_wrong_positions_are_refused(stream, positions):
    with pytest.raises(ValueError, match="positions"):
        stream().batch(positions)


def test_a_shard_that_breaks_is_named(stream, folder, tmp_path):
    data = stream()
    broken = sorted((tmp_path / "data").glob("*.parquet"))[2]
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises((ValueError, OSError), match="shard 2 of") as error:
        data.batch(range(N))
    assert "cannot be read" in str(error.value)


def test_the_fingerprint_is_of_the_data(stream, tmp_path, folder):
    data = stream()
    assert data.fingerprint == stream(seed=3, buffer_size=9).fingerprint
    others = [
        stream(parquet_folder(tmp_path / "other", [(plain(200 - i), i % 2) for i in range(N)], shards=4)),
        stream(parquet_folder(tmp_path / "fewer", [(plain(i), i % 2) for i in range(N)], shards=3)),
        stream(image_mode="L"),
        stream(label_column=""),
    ]
    assert len({other.fingerprint for other in (data, *others)}) == 5
    for other in (others[0], stream(seed=1), stream(buffer_size=4)):
        with pytest.raises(ValueError, match="state"):
            other.load_state_dict(data.state_dict())

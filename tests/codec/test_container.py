"""codec/container.py: what is written is read, and a damaged file is never taken for a whole one."""

import dataclasses
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_vdm.codec import CodecError
from diffusers_vdm.codec.container import (
    CHECKED_VALUES,
    LAYOUTS,
    Header,
    ImageEntry,
    Reader,
    Segment,
    Writer,
    check_groups,
    message_bytes,
    message_words,
)

HEADERS = st.builds(
    Header,
    num_steps=st.integers(1, 1 << 20),
    levels=st.none() | st.sets(st.integers(0, 2000), min_size=1).map(lambda levels: tuple(sorted(levels))),
    variance=st.sampled_from(["posterior", "optimal"]),
    spacing=st.integers(1, 256),
    dtype=st.sampled_from(["float64", "float32"]),
    shape=st.tuples(st.integers(1, 1024), st.integers(1, 1 << 16), st.integers(1, 1 << 16)),
    num_levels=st.integers(2, 1 << 16),
    image_size=st.none() | st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    layout=st.sampled_from(LAYOUTS),
    weights=st.binary(min_size=8, max_size=8),
    numbers=st.binary(min_size=4, max_size=4),
    coder=st.binary(min_size=2, max_size=2),
    versions=st.text(max_size=40),
    sides=st.binary(max_size=20),
)
ENTRIES = st.builds(
    ImageEntry, st.integers(1, 300), st.integers(1, 300), st.sampled_from(["", "L", "RGB", "RGBA"]), st.text()
)


def header(**changes):
    values = {
        "num_steps": 7, "levels": (0, 3, 9), "variance": "optimal", "spacing": 64, "dtype": "float64",
        "shape": (3, 8, 8), "num_levels": 256, "image_size": None, "layout": "files", "weights": b"weights!",
        "numbers": b"nmbr", "coder": b"co", "versions": "1 2 3", "sides": b"\0",
    }  # fmt: skip
    return Header(**values | changes)


def segment(images, words, channels=3):
    checks = [zlib.crc32(bytes([i])) for i in range(len(check_groups(images, channels)))]
    return Segment(images, 1, [2, 2, 1], checks, b"\1\5", len(words), zlib.crc32(message_bytes(words)))


def small_file(**changes):
    """A file of two segments, and these."""
    rng = np.random.default_rng(0)
    head, file, parts = header(**changes), BytesIO(), []
    writer = Writer(file, head)
    for count in (2, 3):
        entry = ImageEntry(*head.image_size) if head.image_size else ImageEntry(9, 8, "L", f"a/{count}.png")
        words = rng.integers(1, 2**32, 5, dtype=np.uint32)
        parts.append((segment([entry] * count, words), words))
        writer.segment(*parts[-1])
    writer.end()
    assert writer.size == len(file.getvalue()) and writer.num_images == 5
    return file.getvalue(), parts


def read(content, keep=False):
    reader = Reader(BytesIO(content))
    return list(reader.segments(keep))


KINDS = {"names": {}, "one size": {"image_size": (8, 8), "layout": "NHWC", "levels": None}}


# ---- parts -------------------------------------------------------------------------------------------------------


@given(HEADERS)
def test_a_header_comes_back_from_bytes(head):
    assert Header.from_bytes(head.to_bytes()) == head


@given(HEADERS, st.data())
def test_a_segment_comes_back_from_bytes(head, data):
    if head.image_size is None:
        images = data.draw(st.lists(ENTRIES, min_size=1, max_size=6))
    else:
        pixels = head.shape[0] * head.image_size[0] * head.image_size[1]
        images = [ImageEntry(*head.image_size)] * data.draw(st.integers(1, max(1, min(50, (1 << 25) // pixels))))
    groups = check_groups(images, head.shape[0])
    checks = st.lists(st.integers(0, 2**32 - 1), min_size=len(groups), max_size=len(groups))
    given_segment = Segment(
        images=images,
        num_plain=data.draw(st.integers(0, 1 << 30)),
        batches=data.draw(st.lists(st.integers(1, 3) | st.integers(1, 1 << 26))),
        checks=data.draw(checks),
        sides=data.draw(st.binary(max_size=9)),
        num_words=data.draw(st.integers(0, 1 << 30)),
        words_check=data.draw(st.integers(0, 2**32 - 1)),
    )
    assert Segment.from_bytes(given_segment.to_bytes(head), head) == given_segment


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_the_words_of_a_message_come_back(values):
    words = np.array(values, dtype=np.uint32)
    content = message_bytes(words)
    assert len(content) == 4 * len(words)
    assert np.array_equal(message_words(content), words)
    if values:
        assert content[:4] == values[-1].to_bytes(4, "little")  # the top of the stack is first


@given(st.lists(ENTRIES), st.integers(1, 4))
def test_each_checksum_covers_enough_values_and_each_image_once(images, channels):
    groups, at = check_groups(images, channels), 0
    assert sum(groups) == len(images) and all(groups)
    for size in groups:
        values = [channels * image.height * image.width for image in images[at : at + size]]
        at += size
        assert sum(values) >= CHECKED_VALUES or at == len(images)
        assert sum(values[:-1]) < CHECKED_VALUES


@given(st.binary(max_size=80))
def test_any_bytes_are_a_header_or_are_refused(content):
    try:
        assert isinstance(Header.from_bytes(content), Header)
    except CodecError:
        pass


@given(st.sampled_from(sorted(KINDS)), st.binary(max_size=80))
def test_any_bytes_are_a_segment_or_are_refused(kind, content):
    try:
        assert isinstance(Segment.from_bytes(content, header(**KINDS[kind])), Segment)
    except CodecError:
        pass


@pytest.mark.parametrize(
    "listed",
    [
        b'[["a",8,"",""]]', b"[[1e999,8,null,null]]", b"[[8,8]]", b"[[0,8,0,0]]", b"[1]", b"{}",
        b"3", b"[]", b"[[8,8,0,0],[8,8,0,0]]", b"[" * 100_000, b"\xff", b'[[8,1048576,"",""]]', b'[[NaN,8,"",""]]',
    ],
    ids=range(13),
)  # fmt: skip
def test_lists_of_images_that_are_none_are_refused(listed):
    packed = zlib.compress(listed)
    content = bytes([1, len(packed) & 127 | 128, len(packed) >> 7]) + packed
    with pytest.raises(CodecError, match="list of images"):
        Segment.from_bytes(content + bytes(20), header())


@pytest.mark.parametrize(
    "changes",
    [{"num_steps": 0}, {"spacing": 0}, {"shape": (0, 8, 8)}, {"shape": (3, 8, 0)}, {"num_levels": 1},
     {"num_levels": 70_000}, {"image_size": (0, 8)}, {"image_size": (8, 0)}],
)  # fmt: skip
def test_headers_with_impossible_values_are_refused(changes):
    with pytest.raises(CodecError, match="the file is damaged"):
        Header.from_bytes(header(**changes).to_bytes())


def test_more_images_than_a_segment_holds_are_refused():
    head = header(image_size=(512, 512))
    images = [ImageEntry(512, 512)]
    checks = [0] * 43
    given_segment = Segment(images * 43, 0, [], checks, b"", 0, 0)
    with pytest.raises(CodecError, match="the file is damaged"):
        Segment.from_bytes(given_segment.to_bytes(head), head)
    one = header(image_size=(8000, 8000))  # one image may be larger
    given_segment = Segment([ImageEntry(8000, 8000)], 0, [], [0], b"", 0, 0)
    assert Segment.from_bytes(given_segment.to_bytes(one), one) == given_segment


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_as_it_was_written(kind):
    content, parts = small_file(**KINDS[kind])
    reader = Reader(BytesIO(content))
    assert reader.header == header(**KINDS[kind])
    found = list(reader.segments())
    assert reader.size == len(content)
    for (part, words), (written_part, written_words) in zip(found, parts, strict=True):
        assert part == written_part and np.array_equal(words, written_words)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_with_one_other_byte_is_refused(kind, keep):
    content, _ = small_file(**KINDS[kind])
    for at in range(len(content)):
        for change in (*(1 << bit for bit in range(8)), 0xFF, content[at]):
            changed = bytearray(content)
            changed[at] ^= change
            if changed != content:
                with pytest.raises(CodecError):
                    read(bytes(changed), keep)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_that_is_cut_off_is_refused(kind, keep):
    content, _ = small_file(**KINDS[kind])
    for end in range(len(content)):
        with pytest.raises(CodecError):
            read(content[:end], keep)


def test_a_file_with_more_behind_its_end_is_refused():
    content, _ = small_file()
    with pytest.raises(CodecError, match="its end does not fit"):
        read(content + b"\0")


def test_a_file_without_one_of_its_segments_is_refused():
    content, parts = small_file()
    first = Writer(file := BytesIO(), header())
    first.segment(*parts[0])
    without = file.getvalue() + content[-content[::-1].index(b"\0") - 1 :]
    with pytest.raises(CodecError, match="its end does not fit"):
        read(without)


def test_what_comes_before_a_damage_is_kept():
    content, parts = small_file()
    damaged = content[: content.index(message_bytes(parts[1][1])) + 7]
    segments = Reader(BytesIO(damaged)).segments(keep=True)
    found = [next(segments), next(segments)]
    assert np.array_equal(found[0][1], parts[0][1])
    assert found[1][0] == parts[1][0]
    assert found[1][1].tolist()[-1:] == parts[1][1].tolist()[-1:]  # the top of the stack
    assert found[1][1].tolist()[:-2] == [0, 0, 0]
    with pytest.raises(CodecError, match="damaged or truncated"):
        next(segments)
    segments = Reader(BytesIO(damaged)).segments()
    next(segments)
    with pytest.raises(CodecError, match="damaged or truncated"):
        next(segments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not one that `diffusers-vdm compress` wrote"),
        (b"\x89PNG\r\n\x1a\n", "not one that `diffusers-vdm compress` wrote"),
        (b"\x89VDM", "the file is truncated"),
        (b"\x89VDM\x03", "has version 3 of the format, and this package reads 1 and 2"),
        (b"\x89VDM\x01", "the file is truncated"),
    ],
)
def test_other_files_are_refused(content, message):
    with pytest.raises(CodecError, match=message):
        Reader(BytesIO(content))


def test_a_header_is_not_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        header().num_steps = 3

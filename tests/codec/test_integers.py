"""codec/integers.py: numbers of any size come back, and damaged ones are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_vdm.codec import CodecError
from diffusers_vdm.codec.integers import read_varint, write_varint

NUMBERS = st.integers(0, 62).flatmap(lambda bits: st.integers(0, 2**bits))


def written(*values):
    content = bytearray()
    for value in values:
        write_varint(content, value)
    return bytes(content)


@given(st.lists(NUMBERS), st.binary(max_size=3))
def test_numbers_come_back_in_order(values, rest):
    content, at = written(*values) + rest, 0
    for value in values:
        found, at = read_varint(content, at, most=1 << 62)
        assert found == value
    assert content[at:] == rest


@given(NUMBERS)
def test_a_number_has_seven_bits_a_byte(value):
    assert len(written(value)) == max(1, -(-value.bit_length() // 7))


@given(NUMBERS)
def test_a_number_that_is_cut_off_is_refused(value):
    content = written(value)
    for end in range(len(content)):
        with pytest.raises(CodecError, match="ends within a number"):
            read_varint(content[:end], 0, most=1 << 62)


@given(NUMBERS)
def test_a_number_above_the_largest_possible_one_is_refused(value):
    assert read_varint(written(value), 0, most=value)[0] == value
    with pytest.raises(CodecError, match=f"a number is {value + 1}, and at most {value} is possible"):
        read_varint(written(value + 1), 0, most=value)


def test_a_number_without_an_end_is_refused():
    with pytest.raises(CodecError, match="ends within a number"):
        read_varint(b"\xff" * 1000, 0, most=1 << 62)


@given(st.binary(max_size=12), st.integers(0, 14))
def test_any_bytes_are_a_number_or_are_refused(content, at):
    try:
        value, end = read_varint(content, at, most=1 << 62)
    except CodecError:
        return
    assert 0 <= value <= 1 << 62 and at < end <= len(content)

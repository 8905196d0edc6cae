"""codec/rounding.py: a machine with slightly other numbers rounds to the same integers, or says that it cannot."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from diffusers_vdm.codec import CodecError
from diffusers_vdm.codec.rounding import Rounding

TOLERANCE = 0.01
SEEDS = st.integers(0, 2**32 - 1)
# anywhere, on an edge, and about as far from one as the tolerance
VALUES = st.lists(
    st.floats(-1e6, 1e6)
    | st.builds(
        lambda k, by: k + 0.5 + by * TOLERANCE,
        st.integers(-1000, 1000),
        st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.5, 0.999, -0.999, 1.001, -1.001]) | st.floats(-2, 2),
    ),
    min_size=1,
    max_size=40,
).map(np.array)


def encoded(values, tolerance=TOLERANCE, start=0):
    """What an encoder rounds to, and a decoder with the sides of the file."""
    rounding = Rounding(tolerance)
    rounded = rounding(values, start)
    sides, _ = Rounding.sides_from(rounding.to_bytes(), 0)
    return rounded, Rounding(tolerance, sides)


@given(VALUES)
def test_an_encoder_rounds_to_the_nearest_integers(values):
    rounded, _ = encoded(values)
    assert rounded.dtype == np.int64
    assert bool((np.abs(rounded - values) <= 0.5).all())


@given(VALUES, SEEDS)
def test_a_decoder_with_small_shifts_rounds_as_the_encoder(values, seed):
    shift = np.random.default_rng(seed).uniform(-0.499, 0.499, len(values)) * TOLERANCE
    rounded, decoder = encoded(values)
    assert np.array_equal(decoder(values + shift, 0), rounded)
    assert decoder.largest_shift < 0.5 * TOLERANCE


@given(VALUES, SEEDS)
def test_a_decoder_with_larger_shifts_rounds_as_the_encoder_or_raises(values, seed):
    shift = np.random.default_rng(seed).uniform(-1.499, 1.499, len(values)) * TOLERANCE
    rounded, decoder = encoded(values)
    try:
        found = decoder(values + shift, 0)
    except CodecError as error:
        assert "more than the tolerance of 0.01" in str(error)
    else:
        assert np.array_equal(found, rounded)


@given(st.lists(st.floats(-(2.0**51), 2.0**51), min_size=1).map(np.array), SEEDS)
@example(np.array([2.0**40 + 0.999, -(2.0**45) - 0.001]), 0)
def test_values_of_any_size_are_rounded_alike(values, seed):
    """The tolerance grows with the values, but not beyond what an edge can tell apart."""
    shift = np.random.default_rng(seed).uniform(-0.4, 0.4, len(values)) * TOLERANCE
    rounded, decoder = encoded(values)
    assert np.array_equal(decoder(values + shift, 0), rounded)


def test_values_far_from_edges_are_not_recorded():
    values = np.arange(-50, 50) + 0.4
    rounding = Rounding(TOLERANCE)
    assert rounding(values, 0).tolist() == list(range(-50, 50)) and rounding.sides == {}
    rounding(np.array([3.5, 3.499, 7.0]), 10)
    assert rounding.sides == {10: 1, 11: 0}


def test_a_recorded_side_decides_on_either_side_of_its_edge():
    decoder = Rounding(TOLERANCE, {0: 0, 1: 0, 2: 1, 3: 1})
    assert decoder(np.array([4.498, 4.502, -4.498, -4.503]), 0).tolist() == [4, 4, -4, -4]
    assert decoder.largest_shift == pytest.approx(0.003)


@given(st.lists(st.integers(1, 7), min_size=1), SEEDS)
def test_positions_are_counted_from_the_start_of_each_part(sizes, seed):
    """Parts in another order, as a decoder has them."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *sizes]).tolist()
    parts = [rng.integers(-9, 9, size) + 0.5 + rng.uniform(-2, 2, size) * TOLERANCE for size in sizes]
    encoder = Rounding(TOLERANCE)
    rounded = [encoder(part, start) for part, start in zip(parts, starts[:-1], strict=True)]
    decoder = Rounding(TOLERANCE, Rounding.sides_from(encoder.to_bytes(), 0)[0])
    for part, start, expected in reversed(list(zip(parts, starts[:-1], rounded, strict=True))):
        shift = rng.uniform(-0.49, 0.49, len(part)) * TOLERANCE
        assert np.array_equal(decoder(part + shift, start), expected)


def test_a_call_may_have_a_tolerance_of_its_own():
    rounding = Rounding(TOLERANCE)
    rounding(np.array([0.5 + 2 * TOLERANCE]), 0, tolerance=3 * TOLERANCE)
    rounding(np.array([0.5 + TOLERANCE / 2]), 1, tolerance=TOLERANCE / 4)
    assert rounding.sides == {0: 1}


@given(VALUES)
def test_without_a_tolerance_nothing_is_recorded_and_nothing_is_refused(values):
    rounding = Rounding(0.0)
    found = rounding(values, 0)
    assert rounding.sides == {}
    assert np.array_equal(Rounding(0.0, {})(values, 0), found)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e300, -(2.0**53)])
@pytest.mark.parametrize("sides", [None, {}], ids=["encoder", "decoder"])
@pytest.mark.parametrize("tolerance", [TOLERANCE, 0.0])
def test_values_that_cannot_be_rounded_are_refused(wrong, sides, tolerance):
    with pytest.raises(CodecError, match="NaN or infinity"):
        Rounding(tolerance, sides)(np.array([0.0, wrong, 1.0]), 0)


def test_no_values_are_rounded_to_none():
    assert Rounding(TOLERANCE)(np.zeros(0), 5).tolist() == []
    assert Rounding(TOLERANCE, {5: 1})(np.zeros(0), 5).tolist() == []


# ---- sides -------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(0, 2**40), st.integers(0, 1)), st.binary(max_size=4), st.binary(max_size=4))
def test_sides_come_back_from_bytes(sides, before, behind):
    rounding = Rounding(TOLERANCE)
    rounding.sides = dict(sides)
    written = rounding.to_bytes()
    found, end = Rounding.sides_from(before + written + behind, len(before))
    assert found == sides and end == len(before) + len(written)


@given(st.dictionaries(st.integers(0, 10**6), st.integers(0, 1), min_size=1))
def test_sides_that_are_cut_off_are_refused(sides):
    rounding = Rounding(TOLERANCE)
    rounding.sides = sides
    written = rounding.to_bytes()
    for end in range(len(written)):
        with pytest.raises(CodecError, match="the file is damaged"):
            Rounding.sides_from(written[:end], 0)


def test_forgotten_sides_are_as_if_they_had_never_been_recorded():
    rounding = Rounding(TOLERANCE)
    rounding(np.array([0.5, 1.5]), 0)
    kept = rounding.to_bytes()
    rounding(np.array([2.5, 3.5]), 2)
    assert len(rounding.sides) == 4
    rounding.forget(2)
    assert rounding.to_bytes() == kept
    rounding.forget(0)
    assert rounding.sides == {} and rounding.to_bytes() == b"\0"

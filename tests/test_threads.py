"""threads.py: results come in order, and no thread looks further ahead than it may."""

import threading
import time

import pytest

from diffusers_vdm.data.images import LOOK_AHEAD
from diffusers_vdm.threads import in_order


def slow_results(started):
    """A function whose later results are ready first, and which fails at 7; it notes what was started."""

    def make(key):
        started.append(key)
        time.sleep(0.01 * (3 - key % 3))
        if key == 7:
            raise ValueError("image 7 is broken")
        return key

    return make


def test_results_are_made_ahead_and_come_in_order():
    started = []
    results = in_order(slow_results(started), range(100), 3, look_ahead=6)
    assert [next(results) for _ in range(6)] == list(range(6))
    assert len(started) <= 6 + 2 * 3 + 1


def test_an_error_comes_in_its_place_and_ends_the_work():
    started = []
    results = in_order(slow_results(started), range(100), 3, look_ahead=6)
    with pytest.raises(ValueError, match="image 7 is broken"):
        list(results)
    assert len(started) < 25


def test_no_thread_is_left_after_an_early_end():
    results = in_order(slow_results([]), range(5), 2, look_ahead=4)
    next(results)
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("in_order")]


def test_decoding_looks_ahead_by_a_fixed_number_of_images():
    started = []

    def read(i):
        started.append(i)
        return i

    results = in_order(read, range(1000), 2, 2 * LOOK_AHEAD - 1)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(started) <= 10 + 2 * 16
    results.close()
    assert list(in_order(read, range(57), 3, 3 * LOOK_AHEAD - 1)) == list(range(57))

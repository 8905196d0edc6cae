"""codec/stack.py: pushing and popping are inverses, and cost the bits of the probabilities."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_vdm.codec import CodecError, lattice
from diffusers_vdm.codec.errors import NotCodable, NotEnoughBits
from diffusers_vdm.codec.lattice import MIN_CLASS, PHASES, LatticeGaussians, split_mean, std_of_class
from diffusers_vdm.codec.stack import Stack, bits_of

SEEDS = st.integers(0, 2**32 - 1)
TABLES = LatticeGaussians()
FARTHEST = 2**24 - 1  # from its mean, that an integer may be


def full(rng, words=2000):
    """A stack of random bits."""
    return Stack(rng.integers(1, 2**32, words, dtype=np.uint32), TABLES)


def gaussians(rng, count, far=False, mixed=True, low=MIN_CLASS, high=500):
    """Integers near to their means, or `far` from some of them; the means; and the classes."""
    classes = rng.integers(low, high, count) if mixed else int(rng.integers(low, high))
    means = rng.integers(-(2**45), 2**45, count)
    stds = np.array([std_of_class(int(index)) for index in np.broadcast_to(classes, count)])
    offsets = np.rint(rng.normal(size=count) * stds).astype(np.int64)
    if far and count:
        some = rng.random(count) < 0.2
        sizes = np.exp2(rng.uniform(0, 24, count)).astype(np.int64).clip(1, FARTHEST)
        offsets = np.where(some, np.where(rng.random(count) < 0.5, sizes, -sizes), offsets)
    return split_mean(means)[0] + offsets, means, classes


def exact_bits(values, means, classes):
    """−log₂ of the normalized Gaussian densities at the integers, from `math` alone."""
    bits = []
    for value, mean, index in zip(values.tolist(), means.tolist(), np.broadcast_to(classes, len(values)), strict=True):
        std, center = 2 ** (int(index) / 128), mean // PHASES
        near = range(center - math.ceil(9 * std) - 1, center + math.ceil(9 * std) + 2)
        total = math.fsum(math.exp(-0.5 * ((i - mean / PHASES) / std) ** 2) for i in near)
        bits.append((0.5 * ((value - mean / PHASES) / std) ** 2 + math.log(total)) / math.log(2))
    return np.array(bits)


# ---- inverses ----------------------------------------------------------------------------------------------------


class Operation:
    """Something to push, and how to pop it."""

    def __init__(self, kind, count, seed):
        rng = np.random.default_rng(seed)
        if kind in ("gaussian", "gaussians"):
            self.symbols, means, classes = gaussians(rng, count, far=True, mixed=kind == "gaussians")
            self.push = lambda stack: stack.push_gaussian(self.symbols, means, classes)
            self.pop = lambda stack: stack.pop_gaussian(means, classes)
        elif kind == "uniform":
            sizes = np.exp2(rng.uniform(1, 24, count)).astype(np.int64)
            self.symbols = rng.integers(0, sizes)
            self.push = lambda stack: stack.push_uniform(self.symbols, sizes)
            self.pop = lambda stack: stack.pop_uniform(sizes)
        elif kind == "one row":
            row = rng.gamma(0.3, size=rng.integers(2, 300)).astype(np.float32) + np.float32(1e-6)
            self.symbols = rng.integers(0, len(row), count)
            self.push = lambda stack: stack.push(self.symbols, row)
            self.pop = lambda stack: stack.pop(row, count)
        else:
            rows = rng.gamma(0.3, size=(count, rng.integers(2, 100))).astype(np.float32) + np.float32(1e-6)
            self.symbols = rng.integers(0, rows.shape[1], count)
            self.push = lambda stack: stack.push(self.symbols, rows)
            self.pop = lambda stack: stack.pop(rows)


KINDS = ("gaussian", "gaussians", "uniform", "one row", "rows")
OPERATIONS = st.builds(Operation, st.sampled_from(KINDS), st.integers(0, 60), SEEDS)


@given(st.lists(OPERATIONS, max_size=8), st.integers(0, 10), SEEDS)
def test_popping_is_the_inverse_of_pushing(operations, words, seed):
    stack = full(np.random.default_rng(seed), words)
    before = stack.words()
    for operation in operations:
        operation.push(stack)
    assert stack.bits >= 32 * (len(before) - 1)
    stack = Stack(stack.words(), TABLES)  # as from a file
    for operation in reversed(operations):
        assert np.array_equal(operation.pop(stack), operation.symbols)
    assert np.array_equal(stack.words(), before)


@given(st.lists(OPERATIONS, max_size=8), SEEDS)
def test_pushing_is_the_inverse_of_popping(operations, seed):
    """Whatever is popped of random bits, pushing it again gives the same bits."""
    stack = full(np.random.default_rng(seed))
    before = stack.words()
    for operation in operations:
        operation.symbols = operation.pop(stack)
    for operation in reversed(operations):
        operation.push(stack)
    assert np.array_equal(stack.words(), before)


@given(st.integers(0, 200), st.booleans(), SEEDS)
def test_drawn_values_give_their_bits_back(count, mixed, seed):
    rng = np.random.default_rng(seed)
    _, means, classes = gaussians(rng, count, mixed=mixed)
    stack = full(rng)
    before = stack.words()
    drawn = stack.pop_gaussian(means, classes, escapes=False)
    assert stack.bits < 32 * len(before) or count < 20
    stack.push_gaussian(drawn, means, classes, escapes=False)
    assert np.array_equal(stack.words(), before)


@pytest.mark.parametrize("index", [MIN_CLASS, 0, 100, 400])
def test_integers_at_the_end_of_a_table_and_beyond_it_come_back(index):
    [(radius, _)] = TABLES.groups(index, 1)
    sizes = np.array([0, 1, radius - 1, radius, radius + 1, radius + 2, 2**16, 2**23, FARTHEST])
    offsets = np.concatenate([sizes, -sizes])
    for mean in (0, 1, -PHASES // 2, 12345, -(2**40)):
        means = np.full(len(offsets), mean)
        values = split_mean(means)[0] + offsets
        stack = Stack(tables=TABLES)
        stack.push_gaussian(values, means, index)
        assert np.array_equal(stack.pop_gaussian(means, index), values)
        assert stack.bits == 0


@pytest.mark.parametrize("offset", [FARTHEST + 1, -FARTHEST - 1, 2**40])
def test_integers_too_far_from_their_means_are_refused(offset):
    with pytest.raises(NotCodable):
        Stack(tables=TABLES).push_gaussian(np.array([0, offset]), np.zeros(2, dtype=np.int64), 0)


def test_a_drawn_value_outside_of_its_table_is_refused():
    [(radius, _)] = TABLES.groups(0, 1)
    for offset in (radius + 1, -radius - 1):
        with pytest.raises(CodecError, match="outside of its table"):
            Stack(tables=TABLES).push_gaussian(np.array([0, offset]), np.zeros(2, dtype=np.int64), 0, escapes=False)


def test_an_escape_that_nobody_pushed_is_refused():
    """As in a damaged message: a length that no offset has."""
    [(radius, _)] = TABLES.groups(0, 1)
    mean = np.zeros(1, dtype=np.int64)
    stack = full(np.random.default_rng(0), 10)
    stack.push_uniform(np.array([49]), np.array([50]))
    stack.push(np.array([2 * radius + 1]), TABLES.rows(radius, 0, np.full(1, PHASES // 2)))
    with pytest.raises(CodecError, match="an impossible latent"):
        stack.pop_gaussian(mean, 0)


def test_tables_need_not_be_in_memory_at_the_same_time(monkeypatch):
    rng = np.random.default_rng(1)
    values, means, classes = gaussians(rng, 500, far=True)
    messages = []
    for at_once in (10**9, 1000, 1):
        monkeypatch.setattr(lattice, "_VALUES_AT_ONCE", at_once)
        stack = Stack(tables=TABLES)
        stack.measures = True
        stack.push_gaussian(values, means, classes)
        messages.append((stack.words().tolist(), stack.information.tolist()))
        assert np.array_equal(stack.pop_gaussian(means, classes), values)
    assert messages[0] == messages[1] == messages[2]


def test_nothing_is_pushed_and_popped_without_symbols():
    stack = full(np.random.default_rng(0), 3)
    before, none = stack.words(), np.zeros(0, dtype=np.int64)
    for classes in (0, none):
        stack.push_gaussian(none, none, classes)
        stack.push_gaussian(none, none, classes, escapes=False)
        assert len(stack.pop_gaussian(none, classes)) == 0
    stack.push_uniform(none, none)
    stack.push(none, np.ones((0, 3), dtype=np.float32))
    assert len(stack.pop_uniform(none)) == len(stack.pop(np.ones((0, 3), dtype=np.float32))) == 0
    assert len(stack.pop(np.ones(3, dtype=np.float32), 0)) == 0
    assert np.array_equal(stack.words(), before)


# ---- bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True], ids=["one class", "classes"])
def test_pushing_adds_the_bits_of_the_probability(mixed):
    rng = np.random.default_rng(2)
    values, means, classes = gaussians(rng, 3000, mixed=mixed, low=0, high=200)
    stack = full(rng, 4)
    before = stack.bits
    stack.push_gaussian(values, means, classes)
    assert stack.bits - before == pytest.approx(float(exact_bits(values, means, classes).sum()), rel=1e-4, abs=2)


def test_an_escape_costs_its_probability_and_twice_its_length_at_most():
    sizes = 2 ** np.arange(5, 24)
    zeros = np.zeros(len(sizes), dtype=np.int64)
    stack = full(np.random.default_rng(0), 4)
    before = stack.bits
    stack.push_gaussian(sizes, zeros, 0)
    expected = len(sizes) * (22 + math.log2(50)) + np.arange(5, 24).sum()
    assert stack.bits - before == pytest.approx(expected, abs=len(sizes))


@pytest.mark.parametrize("size", [2, 17, 1000, 2**24])
def test_a_uniform_integer_costs_the_logarithm_of_the_size(size):
    rng = np.random.default_rng(3)
    stack = full(rng, 4)
    before = stack.bits
    stack.push_uniform(rng.integers(0, size, 1000), np.full(1000, size))
    assert stack.bits - before == pytest.approx(1000 * math.log2(size), rel=1e-3, abs=2)


def test_a_categorical_symbol_costs_its_probability():
    rng = np.random.default_rng(4)
    rows = rng.gamma(1.0, size=(2000, 30)).astype(np.float32)
    symbols = np.array([rng.choice(30, p=row / row.sum()) for row in rows.astype(np.float64)])
    chosen = rows[np.arange(2000), symbols] / rows.sum(1)
    for given_rows, expected in ((rows, -np.log2(chosen).sum()), (rows[0], bits_of(rows[[0] * 2000], symbols).sum())):
        stack = full(rng, 4)
        before = stack.bits
        stack.push(symbols, given_rows)
        assert stack.bits - before == pytest.approx(float(expected), rel=1e-4, abs=2)


def test_the_likeliest_integer_of_a_narrow_gaussian_is_cheap_wherever_the_mean_is():
    means = np.arange(-PHASES, PHASES)
    stack = full(np.random.default_rng(0), 4)
    before = stack.bits
    stack.push_gaussian(split_mean(means)[0], means, MIN_CLASS)
    assert stack.bits - before < 0.1 * len(means)  # at most one bit each, for the two means between two integers


# ---- draws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 64, 300])
def test_drawn_values_have_the_mean_and_the_variance_of_the_gaussian(index):
    count, std = 20_000, std_of_class(index)
    rng = np.random.default_rng(5)
    means = rng.integers(-(2**20), 2**20, count)
    drawn = full(rng, 10_000).pop_gaussian(means, index, escapes=False)
    errors = (drawn - means / PHASES) / std
    assert abs(float(errors.mean())) < 5 / count**0.5
    assert abs(float(errors.var()) - 1) < 5 * (2 / count) ** 0.5
    assert abs(float(np.mean(errors**3))) < 5 * (15 / count) ** 0.5
    assert abs(float(np.corrcoef(errors[1:], errors[:-1])[0, 1])) < 5 / count**0.5


def test_drawing_takes_the_entropy_of_the_gaussian_from_the_stack():
    count, index = 10_000, 150
    stack = full(np.random.default_rng(6), 10_000)
    before = stack.bits
    stack.pop_gaussian(np.arange(count), index, escapes=False)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std_of_class(index) ** 2)
    deviation = math.log2(math.e) * 0.5**0.5 * count**0.5  # of the sum of −log₂ p
    assert abs(before - stack.bits - count * entropy) < 5 * deviation


# ---- the stack itself --------------------------------------------------------------------------------------------


def test_a_copy_is_independent():
    rng = np.random.default_rng(7)
    stack = full(rng, 50)
    stack.measures = True
    before, zeros = stack.words(), np.zeros(40, dtype=np.int64)
    other = stack.copy()
    drawn = other.pop_gaussian(zeros, 0)
    information = other.information.copy()
    assert np.array_equal(stack.words(), before) and other.bits < stack.bits and other.measures
    stack.push_gaussian(zeros, zeros, 0)
    assert np.array_equal(other.information, information)
    other.push_gaussian(drawn, zeros, 0)
    assert np.array_equal(other.words(), before)


def test_words_are_not_changed_from_outside():
    given_words = np.arange(1, 20, dtype=np.uint32)
    stack = Stack(given_words, TABLES)
    given_words[:] = 7
    stack.words()[:] = 9
    assert stack.words().tolist() == list(range(1, 20))


def test_a_stack_that_is_nearly_empty_has_not_enough_bits():
    stack = full(np.random.default_rng(8), 100)
    zeros = np.zeros(1200, dtype=np.int64)
    stack.pop_gaussian(zeros, 0, escapes=False)  # 2.05 bits each of 3,200
    stack.check_bits()
    stack.pop_gaussian(zeros, 0, escapes=False)
    with pytest.raises(NotEnoughBits):
        stack.check_bits()
    with pytest.raises(NotEnoughBits):
        Stack(tables=TABLES).check_bits()


# ---- measurements ------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.booleans(), st.booleans(), SEEDS)
def test_the_information_is_the_change_in_bits(count, mixed, far, seed):
    rng = np.random.default_rng(seed)
    values, means, classes = gaussians(rng, count, far, mixed, low=0, high=400)
    stack = full(rng)
    stack.measures = True
    bits = [stack.bits]
    stack.push_gaussian(values, means, classes)
    pushed, tolerance = stack.information, 2 + 0.01 * count + (0.15 * count if far else 0)
    bits.append(stack.bits)
    assert float(pushed.sum()) == pytest.approx(bits[1] - bits[0], abs=tolerance)
    stack.pop_gaussian(means, classes)
    assert np.array_equal(stack.information, pushed) and stack.bits == bits[0]
    drawn = stack.pop_gaussian(means, classes, escapes=False)
    bits.append(stack.bits)
    taken = stack.information
    assert float(taken.sum()) == pytest.approx(bits[0] - bits[2], abs=2 + 0.01 * count)
    stack.push_gaussian(drawn, means, classes, escapes=False)
    np.testing.assert_allclose(stack.information, taken, rtol=1e-6)


def test_the_information_is_that_of_each_symbol():
    values, means, classes = gaussians(np.random.default_rng(9), 500, low=0, high=400)
    stack = Stack(tables=TABLES)
    assert len(stack.information) == 0
    stack.push_gaussian(values, means, classes)
    assert len(stack.information) == 0
    stack.measures = True
    stack.push_gaussian(values, means, classes)
    np.testing.assert_allclose(stack.information, exact_bits(values, means, classes), atol=1e-3)

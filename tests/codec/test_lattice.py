"""codec/lattice.py: the integers of a lattice have the mean, the variance and the entropy of the Gaussian."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffusers_vdm.codec.lattice import (
    MAX_CLASS,
    MIN_CLASS,
    PHASES,
    STD_STEPS,
    LatticeGaussians,
    _radius,
    chunks,
    class_of_std,
    portable_exp,
    split_mean,
    std_of_class,
)
from tests.oracles import MP

FLOAT32 = 2.0**-23  # the tables are float32, and reach to six standard deviations
TABLES = LatticeGaussians()
CLASSES = [0, 1, 17, 50, 128, 200, 333, 512]
FRACTIONS = (np.arange(PHASES) - PHASES // 2) / PHASES  # the distances of the means from their nearest integers


def poisson(std):
    """The first term of Poisson's sum, by which the sum over a lattice differs from the integral."""
    return 2 * math.exp(-2 * math.pi**2 * std**2)


def probabilities(index):
    """Integers, and their probabilities by phase without the escape, `(PHASES, 2 radius + 1)`."""
    [(radius, _)] = TABLES.groups(index, 1)
    rows = TABLES.rows(radius, index, np.arange(PHASES)).astype(np.float64)[:, :-1]
    return np.arange(-radius, radius + 1), rows / rows.sum(1, keepdims=True)


# ---- functions ---------------------------------------------------------------------------------------------------


@given(st.floats(0, 700))
def test_the_portable_exponential_is_the_exponential(y):
    exact = MP.exp(-MP.mpf(y))
    assert abs(MP.mpf(float(portable_exp(np.array(y)))) - exact) < 1e-15 * exact


def test_the_portable_exponential_has_the_shape_of_its_argument_and_ends_at_700():
    y = np.array([[0.0, 1.0], [700.0, 1e308], [math.log(2), math.inf]])
    found = portable_exp(y)
    assert found.shape == y.shape and found[0, 0] == 1
    assert found[1, 1] == found[2, 1] == found[1, 0] > 0


def test_the_portable_exponential_does_not_increase():
    y = np.concatenate([np.linspace(0, 700, 20_001), np.geomspace(1e-300, 1, 1001)])
    y.sort()
    assert bool((np.diff(portable_exp(y)) <= 0).all())


def test_classes_are_powers_of_two():
    for index in range(MIN_CLASS, MAX_CLASS + 1, 31):
        assert std_of_class(index) == pytest.approx(float(MP.mpf(2) ** (MP.mpf(index) / STD_STEPS)), rel=1e-15)
    assert [std_of_class(octave * STD_STEPS) for octave in (-4, 0, 1, 16)] == [1 / 16, 1, 2, 65536]


def test_the_class_of_a_standard_deviation_is_the_nearest_one():
    classes = np.arange(MIN_CLASS, MAX_CLASS + 1)
    stds = np.array([std_of_class(int(index)) for index in classes])
    assert np.rint(class_of_std(stds)).tolist() == classes.tolist()
    assert class_of_std(np.array([1e-9, 1e9])).tolist() == [MIN_CLASS, MAX_CLASS]


@given(st.lists(st.integers(-(2**50), 2**50)))
def test_a_mean_is_an_integer_and_a_phase(means):
    center, phase = split_mean(np.array(means, dtype=np.int64))
    assert bool(((phase >= 0) & (phase < PHASES)).all())
    assert (center * PHASES + phase - PHASES // 2).tolist() == means


# ---- moments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", CLASSES)
def test_a_discrete_gaussian_has_the_mean_of_the_continuous_one_at_every_phase(index):
    std, (integers, p) = std_of_class(index), probabilities(index)
    np.testing.assert_allclose(
        p @ integers, FRACTIONS, rtol=0, atol=std * (2 * math.pi * std * poisson(std) + FLOAT32)
    )


@pytest.mark.parametrize("index", CLASSES)
def test_a_discrete_gaussian_has_the_variance_of_the_continuous_one_at_every_phase(index):
    std, (integers, p) = std_of_class(index), probabilities(index)
    variance = (p * np.square(integers - FRACTIONS[:, None])).sum(1)
    np.testing.assert_allclose(variance, std**2, rtol=4 * math.pi**2 * std**2 * poisson(std) + FLOAT32)


@pytest.mark.parametrize("index", CLASSES)
def test_a_discrete_gaussian_has_the_entropy_of_the_continuous_one_at_every_phase(index):
    std, (_, p) = std_of_class(index), probabilities(index)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
    bound = (2 * math.pi**2 * std**2 + 1) * poisson(std) + FLOAT32
    np.testing.assert_allclose(entropy, 0.5 * math.log(2 * math.pi * math.e * std**2), rtol=0, atol=bound)


@pytest.mark.parametrize("index", [MIN_CLASS, -200, -128, 0, 77, 300])
def test_probabilities_are_those_of_the_density_at_the_integers(index):
    integers, p = probabilities(index)
    std = MP.mpf(2) ** (MP.mpf(index) / STD_STEPS)
    for phase in (0, 1, PHASES // 2, PHASES - 1):
        exact = [MP.exp(-(((int(i) - MP.mpf(float(FRACTIONS[phase]))) / std) ** 2) / 2) for i in integers]
        exact = np.array([float(value / MP.fsum(exact)) for value in exact])
        np.testing.assert_allclose(p[phase], exact, rtol=3e-7, atol=1e-37)


@pytest.mark.parametrize("index", [0, 60])
def test_a_mixture_of_lattice_draws_does_not_gain_the_variance_of_rounding(index):
    """Means anywhere between two integers: the law of total variance has no term 1/12, which bins would add."""
    std, (integers, p) = std_of_class(index), probabilities(index)
    between = float(np.square(FRACTIONS).mean() - FRACTIONS.mean() ** 2)
    mixture = p.mean(0)
    variance = float(mixture @ np.square(integers) - (mixture @ integers) ** 2)
    assert variance == pytest.approx(std**2 + between, abs=1e-6)

    def cdf(x):
        return 0.5 * (1 + np.array([math.erf(value / std / math.sqrt(2)) for value in x]))

    bins = np.array([cdf(integers + 0.5 - f) - cdf(integers - 0.5 - f) for f in FRACTIONS]).mean(0)
    by_bins = float(bins @ np.square(integers) - (bins @ integers) ** 2)
    assert by_bins == pytest.approx(std**2 + between + 1 / 12, abs=1e-4)


def test_variances_add_up_along_a_chain():
    integers, p = probabilities(0)
    steps, whole = 30, np.ones(1)
    for _ in range(steps):
        whole = np.convolve(whole, p[PHASES // 2])
    reached = np.arange(len(whole)) + steps * int(integers[0])
    assert float(whole @ reached) == pytest.approx(0, abs=1e-5)
    assert float(whole @ np.square(reached)) == pytest.approx(steps, rel=1e-6)


# ---- tables ------------------------------------------------------------------------------------------------------


def test_tables_reach_six_standard_deviations_and_have_few_widths():
    radii = {index: _radius(std_of_class(index)) for index in range(MIN_CLASS, MAX_CLASS + 1)}
    for index, radius in radii.items():
        assert radius >= 6 * std_of_class(index)
        assert radius <= max(1.5 * (6 * std_of_class(index) + 2), 4)
    assert list(radii.values()) == sorted(radii.values()) and len(set(radii.values())) < 60


@pytest.mark.parametrize("index", [MIN_CLASS, -300, -1, 0, 128, 600])
def test_the_escape_is_rare_at_every_phase(index):
    [(radius, _)] = TABLES.groups(index, 1)
    rows = TABLES.rows(radius, index, np.arange(PHASES))
    assert rows.dtype == np.float32 and rows.shape == (PHASES, 2 * radius + 2)
    share = rows[:, -1] / rows.sum(1)
    assert bool(((share > 0) & (share <= 2.0**-21.9)).all())


@given(arrays(np.int64, st.integers(0, 60), elements=st.integers(MIN_CLASS, 500)))
def test_groups_cover_each_symbol_once(classes):
    groups = TABLES.groups(classes, len(classes))
    positions = np.arange(len(classes))
    assert sorted(np.concatenate([positions[:0], *(positions[group] for _, group in groups)])) == positions.tolist()
    radii = [radius for radius, _ in groups]
    assert radii == sorted(set(radii))
    for radius, group in groups:
        assert {_radius(std_of_class(int(index))) for index in classes[group]} == {radius}


@given(arrays(np.int64, st.integers(1, 40), elements=st.integers(MIN_CLASS, 400)))
def test_a_row_depends_on_its_class_and_phase_only(classes):
    """And not on the classes that were met before."""
    mixed, phases = LatticeGaussians(), np.arange(len(classes)) * 37 % PHASES
    for radius, group in mixed.groups(classes, len(classes)):
        rows = mixed.rows(radius, classes[group], phases[group])
        for row, index, phase in zip(rows, classes[group].tolist(), phases[group].tolist(), strict=True):
            [(alone, _)] = TABLES.groups(index, 1)
            assert np.array_equal(row, TABLES.rows(alone, index, np.array([phase]))[0])


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_chunks_are_in_order_and_small(count, columns):
    parts = chunks(count, columns)
    assert [i for part in parts for i in (part.start, part.stop)] == sorted(
        [0, count, *(2 * [part.start for part in parts[1:]])] if count else []
    )
    assert all((part.stop - part.start) * columns <= max(1 << 22, columns) for part in parts)

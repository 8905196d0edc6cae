"""data/conditions.py: numbers in columns, smaller images, and what a network takes of them."""

import math

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vdm.data.conditions import ConditionData, conditions_of, read_vectors
from diffusers_vdm.diffusion import low_resolution
from tests.models import tiny_preset
from tests.tensors import random_levels


def rows(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def test_numbers_of_several_columns_make_a_vector():
    data = rows(a=[1, 2, 3], b=[[0.5, 1.5], [2.5, 3.5], [4.5, 5.5]], c=[True, False, True], d=["x", "y", "z"])
    vectors, names = read_vectors(data, ["b", "a", "c"], "data")
    assert names == ("b[0]", "b[1]", "a", "c") and vectors.dtype == torch.float64
    assert vectors.tolist() == [[0.5, 1.5, 1.0, 1.0], [2.5, 3.5, 2.0, 0.0], [4.5, 5.5, 3.0, 1.0]]


BAD = [
    ({"a": [1, 2]}, ["b"], "data has no column 'b'; its columns are"),
    ({"a": [1.0, math.nan]}, ["a"], "column 'a' of data must have finite numbers, got nan in row 1"),
    ({"a": [1.0, None]}, ["a"], "got None in row 1"),
    ({"a": ["x", "y"]}, ["a"], "got 'x' in row 0"),
    ({"a": [[1.0, 2.0], [1.0]]}, ["a"], "lists of one length, got 2 and, in row 1, 1 numbers"),
    ({"a": [1.0, math.inf]}, ["a"], "got inf in row 1"),
]


@pytest.mark.parametrize("columns, names, message", BAD)
def test_values_that_are_no_numbers_are_refused_by_their_column(columns, names, message):
    with pytest.raises(ValueError, match=message):
        read_vectors(rows(**columns), names, "data")


def test_statistics_standardize_and_a_constant_is_left_as_it_is():
    # the mean of three times 0.1 is not 0.1
    values = torch.tensor([[1.0, 0.1], [3.0, 0.1], [8.0, 0.1]], dtype=torch.float64)
    mean, std = ConditionData(values, ("a", "b")).statistics()
    standard = (values - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(standard.mean(0), torch.zeros(2).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(standard[:, 0].square().mean(), torch.tensor(1.0).double(), rtol=1e-5, atol=0)
    assert std[1] == 1.0


@pytest.mark.parametrize("factor", [2, 4])
def test_a_smaller_image_is_the_rounded_mean_of_squares_as_pillow_has_it(factor):
    images = random_levels(3, 3, 8, 16, num_levels=256).to(torch.uint8)
    found = low_resolution(images, factor)
    assert found.dtype == torch.uint8 and found.shape == (3, 3, 8 // factor, 16 // factor)
    for image, small in zip(images, found, strict=True):
        picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).reduce(factor)
        assert int((torch.from_numpy(np.array(picture)).permute(2, 0, 1).int() - small.int()).abs().max()) <= 1
    exact = images.double().unflatten(2, (-1, factor)).unflatten(4, (-1, factor)).mean((3, 5))
    assert float((found - exact).abs().max()) <= 0.5
    with pytest.raises(ValueError, match="upscale_factor must divide the size of the images, 8×16, got 3"):
        low_resolution(images, 3)


def test_a_network_gets_the_conditions_that_it_takes():
    images, labels = random_levels(4, 1, 8, 8, num_levels=17).to(torch.uint8), torch.arange(4)
    data = ConditionData(torch.rand(4, 2).double(), ("a", "b"), None, 2)
    everything = tiny_preset(num_class_embeds=4, cond_dim=2, cond_channels=1)
    found = conditions_of(everything, images, 17, labels, data)
    assert set(found) == {"class_labels", "cond_vectors", "cond_images"}
    expected = (low_resolution(images, 2).double() + 0.5) * 2 / 17 - 1
    torch.testing.assert_close(found["cond_images"].double(), expected, rtol=0, atol=1e-6)
    assert conditions_of(tiny_preset(), images, 17, labels, data) == {}
    assert set(conditions_of(tiny_preset(cond_dim=2), images, 17, None, data.slice(slice(2)))) == {"cond_vectors"}
    other = ConditionData(data.vectors + 1, ("a", "b"), None, 2)
    assert other.fingerprint() != data.fingerprint() == ConditionData(data.vectors, ("a", "b"), None, 2).fingerprint()

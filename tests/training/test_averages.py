"""training/averages.py: the averages of the weights against sums that are written out, and their use in a model."""

import pytest
import torch

from diffusers_vdm.training.averages import WeightAverages

# the value of each average
VALUES = {0.5: 2.0, 0.9: 3.0}


@pytest.fixture
def parameter():
    return torch.nn.Parameter(torch.zeros(3))


@pytest.fixture
def averages(parameter):
    """Averages by two decays, with other values than the parameter: 2 and 3."""
    averages = WeightAverages([parameter], [0.5, 0.9])
    for decay, value in VALUES.items():
        averages.models[decay].shadow_params[0].fill_(value)
    return averages


@pytest.mark.parametrize("decay", VALUES)
def test_applied_averages_are_taken_back_after_an_error(parameter, averages, decay):
    with pytest.raises(KeyError), averages.applied(decay):
        assert torch.equal(parameter.data, torch.full((3,), VALUES[decay]))
        raise KeyError
    assert torch.equal(parameter.data, torch.zeros(3))


def test_the_first_average_is_applied_by_default(parameter, averages):
    with averages.applied():
        assert float(parameter.data[0]) == 2.0


def test_no_averages_leave_the_parameters(parameter):
    with WeightAverages([parameter], []).applied():
        assert torch.equal(parameter.data, torch.zeros(3))


def test_equal_decays_are_refused(parameter):
    with pytest.raises(ValueError, match="different numbers"):
        WeightAverages([parameter], [0.9, 0.9])


def test_averages_are_saved_and_loaded(parameter, averages):
    fresh = WeightAverages([parameter], [0.5, 0.9])
    fresh.load_state_dict(averages.state_dict())
    assert float(fresh.models[0.9].shadow_params[0][0]) == 3.0


def test_averages_of_other_decays_are_not_loaded(parameter, averages):
    with pytest.raises(ValueError, match="must match"):
        WeightAverages([parameter], [0.5]).load_state_dict(averages.state_dict())


def test_averages_are_the_sums_that_the_warm_up_says():
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    averages = WeightAverages([parameter], [0.8], inv_gamma=1.0, power=0.75)
    expected = 0.0
    for step in range(1, 30):
        with torch.no_grad():
            parameter.fill_(float(step))
        averages.step()
        decay = min(0.8, 1 - (1 + (step - 1)) ** -0.75) if step > 1 else 0.0
        expected = decay * expected + (1 - decay) * step
        assert float(averages.models[0.8].shadow_params[0][0]) == pytest.approx(expected)

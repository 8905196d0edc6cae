"""training/finite_steps.py: a step whose gradient is not finite changes nothing."""

import pytest
import torch

from diffusers_vdm.training.finite_steps import FiniteSteps


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad):
    def train(gradients):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([parameter], 0.1, fused=True)
        steps, in_row = FiniteSteps("cpu"), []
        for gradient in gradients:
            parameter.grad = torch.full((3,), gradient)
            steps.step(optimizer, torch.nn.utils.clip_grad_norm_([parameter], 1.0))
            in_row.append(int(steps.in_row))
        return parameter, optimizer.state[parameter], int(steps.skipped), in_row

    parameter, state, skipped, in_row = train([1.0, bad, bad, 2.0, bad])
    expected, expected_state, none, _ = train([1.0, 2.0])
    assert torch.equal(parameter, expected) and (skipped, none) == (3, 0) and in_row == [0, 1, 2, 0, 1]
    assert all(torch.equal(state[name], expected_state[name]) for name in ("step", "exp_avg", "exp_avg_sq"))

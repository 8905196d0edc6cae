"""training/stopping.py: signals that ask a run to stop."""

import signal

import pytest

from diffusers_vdm.training.stopping import Stopped, StopRequest


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_a_signal_is_recorded_and_acted_on_later(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.agreed()
        with stop.at_once():
            pass
        signal.raise_signal(number)
        assert stop.agreed() and stop.signal == signal.Signals(number).name
        with pytest.raises(Stopped), stop.at_once():
            pass
        signal.raise_signal(number)  # a launcher hands it on a second time
    assert signal.getsignal(number) is before
    with StopRequest() as stop, pytest.raises(Stopped), stop.at_once():
        signal.raise_signal(number)

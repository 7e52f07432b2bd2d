"""Asked once a process remembers, asked twice it leaves."""

import signal

import pytest

from gpt2x.training.signals import StopRequest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_remembered_with_the_exit_code_of_a_shell(capsys, number, code):
    with StopRequest() as stop:
        assert (stop.signal_number, stop.exit_code) == (None, 0)
        signal.raise_signal(number)
        assert (stop.signal_number, stop.exit_code) == (number, code)
    line = f"{number.name}: saving after this step; once more to leave at once."
    assert capsys.readouterr().err.strip() == line


def test_a_second_signal_leaves_at_once():
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 143


def test_the_handlers_of_before_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before

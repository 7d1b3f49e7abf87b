import math
import signal
from contextlib import contextmanager, nullcontext, suppress

import pytest
from pscope.cli import signals

SENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def listening(monkeypatch):
    monkeypatch.setattr(signals, "_stopped", False)
    monkeypatch.setattr(signals, "_raised", -math.inf)
    # Whoever runs the tests may have some of them ignored.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SENT}
    signals.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SENT)
def test_each_of_them_stops_once(number, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    for again in SENT:
        signal.raise_signal(again)
    # Whoever tries again some seconds later means it.
    monkeypatch.setattr(signals, "_raised", signals._raised - signals.TOGETHER)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_nothing_interrupts_what_is_put_away():
    steps = []

    @contextmanager
    def opened():
        try:
            yield
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            steps.append("closed")

    with pytest.raises(KeyboardInterrupt), signals.closed_unbroken(opened()):
        steps.append("done")
    assert steps == ["done", "closed"]


def test_an_interrupt_that_was_swallowed_is_honoured_at_the_end():
    with pytest.raises(KeyboardInterrupt), signals.closed_unbroken(nullcontext()), suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_what_is_ignored_stays_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.listen()
    signal.raise_signal(signal.SIGHUP)

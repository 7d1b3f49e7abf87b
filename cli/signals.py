"""What stops a command from outside: Ctrl-C, SIGTERM before a scheduler kills, SIGHUP as a terminal closes."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

TOGETHER = 5
"""Seconds within which several are one: schedulers send more than one, and people press a key twice."""

_stopped = _held = False
_raised = -math.inf


def listen() -> None:
    """Make each of them raise KeyboardInterrupt; what is ignored, as SIGHUP under `nohup`, stays so."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)


def raise_if_stopped() -> None:
    """Raise KeyboardInterrupt if one was sent and went unseen: code that is called back from C may swallow it."""
    if _stopped:
        raise KeyboardInterrupt


@contextmanager
def closed_unbroken(context: AbstractContextManager[object]) -> Iterator[None]:
    """The context that is given, whose end nothing interrupts; what is sent meanwhile is raised after it."""
    global _held
    try:
        with context:
            try:
                yield
                raise_if_stopped()
            finally:
                _held = True
    finally:
        _held = False
    raise_if_stopped()


def _stop(number: int, frame: FrameType | None) -> None:
    """The first one stops; those that follow at once must not stop what is being put away."""
    global _stopped, _raised
    _stopped = True
    if not _held and time.monotonic() - _raised > TOGETHER:
        _raised = time.monotonic()
        raise KeyboardInterrupt

"""Signals are noted once, obeyed twice, and handled as before afterwards."""

import os
import signal
import threading

import pytest

from groundup.scaling.stopping import stop_asked


def test_the_first_is_noted_and_the_second_obeyed():
    with stop_asked() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_are_put_back_whatever_happens():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def fail():
        with stop_asked():
            assert signal.getsignal(signal.SIGTERM) != before[1]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_nobody_listens_when_not_asked_to_or_in_another_thread():
    before, seen = signal.getsignal(signal.SIGINT), []
    with stop_asked(listen=False):
        seen.append(signal.getsignal(signal.SIGINT))

    def elsewhere():
        with stop_asked() as asked:
            seen.append(asked.is_set() or signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before, before]

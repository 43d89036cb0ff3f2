"""A run that is asked to stop ends its update first.

Here: signals noted for the length of a block. Left out: what is done about them; see
`trainer`.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C; what a scheduler sends first


@contextmanager
def stop_asked(listen: bool = True) -> Iterator[threading.Event]:
    """Note SIGINT or SIGTERM instead of dying of it; the second one is obeyed.

    Args:
        listen: False, or outside the main thread: signals do what they always do.
    """
    asked = threading.Event()
    if not listen or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: object) -> None:
        asked.set()
        signal.signal(number, before[number])

    # None: a handler that was not set from Python, and cannot be put back.
    before = {n: signal.getsignal(n) or signal.SIG_DFL for n in SIGNALS}
    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

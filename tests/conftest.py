"""Settings for all tests."""

import signal

import matplotlib as mpl
from hypothesis import settings

mpl.use("agg")
settings.register_profile("book", deadline=None)  # machines differ; time proves nothing
settings.load_profile("book")
# A job in the background is started deaf to Ctrl-C, and what it starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

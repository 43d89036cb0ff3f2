"""Settings for all tests."""

import matplotlib as mpl
from hypothesis import settings

mpl.use("agg")
settings.register_profile("book", deadline=None)  # machines differ; time proves nothing
settings.load_profile("book")

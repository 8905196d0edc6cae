"""Hypothesis draws the same examples in every run, and writes nothing into the repository."""

import os
import tempfile

from hypothesis import settings

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "hypothesis"))
settings.register_profile("codec", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("codec")

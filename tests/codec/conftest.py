"""Hypothesis draws the same examples in every run, and keeps none on disk."""

from hypothesis import settings

settings.register_profile("codec", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("codec")

"""Data as they come from a factory floor."""

from anomalib_clipad.data.readable import ReadableDataLoader

__all__ = ["ReadableDataLoader"]

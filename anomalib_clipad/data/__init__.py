"""Data as they come from a factory floor, and data to train SDP+ on."""

from anomalib_clipad.data.auxiliary import AuxiliaryDataModule
from anomalib_clipad.data.readable import ReadableDataLoader

__all__ = ["AuxiliaryDataModule", "ReadableDataLoader"]

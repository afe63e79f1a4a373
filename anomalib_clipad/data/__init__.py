"""Data as they come from a factory floor, data to train SDP+ on, and data to try it all on."""

from anomalib_clipad.data.auxiliary import AuxiliaryDataModule
from anomalib_clipad.data.demo_textures import DemoTextures
from anomalib_clipad.data.readable import ReadableDataLoader

__all__ = ["AuxiliaryDataModule", "DemoTextures", "ReadableDataLoader"]

"""The demonstration: a small data set that is rendered, and the weights of a small CLIP trained on such pictures."""

from anomalib_clipad.demo.datamodule import DemoTextures

__all__ = ["DemoTextures"]

"""Images as cameras and file systems leave them, and data sets to train SDP+ on."""

from anomalib_clipad.data.auxiliary import AuxiliaryDataModule
from anomalib_clipad.data.readable import ReadableDataLoader

__all__ = ["AuxiliaryDataModule", "DemoTextures", "ReadableDataLoader"]


def __getattr__(name: str) -> object:
    """``DemoTextures`` when it is asked for: it needs scikit-image, which no model does."""
    if name == "DemoTextures":
        from anomalib_clipad.demo import DemoTextures

        return DemoTextures
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)

"""A page to look through the images of a run: one file that opens from disk, without a server or a network."""

from anomalib_clipad.page.page import Finding, PageImage, with_folders, write_page
from anomalib_clipad.page.thumbnails import original_for_browsers, write_heat_layer, write_thumbnail

__all__ = [
    "Finding",
    "PageImage",
    "original_for_browsers",
    "with_folders",
    "write_heat_layer",
    "write_page",
    "write_thumbnail",
]

"""What is shown of a job's maps: heat layers, small pictures to be laid over its images, and what is marked."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from PIL import Image

from anomalib_clipad.compare.map_stream import MapStream
from anomalib_clipad.compare.progress import Tell, silent
from anomalib_clipad.compare.scale import Scale
from anomalib_clipad.engine.table import BOXES, largest_box
from anomalib_clipad.pictures.heatmap import heat_layer

SIDE = 240  # most pixels of a side


def heat_layers(stream: MapStream, order: Sequence[int], scale: Scale, tell: Tell = silent) -> Iterator[Image.Image]:
    """Maps of images on the common scale, one at a time.

    Args:
        stream: Where the maps are.
        order: Numbers of the images.
        scale: Of the maps.
        tell: Is told how many are done.

    Example:
        >>> import torch
        >>> stream = MapStream(side=2)
        >>> stream.append(torch.tensor([[[0.0, 1.0], [2.0, 4.0]]]), None)
        >>> [layer.size for layer in heat_layers(stream, [0], Scale(2.0, 0.0, 4.0, "model"))]
        [(2, 2)]
        >>> stream.close()
    """
    side = min(stream.side, SIDE)
    for done, number in enumerate(order):
        tell("heatmaps", done, len(order))
        shown = scale.shown(stream.anomaly_map(number)).clip(-1, 2).astype(np.float32)
        yield heat_layer(np.asarray(Image.fromarray(shown).resize((side, side), Image.Resampling.BILINEAR)))


def marked_regions(stream: MapStream, count: int, scale: Scale) -> pd.DataFrame:
    """What is above the threshold of the maps.

    Args:
        stream: Where the maps are.
        count: Number of the images.
        scale: Of the maps.

    Returns:
        A row an image: the marked share, and the box of the largest region as :func:`largest_box` gives it; nothing
        where the threshold is not known.

    Example:
        >>> import torch
        >>> stream = MapStream(side=2)
        >>> stream.append(torch.tensor([[[0.0, 1.0], [2.0, 4.0]]]), None)
        >>> marked_regions(stream, 1, Scale(2.0, 0.0, 4.0, "model")).iloc[0].tolist()
        [0.25, 0.5, 0.5, 1.0, 1.0]
        >>> stream.close()
    """
    rows: list[tuple[float, ...]] = []
    if scale.known:
        for number in range(count):
            mask = stream.anomaly_map(number).astype(np.float64) > scale.threshold
            rows.append((mask.mean(), *(largest_box(mask) or [np.nan] * len(BOXES))))
    return pd.DataFrame(rows, columns=["marked_area", *BOXES], index=range(count), dtype=float)

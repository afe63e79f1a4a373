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


def heat_layers(
    stream: MapStream, order: Sequence[int], scales: Sequence[Scale], tell: Tell = silent
) -> Iterator[Image.Image]:
    """Maps of images on the common scale, one at a time.

    Args:
        stream: Where the maps are.
        order: Numbers of the images.
        scales: Of the maps, one an image of the stream.
        tell: Is told how many are done.

    Example:
        >>> import torch
        >>> stream = MapStream(side=2)
        >>> stream.append(torch.tensor([[[0.0, 1.0], [2.0, 4.0]]]), None)
        >>> [layer.size for layer in heat_layers(stream, [0], [Scale(2.0, 0.0, 4.0, "model")])]
        [(2, 2)]
        >>> stream.close()
    """
    side = min(stream.side, SIDE)
    for done, number in enumerate(order):
        tell("heatmaps", done, len(order))
        shown = scales[number].shown(stream.anomaly_map(number)).clip(-1, 2).astype(np.float32)
        yield heat_layer(np.asarray(Image.fromarray(shown).resize((side, side), Image.Resampling.BILINEAR)))


def marked_regions(stream: MapStream, scales: Sequence[Scale]) -> pd.DataFrame:
    """What is above the thresholds of the maps.

    Args:
        stream: Where the maps are.
        scales: Of the maps, one an image.

    Returns:
        A row an image: the marked share, and the box of the largest region as :func:`largest_box` gives it; nothing
        where the threshold is not known.

    Example:
        >>> import torch
        >>> stream = MapStream(side=2)
        >>> stream.append(torch.tensor([[[0.0, 1.0], [2.0, 4.0]]]), None)
        >>> marked_regions(stream, [Scale(2.0, 0.0, 4.0, "model")]).iloc[0].tolist()
        [0.25, 0.5, 0.5, 1.0, 1.0]
        >>> stream.close()
    """
    nothing = [np.nan] * len(BOXES)
    rows: list[tuple[float, ...]] = []
    for number, scale in enumerate(scales):
        if not scale.known:
            rows.append((np.nan, *nothing))
            continue
        mask = stream.anomaly_map(number).astype(np.float64) > scale.threshold
        rows.append((mask.mean(), *(largest_box(mask) or nothing)))
    return pd.DataFrame(rows, columns=["marked_area", *BOXES], dtype=float)

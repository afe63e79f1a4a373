"""Heat layers of a job, small pictures to be laid over its images."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from anomalib_clipad.compare.map_stream import MapStream
from anomalib_clipad.compare.progress import Tell, silent
from anomalib_clipad.compare.scale import Scale
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

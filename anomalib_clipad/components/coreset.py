"""A choice of some patches that are spread over all there are."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from anomalib.models.components.dimensionality_reduction import SparseRandomProjection

logger = logging.getLogger(__name__)

CHUNK = 1024  # patches projected at once, which bounds the memory


def coreset(patches: torch.Tensor, number: torch.Tensor, size: int) -> torch.Tensor:
    """Choose by anomalib's k-centre sampling; the same ones each time.

    Patches are projected to about 300 features first, where these are fewer than taps * W. At its peak the memory has,
    beside the patches, the features of those to choose from in float32, twice.

    Args:
        patches: (M, taps, W), of any length.
        number: (m,) numbers of those to choose from.
        size: How many to choose, less than m.

    Returns:
        (size,) numbers of those chosen.

    Example:
        >>> patches = F.one_hot(torch.tensor([0, 0, 1, 1, 2, 2]), 8)[:, None].half()
        >>> coreset(patches, torch.arange(6), 3).sort().values // 2
        tensor([0, 1, 2])
    """
    # Here, because anomalib.models imports our models (see ``plugin``), which need this file.
    from anomalib.models.components.dimensionality_reduction import SparseRandomProjection
    from anomalib.models.components.sampling import KCenterGreedy

    logger.info("Choosing %d of %d patches of the references.", size, len(number))
    on_gpu = patches.device.type == "cuda"
    with torch.random.fork_rng(devices=[patches.device] if on_gpu else []), _float32_by_default():
        # The sampler draws on the patches' device; torch.manual_seed would seed all devices.
        generators = torch.cuda.default_generators if on_gpu else [torch.default_generator]
        generators[patches.device.index or 0].manual_seed(0)
        random: Any = np.random.RandomState(0)  # scikit-learn takes no newer kind of generator
        projection = SparseRandomProjection(eps=0.9, random_state=random)
        projection.fit(patches[:1].flatten(1).expand(len(number), -1))
        features = torch.cat([_projected(patches[some], projection) for some in number.split(CHUNK)])
        difference, distance = torch.empty_like(features), features.new_empty(len(features), 1)

        class Sampler(KCenterGreedy):
            """anomalib's, with every step in the same memory.

            With new memory for each, the indices that are kept lie in between, and the C library grows its heap by all
            features at a step: 24 GB before 6,000 of 11,520 patches were chosen.
            """

            def update_distances(self, cluster_center: int | torch.Tensor | None) -> None:
                torch.sub(features, features[cluster_center], out=difference)
                torch.linalg.vector_norm(difference, dim=1, keepdim=True, out=distance)
                if self.min_distances is None:
                    self.min_distances = distance.clone()
                torch.minimum(self.min_distances, distance, out=self.min_distances)

        # Of three dimensions, the sampler takes the features as they are.
        sampler = Sampler(features[:, None], (size + 0.5) / len(features))
        return number[torch.as_tensor(sampler.select_coreset_idxs(), device=number.device)]


def _projected(patches: torch.Tensor, projection: "SparseRandomProjection") -> torch.Tensor:
    """Features of patches: (m, taps, W) to (m, F)."""
    units = F.normalize(patches.float(), dim=-1).flatten(1)
    return projection.transform(units) if projection.n_components < units.shape[1] else units


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """Whatever a run's precision: anomalib's projection draws in the default type."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)

"""Maps and masks of a whole job, on the disk and not in memory, until the scale that they are shown on is known."""

import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

LARGEST = float(np.finfo(np.float16).max)


class MapStream:
    """Maps in float16 and masks in bits, one after the other in a file without a name, which ends with the process.

    Args:
        side: Side of the maps.
        folder: Where there is room for it; by default where the system keeps temporary files.

    Example:
        >>> stream = MapStream(side=2)
        >>> stream.append(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]), torch.tensor([[[False, True], [False, False]]]))
        >>> stream.anomaly_map(0).tolist(), stream.mask(0).tolist()
        ([[0.0, 1.0], [2.0, 3.0]], [[False, True], [False, False]])
        >>> stream.close()
    """

    def __init__(self, side: int, folder: Path | None = None) -> None:
        self.side = side
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close
        self._map_bytes, self._mask_bytes = 2 * side * side, (side * side + 7) // 8
        self._has_mask: list[bool] = []

    def append(self, maps: torch.Tensor, masks: torch.Tensor | None) -> None:
        """Keep a batch.

        Args:
            maps: (B, side, side).
            masks: (B, side, side) bool; None without ground truth.

        Raises:
            OSError: If the disk is full.
        """
        for number, one in enumerate(maps.clamp(-LARGEST, LARGEST).half().numpy()):
            mask = np.zeros((self.side, self.side), dtype=bool) if masks is None else masks[number].numpy()
            self._file.write(one.tobytes())
            self._file.write(np.packbits(mask).tobytes())
            self._has_mask.append(masks is not None)

    def anomaly_map(self, number: int) -> np.ndarray:
        """Map of an image by its number: (side, side) in float16."""
        content = self._read(number, 0, self._map_bytes)
        return np.frombuffer(content, dtype=np.float16).reshape(self.side, self.side)

    def mask(self, number: int) -> np.ndarray | None:
        """Its mask, (side, side) bool; None without ground truth."""
        if not self._has_mask[number]:
            return None
        bits = np.frombuffer(self._read(number, self._map_bytes, self._mask_bytes), dtype=np.uint8)
        return np.unpackbits(bits, count=self.side * self.side).reshape(self.side, self.side).astype(bool)

    def close(self) -> None:
        """Give the room back."""
        with suppress(OSError):  # of a full disk, which append has told
            self._file.close()

    def _read(self, number: int, offset: int, size: int) -> bytes:
        self._file.seek(number * (self._map_bytes + self._mask_bytes) + offset)
        return self._file.read(size)

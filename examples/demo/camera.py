"""What a camera does to rendered pictures: it stands elsewhere, light changes, lens and sensor add their own."""

import math

import torch
from torch.nn import functional as F


class Camera:
    """Photographs batches of pictures, each in its own way.

    Args:
        generator: Decides how.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def _uniform(self, images: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(images, generator=self.generator)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def __call__(self, images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Photograph.

        Args:
            images: (B, 3, S, S) in [0, 1].
            masks: (B, S, S) in {0, 1}.

        Returns:
            Images and masks, likewise, masks in between at their edges.
        """
        images, masks = self._moved(images, masks)
        return self._exposed(images), masks

    def _moved(self, images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turned by quarters and mirrored; half of them turned and farther or nearer by any amount, too."""
        count = len(images)
        both = torch.cat([images, masks[:, None].float()], dim=1)
        quarters = torch.randint(4, (count,), generator=self.generator) * math.pi / 2
        freely = (self._uniform(count, 0, 1) < 0.5).float()
        plain = self._grid(both, quarters, torch.ones(count))
        angle, zoom = self._uniform(count, -0.6, 0.6), self._uniform(count, -0.22, 0.22).exp()
        free = self._grid(both, quarters + freely * angle, torch.where(freely > 0, zoom, 1.0))
        seen = (free[:, 3].sum((1, 2)) * zoom**2 >= 0.7 * masks.sum((1, 2)))[:, None, None, None]
        both = torch.where(seen, free, plain)  # a defect stays in the picture
        mirrored = (self._uniform(count, 0, 1) < 0.5)[:, None, None, None]
        both = torch.where(mirrored, both.flip(-1), both)
        return both[:, :3], both[:, 3]

    @staticmethod
    def _grid(both: torch.Tensor, angle: torch.Tensor, zoom: torch.Tensor) -> torch.Tensor:
        cosine, sine, none = zoom * angle.cos(), zoom * angle.sin(), torch.zeros(len(both))
        matrix = torch.stack([torch.stack([cosine, -sine, none], -1), torch.stack([sine, cosine, none], -1)], dim=1)
        grid = F.affine_grid(matrix, list(both.shape), align_corners=False)
        return F.grid_sample(both, grid, padding_mode="reflection", align_corners=False)

    def _exposed(self, images: torch.Tensor) -> torch.Tensor:
        """Uneven light, exposure, white balance, contrast, a lens that is not sharp, and a noisy sensor."""
        count, _, side, _ = images.shape
        light = F.interpolate(self._normal(count, 1, 3, 3), (side, side), mode="bicubic", align_corners=True)
        images = images * (1 + self._uniform(count, 0, 0.2)[:, None, None, None] * light)
        gamma = (0.15 * self._normal(count, 1, 1, 1)).exp()
        images = images.clamp(0, 1) ** gamma
        gain, lift = 1 + 0.15 * self._normal(count, 1, 1, 1), 0.06 * self._normal(count, 1, 1, 1)
        images = images * gain + lift + 0.02 * self._normal(count, 3, 1, 1)
        line = torch.tensor([0.25, 0.5, 0.25])
        kernel = (line[:, None] * line).expand(3, 1, 3, 3)
        blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
        images = torch.lerp(images, blurred, self._uniform(count, 0, 1)[:, None, None, None] ** 2)
        noise = self._uniform(count, 0, 0.03)[:, None, None, None] * self._normal(*images.shape)
        return (images + noise).clamp(0, 1)

"""What the demonstration backbone is trained to do, as losses."""

import math

import open_clip
import torch
from captioned_pictures import Batch
from torch import nn
from torch.nn import functional as F

from anomalib_clipad.components import DualPathVisionTransformer, feature_surgery
from anomalib_clipad.components.surgery import margin

LEAST_COVERED = 0.08  # of a patch that shows a defect
RARE = 4.0  # weight of patches that show a defect, which are few
READ = 10.0  # what texts, unit vectors, are multiplied with before they are read


class Lessons(nn.Module):
    """A CLIP, and linear heads on it for the time of the training.

    The heads are deep supervision: so deep and narrow a tower would not find the defects by itself in an hour. From the
    taps' class token they tell whether the image is broken, and its surface; from a patch, whether it shows a defect,
    and which. From a text they tell the surface or the defect, so that words differ before pictures are understood.

    Args:
        clip: To be trained.
        surfaces: How many there are.
        kinds: How many kinds of defects there are.
    """

    def __init__(self, clip: open_clip.CLIP, surfaces: int, kinds: int) -> None:
        super().__init__()
        self.clip = clip
        self.tower = DualPathVisionTransformer(clip.visual)
        self.whole = nn.ModuleList(nn.Linear(self.tower.width, 1 + surfaces) for _ in self.tower.layers)
        self.patch = nn.ModuleList(nn.Linear(self.tower.width, 1 + kinds) for _ in self.tower.layers)
        self.read_surface = nn.Linear(self.tower.embed_dim, surfaces)
        self.read_kind = nn.Linear(self.tower.embed_dim, kinds)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The parts of the loss, each a scalar."""
        # Fewer bits are enough for a tower that learns, and faster on many machines.
        with torch.autocast(batch.images.device.type, torch.bfloat16):
            taps = self.tower(batch.images)
            states = [self.clip.visual.ln_post(tap) for tap in taps.original]
        surgery, states = [tap.float() for tap in taps.surgery], [state.float() for state in states]
        shown = len(batch.broken)  # namesakes come after
        scale = self.clip.logit_scale.exp()
        texts = (batch.captions[::2].flatten(0, 1), batch.names, batch.defects.flatten(0, 1))
        captions, names, defects = self._texts(texts)
        captions, defects = captions.unflatten(0, (-1, 2)).repeat_interleave(2, dim=0), defects.unflatten(0, (-1, 2))
        tokens = F.normalize(surgery[-1][:, 0], dim=-1)  # the original path's class token, projected
        pairs = [tap[:shown] for tap in surgery]
        rare = torch.tensor(RARE, device=batch.covered.device)
        maps = [scale * feature_surgery([tap], captions)[:, 1:, 1] for tap in pairs]
        evidence = scale * naming_evidence(pairs, margin(defects)[:, 0])
        return {
            "contrast": contrastive(scale, tokens[:shown], captions, batch),
            "state": F.binary_cross_entropy_with_logits(
                scale * (tokens[:shown, None] * margin(captions)).sum((-2, -1)), batch.broken
            ),
            "surface": F.cross_entropy(scale * tokens @ names.T, batch.surfaces),
            "kind": naming(evidence, on_the_defect(batch), batch),
            "marked": naming(evidence, as_marked(torch.stack(maps).mean(dim=0)), batch),
            "sign": opposition(maps, batch),
            "map": F.binary_cross_entropy_with_logits(
                2 * torch.stack(maps).mean(dim=0), batch.covered, pos_weight=rare
            ),
            "reading": self._reading(names, margin(defects)[:, 0]),
            **self._supervision(states, batch),
        }

    def _texts(self, parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Unit vectors (T, D) of tokens (T, L), read in one go and no farther than the longest goes."""
        tokens = torch.cat(parts)
        clip, ends = self.clip, tokens.argmax(dim=-1)
        length = int(ends.max()) + 1
        x = clip.token_embedding(tokens[:, :length]) + clip.positional_embedding[:length]
        x = clip.transformer(x.transpose(0, 1), attn_mask=clip.attn_mask[:length, :length]).transpose(0, 1)
        x = clip.ln_final(x)[torch.arange(len(x), device=x.device), ends] @ clip.text_projection
        return F.normalize(x, dim=-1).split([len(part) for part in parts])

    def _reading(self, names: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """What the texts name; they come in the order of the surfaces and of the kinds."""
        read = self.read_surface(READ * names), self.read_kind(READ * directions)
        return torch.stack([F.cross_entropy(r, torch.arange(len(r), device=r.device)) for r in read]).mean()

    def _supervision(self, states: list[torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        rare = torch.tensor(RARE, device=batch.covered.device)
        shows = (batch.covered > LEAST_COVERED).float()
        parts: dict[str, list[torch.Tensor]] = {"class": [], "dense": [], "surface head": [], "kind head": []}
        for state, of_whole, of_patch in zip(states, self.whole, self.patch, strict=True):
            whole, patches = of_whole(state[:, 0]), of_patch(state[: len(shows), 1:])
            parts["class"].append(F.binary_cross_entropy_with_logits(whole[: len(shows), 0], batch.broken))
            parts["dense"].append(F.binary_cross_entropy_with_logits(patches[..., 0], shows, pos_weight=rare))
            of_all = of_whole(state.mean(dim=1))  # what a surface is, its patches tell sooner than its class token
            parts["surface head"] += [F.cross_entropy(read[:, 1:], batch.surfaces) for read in (whole, of_all)]
            parts["kind head"].append(naming(patches[..., 1:], on_the_defect(batch), batch))
        return {name: torch.stack(values).mean() for name, values in parts.items()}


def contrastive(scale: torch.Tensor, tokens: torch.Tensor, captions: torch.Tensor, batch: Batch) -> torch.Tensor:
    """CLIP's own loss; images of one surface and state share their captions."""
    own = torch.where(batch.broken[:, None] > 0, captions[:, 1], captions[:, 0])
    logits = scale * tokens @ own.T
    surfaces = batch.surfaces[: len(tokens)]
    same_state = batch.broken[:, None] == batch.broken
    same_surface = surfaces[:, None] == surfaces
    positive = same_state & (same_surface | ~batch.named)  # an unnamed caption fits all images of its state
    likely = [logits.log_softmax(dim).masked_fill(~positive, -math.inf).logsumexp(dim) for dim in (0, 1)]
    return -torch.stack(likely).mean()


def naming_evidence(surgery: list[torch.Tensor], directions: torch.Tensor) -> torch.Tensor:
    """Of every patch for every kind, (B, N, kinds), as the model has it: ``anomalib_clipad.components.DefectNames``.

    Args:
        surgery: Taps of the surgery path, (B, N + 1, D) each.
        directions: (kinds, D), from without to with the defect.
    """
    return torch.stack([F.normalize(tap[:, 1:], dim=-1) @ directions.T for tap in surgery]).mean(dim=0)


def naming(logits: torch.Tensor, weights: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy of the kind of defect, from logits (B, N, kinds) averaged with weights (B, N)."""
    means = (weights[..., None] * logits).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)
    return F.cross_entropy(means, batch.kinds, ignore_index=-1)


def on_the_defect(batch: Batch) -> torch.Tensor:
    """Weights (B, N) on the defect, and some beside it, since what a model marks is wider."""
    grid = round(math.sqrt(batch.covered.shape[1]))
    around = F.avg_pool2d(batch.covered.unflatten(1, (1, grid, grid)), 3, stride=1, padding=1).flatten(1)
    return batch.covered + around


def as_marked(logits: torch.Tensor) -> torch.Tensor:
    """Weights (B, N) where the map, (B, N) logits, is above its balance, or at its two highest patches."""
    logits = logits.detach()
    least = logits.topk(2, dim=1).values[:, 1:].clamp(max=0)
    return logits.sigmoid() * (logits >= least)


def opposition(maps: list[torch.Tensor], batch: Batch) -> torch.Tensor:
    """How far the maps of the stages, (B, N) each, point the wrong way, the paper's opposite predictions.

    A stage whose mean on the defect is a logit above its mean beside it is left alone.
    """
    shows = (batch.covered > LEAST_COVERED).float()
    some = shows.sum(-1) > 0
    defect = shows[some] / shows[some].sum(-1, keepdim=True)
    rest = (1 - shows[some]) / (1 - shows[some]).sum(-1, keepdim=True).clamp(min=1)
    return torch.stack([F.relu(1 - (m[some] * (defect - rest)).sum(-1)).mean() for m in maps]).mean()

"""Train the demonstration backbone: a small CLIP, from rendered textures and captions made here.

    python examples/demo/train_backbone.py --output demo        # 20 minutes on two CPU cores

Every surface is shown flawless and broken. Captions come from the package's own prompts and paraphrases of them. The
loss has four parts: images against captions (CLIP's own); the flawless against the broken caption of an image; deep
supervision, linear heads at the four taps that are thrown away, by which the class token tells whether the image is
broken and a patch whether it shows a defect; and that no stage of the surgery path points the wrong way. Surfaces of
``HELD_OUT`` are never rendered here; ``VALIDATION`` chooses the checkpoint.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch
from captioned_pictures import PROMPTS, Batch, Pictures, Sampler, render_pool
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from anomalib_clipad.components import DualPathVisionTransformer, feature_surgery
from anomalib_clipad.demo.textures import TRAINING, VALIDATION
from anomalib_clipad.sdp import ClipAdSdpModel

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 96, "layers": 12, "width": 96, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 3},
}


def losses(
    clip: open_clip.CLIP,
    tower: DualPathVisionTransformer,
    heads: nn.ModuleList,
    batch: Batch,
    weights: dict[str, float],
) -> dict[str, torch.Tensor]:
    """The parts of the loss, each a scalar, and their weighted sum."""
    taps = tower(batch.images)
    scale = clip.logit_scale.exp()
    texts = F.normalize(clip.encode_text(batch.texts.flatten(0, 1)), dim=-1).unflatten(0, (2, -1)).transpose(0, 1)
    class_token = F.normalize(taps.surgery[-1][:, 0], dim=-1)  # the original path's, projected
    margin = (class_token * (texts[:, 1] - texts[:, 0])).sum(-1)
    parts = {
        "contrast": contrastive(scale, class_token, texts, batch),
        "state": F.binary_cross_entropy_with_logits(scale * margin, batch.broken),
        **supervision([head(clip.visual.ln_post(tap)) for head, tap in zip(heads, taps.original, strict=True)], batch),
        "sign": opposition([scale * feature_surgery([tap], texts)[:, 1:, 1] for tap in taps.surgery], batch),
    }
    return {**parts, "loss": sum(weights[name] * part for name, part in parts.items())}


def contrastive(scale: torch.Tensor, class_token: torch.Tensor, texts: torch.Tensor, batch: Batch) -> torch.Tensor:
    """CLIP's own loss; images of one surface and state share their captions."""
    own = torch.where(batch.broken[:, None] > 0, texts[:, 1], texts[:, 0])
    logits = scale * class_token @ own.T
    same_state = batch.broken[:, None] == batch.broken
    same_surface = batch.surfaces[:, None] == batch.surfaces
    positive = same_state & (same_surface | ~batch.named)  # an unnamed caption fits all images of its state
    likely = [logits.log_softmax(dim).masked_fill(~positive, -math.inf).logsumexp(dim) for dim in (0, 1)]
    return -torch.stack(likely).mean()


def supervision(readings: list[torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
    """Deep supervision: what the heads read off the taps, (B, N + 1, 2) each.

    So deep and narrow a tower would not find the defects by itself in an hour.
    """
    rare = torch.tensor(4.0, device=batch.patches.device)  # few patches show a defect
    whole = [F.binary_cross_entropy_with_logits(r[:, 0, 0], batch.broken) for r in readings]
    patches = [F.binary_cross_entropy_with_logits(r[:, 1:, 1], batch.patches, pos_weight=rare) for r in readings]
    return {"class": torch.stack(whole).mean(), "dense": torch.stack(patches).mean()}


def opposition(maps: list[torch.Tensor], batch: Batch) -> torch.Tensor:
    """How far the maps of the stages, (B, N) each, point the wrong way, the paper's opposite predictions.

    A stage whose mean on the defect is a logit above its mean beside it is left alone.
    """
    shows = batch.patches.sum(-1) > 0
    defect = batch.patches[shows] / batch.patches[shows].sum(-1, keepdim=True)
    rest = (1 - batch.patches[shows]) / (1 - batch.patches[shows]).sum(-1, keepdim=True).clamp(min=1)
    return torch.stack([F.relu(1 - (m[shows] * (defect - rest)).sum(-1)).mean() for m in maps]).mean()


@torch.no_grad()
def validate(clip: open_clip.CLIP, pool: Pictures, seen: Pictures) -> dict[str, float]:
    """SDP on surfaces not trained on, and retrieval on unseen pictures of the others."""
    clip = copy.deepcopy(clip).eval()  # the model freezes what it is given
    device = clip.logit_scale.device
    normalise = Sampler(pool, 0, device, CONFIG["text_cfg"]["context_length"])
    model = ClipAdSdpModel(clip=clip, tokenizer=normalise.tokenizer)
    figures: dict[str, list[float]] = {"image_AUROC": [], "text_AUROC": [], "pixel_AUROC": [], "pixel_AP": []}
    for name in dict.fromkeys(pool.names):
        rows = [row for row, other in enumerate(pool.names) if other == name]
        images = ((pool.images[rows].flatten(0, 1).float() / 255 - normalise.mean) / normalise.std).to(device)
        labels = (pool.kinds[rows].flatten() >= 0).long().to(device)
        masks = pool.masks[rows].flatten().long().to(device)
        model.set_classes([name])
        scores = model.scores(images)
        both = torch.stack([scores.text_score, scores.map_score])
        both = (both - both.amin(1, keepdim=True)) / (both.amax(1, keepdim=True) - both.amin(1, keepdim=True))
        figures["image_AUROC"].append(binary_auroc(both.mean(0), labels).item())
        figures["text_AUROC"].append(binary_auroc(scores.text_score, labels).item())
        ranks = scores.anomaly_map.flatten().sigmoid()
        figures["pixel_AUROC"].append(binary_auroc(ranks, masks).item())
        figures["pixel_AP"].append(binary_average_precision(ranks, masks).item())

    names = list(dict.fromkeys(seen.names))
    vectors = [model.text_encoder.text_features(name, PROMPTS, method="mean") for name in names]
    vectors = F.normalize(torch.stack(vectors), dim=-1).flatten(0, 1)  # (2 * surfaces, D): flawless, broken in turn
    images = ((seen.images[:, :2].flatten(0, 1).float() / 255 - normalise.mean) / normalise.std).to(device)
    found = (F.normalize(clip.encode_image(images), dim=-1) @ vectors.T.to(device)).argmax(-1).cpu()
    wanted = torch.tensor([2 * names.index(name) + state for name in seen.names for state in (0, 1)])
    return {
        **{name: float(np.mean(values)) for name, values in figures.items()},
        "retrieval": (found == wanted).float().mean().item(),
        "surface_retrieval": (found // 2 == wanted // 2).float().mean().item(),
    }


def save(clip: open_clip.CLIP, trained: torch.Tensor, folder: Path) -> None:
    """Write the CLIP as open_clip does, in half precision; words it never read become the unknown word, zero."""
    state = {name: value.detach().cpu().half().contiguous() for name, value in clip.state_dict().items()}
    state["token_embedding.weight"] = state["token_embedding.weight"] * trained[:, None]
    state.pop("attn_mask", None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}, indent=1) + "\n")
    save_file(state, folder / "open_clip_model.safetensors")


def draw(history: pd.DataFrame, path: Path) -> None:
    """Loss parts on the left, what was reached on the right."""
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("contrast", "state", "class", "dense", "sign"):
        left.plot(history["step"], history[name], label=name)
    left.set(xlabel="step", ylabel="loss part", yscale="log")
    for name in ("image_AUROC", "pixel_AUROC", "pixel_AP", "retrieval", "surface_retrieval"):
        right.plot(history["step"], history[name], label=name.replace("_", " "))
    right.set(xlabel="step", ylabel="validation", ylim=(0, 1.02))
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.3))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Render, train, validate, keep the best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--pictures", type=int, default=16, help="surfaces in a batch, each flawless and broken")
    parser.add_argument("--pool", type=int, default=6000, help="surfaces rendered")
    parser.add_argument("--lr", type=float, default=7e-4, help="at its highest")
    parser.add_argument("--every", type=int, default=100, help="steps between validations")
    parser.add_argument("--contrast", type=float, default=1.0, help="weight of this part of the loss")
    parser.add_argument("--class-token", type=float, default=0.5, help="likewise")
    parser.add_argument("--dense", type=float, default=1.0, help="likewise")
    parser.add_argument("--sign", type=float, default=0.2, help="likewise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    weights = {
        "contrast": arguments.contrast,
        "state": 1.0,
        "class": arguments.class_token,
        "dense": arguments.dense,
        "sign": arguments.sign,
    }
    pool = render_pool(list(TRAINING), arguments.pool, 1_000_000 * (1 + arguments.seed))
    seen = render_pool(list(TRAINING), 4 * len(TRAINING), 7)
    unseen = render_pool(list(VALIDATION), 40 * len(VALIDATION), 100_007)
    sampler = Sampler(pool, arguments.seed, device, CONFIG["text_cfg"]["context_length"])

    torch.manual_seed(arguments.seed)
    clip = open_clip.CLIP(**CONFIG).to(device).train()
    tower = DualPathVisionTransformer(clip.visual)
    heads = nn.ModuleList(nn.Linear(tower.width, 2) for _ in tower.layers).to(device)
    trained = torch.zeros(CONFIG["text_cfg"]["vocab_size"], dtype=torch.bool)
    clip.logit_scale.requires_grad_(requires_grad=False).fill_(math.log(100))  # where CLIPs end, and what scores assume
    with torch.no_grad():
        clip.token_embedding.weight.mul_(0.5)
    decayed = [p for p in clip.parameters() if p.ndim >= 2 and p is not clip.token_embedding.weight]
    others = [p for p in clip.parameters() if not any(p is d for d in decayed)] + list(heads.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    history, best, running = [], -1.0, []
    start = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        rate = arguments.lr * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / arguments.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = sampler.batch(arguments.pictures)
        trained[batch.texts.cpu().flatten().unique()] = True
        parts = losses(clip, tower, heads, batch, weights)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        running.append({name: part.item() for name, part in parts.items()})
        if step % arguments.every and step != arguments.steps:
            continue
        row = {"step": step, "minutes": (time.perf_counter() - start) / 60}
        row |= pd.DataFrame(running).mean().to_dict() | validate(clip, unseen, seen)
        running.clear()
        history.append(row)
        print(" ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
        merit = row["image_AUROC"] + row["pixel_AUROC"]
        if merit > best:
            best = merit
            save(clip, trained, arguments.output)
        table = pd.DataFrame(history)
        table.to_csv(arguments.output / "training.csv", index=False, float_format="%.4g")
        draw(table, arguments.output / "training.png")


if __name__ == "__main__":
    main()

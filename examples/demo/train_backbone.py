"""Train the demonstration backbone: a small CLIP, from rendered textures and captions made here.

    python examples/demo/train_backbone.py --output first       # 35 and 6 minutes on two CPU cores
    python examples/demo/train_backbone.py --start first --output demo --seed 1 --steps 400 --lr 2e-4 --pool 3000

Every surface is shown flawless and broken. Captions come from the package's own prompts and paraphrases of them.
``losses.py`` has what is learned: images against captions, CLIP's own; the flawless against the broken caption of an
image; its surface by name; the defect by name, as the model names it; and helpers that are thrown away. Surfaces of
``HELD_OUT`` are never rendered here, only others of their names (``namesakes.py``); ``VALIDATION`` chooses the
checkpoint. The second line goes on without the helpers, and names what the model itself marks.
"""

import argparse
import copy
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch
from captioned_pictures import Pictures, Sampler, normalised, render_pool
from captions import PROMPTS
from losses import Lessons
from matplotlib.figure import Figure
from namesakes import NAMESAKES
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from anomalib_clipad.components.defect_names import region_weights
from anomalib_clipad.demo.defects import DEFECTS
from anomalib_clipad.demo.textures import TRAINING, VALIDATION
from anomalib_clipad.sdp import ClipAdSdpModel

CONFIG = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": 96, "layers": 12, "width": 96, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
}
WEIGHTS = {
    "contrast": 1.0,
    "state": 1.0,
    "surface": 1.0,
    "kind": 1.0,
    "marked": 0.0,
    "sign": 0.2,
    "map": 0.0,
    "class": 0.5,
    "dense": 1.0,
    "surface head": 0.3,
    "kind head": 0.5,
    "reading": 0.3,
}
# To go on, without the heads: names are now given to what the model itself marks, too.
KEPT = ("contrast", "state", "surface", "kind", "sign")
WEIGHTS_ON = {name: weight if name in KEPT else 0.0 for name, weight in WEIGHTS.items()} | {"marked": 1.0, "map": 5.0}


@torch.no_grad()
def validate(clip: open_clip.CLIP, unseen: Pictures, seen: Pictures) -> dict[str, float]:
    """SDP and the names of defects on surfaces not trained on, and retrieval on unseen pictures of the others."""
    clip = copy.deepcopy(clip).eval()  # the model freezes what it is given
    device = clip.logit_scale.device
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=CONFIG["text_cfg"]["context_length"])
    model = ClipAdSdpModel(clip=clip, tokenizer=tokenizer, defects=list(DEFECTS))
    figures: dict[str, list[float]] = {}
    for name in dict.fromkeys(unseen.names):
        rows = [row for row, other in enumerate(unseen.names) if other == name]
        images = normalised(unseen.images[rows].flatten(0, 1).float() / 255).to(device)
        kinds = unseen.kinds[rows].flatten()
        labels = (kinds >= 0).long().to(device)
        masks = unseen.masks[rows].flatten(0, 1).to(device)
        model.set_classes([name])
        scores = model.scores(images)
        both = torch.stack([scores.text_score, scores.map_score])
        both = (both - both.amin(1, keepdim=True)) / (both.amax(1, keepdim=True) - both.amin(1, keepdim=True))
        ranks = scores.anomaly_map.flatten().sigmoid()
        maps = model.map_scale.squash(scores.anomaly_map)
        words = model.name_defects(scores.defect_evidence, region_weights(maps, maps > 0.5))
        likeliest = [next(iter(word.probabilities)) for word in words]
        right = [word == list(DEFECTS)[kind] for word, kind in zip(likeliest, kinds, strict=True) if kind >= 0]
        row = {
            "image_AUROC": binary_auroc(both.mean(0), labels).item(),
            "text_AUROC": binary_auroc(scores.text_score, labels).item(),
            "pixel_AUROC": binary_auroc(ranks, masks.flatten().long()).item(),
            "pixel_AP": binary_average_precision(ranks, masks.flatten().long()).item(),
            "naming": float(np.mean(right)),
        }
        for key, value in row.items():
            figures.setdefault(key, []).append(value)

    names = list(dict.fromkeys(seen.names))
    vectors = [model.text_encoder.text_features(name, PROMPTS, method="mean") for name in names]
    vectors = F.normalize(torch.stack(vectors).sum(dim=1), dim=-1)
    images = normalised(seen.images[:, :2].flatten(0, 1).float() / 255).to(device)
    found = (F.normalize(clip.encode_image(images), dim=-1) @ vectors.T.to(device)).argmax(-1).cpu()
    wanted = torch.tensor([names.index(name) for name in seen.names]).repeat_interleave(2)
    means = {name: float(np.mean(values)) for name, values in figures.items()}
    return {**means, "surface_retrieval": (found == wanted).float().mean().item()}


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
    for name in (name for name in WEIGHTS if name in history):
        left.plot(history["step"], history[name], "-" if name in KEPT else "--", label=name)
    left.set(xlabel="step", ylabel="loss part", yscale="log")
    for name in ("image_AUROC", "pixel_AUROC", "pixel_AP", "naming", "surface_retrieval"):
        right.plot(history["step"], history[name], label=name.replace("_", " "))
    right.set(xlabel="step", ylabel="validation", ylim=(0, 1.02))
    left.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    right.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path)


def new_clip(seed: int, start: Path | None = None) -> open_clip.CLIP:
    """A CLIP with random weights, or with those of an earlier run."""
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**CONFIG).train()
    clip.logit_scale.requires_grad_(requires_grad=False).fill_(math.log(100))  # where CLIPs end, and what scores assume
    with torch.no_grad():
        clip.token_embedding.weight.mul_(0.5)
    if start is not None:
        state = load_file(start / "open_clip_model.safetensors")
        clip.load_state_dict({name: value.float() for name, value in state.items()}, strict=True)
    return clip


def optimizer_of(lessons: Lessons) -> torch.optim.Optimizer:
    """AdamW, which leaves the words, the scales and the offsets as large as they are."""
    decayed = [p for p in lessons.clip.parameters() if p.ndim >= 2 and p is not lessons.clip.token_embedding.weight]
    others = [p for p in lessons.parameters() if p.requires_grad and not any(p is d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train(rank: int, arguments: argparse.Namespace, pools: dict[str, Pictures], meeting: str) -> None:
    """What each process does: its own batches, and the mean of all gradients; the first one validates."""
    torch.set_num_threads(1)  # two processes of one thread do twice the work of one with two
    distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=arguments.processes)
    device = torch.device(arguments.device)
    seed, length = 100 * arguments.seed + rank, CONFIG["text_cfg"]["context_length"]
    sampler = Sampler(pools["pool"], pools["namesakes"], seed, length)
    weights = WEIGHTS if arguments.start is None else WEIGHTS_ON
    lessons = Lessons(new_clip(arguments.seed, arguments.start), len(sampler.surfaces), len(DEFECTS)).to(device)
    together: nn.Module = DistributedDataParallel(lessons)
    optimizer = optimizer_of(lessons)
    trained = torch.zeros(CONFIG["text_cfg"]["vocab_size"], dtype=torch.int32)
    if arguments.start is not None:
        trained[lessons.clip.token_embedding.weight.abs().sum(dim=1) > 0] = 1
    history = [] if arguments.start is None else pd.read_csv(arguments.start / "training.csv").to_dict("records")
    steps_before, minutes_before = (history[-1]["step"], history[-1]["minutes"]) if history else (0, 0.0)
    best, running = -1.0, []
    start = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        rate = arguments.lr * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / arguments.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = sampler.batch(arguments.pictures, arguments.namesakes)
        for texts in (batch.captions, batch.names, batch.defects):
            trained[texts.flatten().unique()] = 1
        parts = together(type(batch)(*(part.to(device) for part in batch)))
        loss = sum(weights[name] * part for name, part in parts.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running.append({name: part.item() for name, part in parts.items() if weights[name]} | {"loss": loss.item()})
        if step % arguments.every and step != arguments.steps:
            continue
        distributed.all_reduce(trained, distributed.ReduceOp.MAX)
        if rank:
            continue
        row = {"step": steps_before + step, "minutes": minutes_before + (time.perf_counter() - start) / 60}
        row |= pd.DataFrame(running).mean().to_dict() | validate(lessons.clip, pools["unseen"], pools["seen"])
        running.clear()
        history.append(row)
        print(" ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
        merit = row["image_AUROC"] + row["pixel_AUROC"] + row["naming"]
        if merit > best:
            best = merit
            save(lessons.clip, trained > 0, arguments.output)
        table = pd.DataFrame(history)
        table.to_csv(arguments.output / "training.csv", index=False, float_format="%.4g")
        draw(table, arguments.output / "training.png")
    distributed.destroy_process_group()


def main() -> None:
    """Render, train, validate, keep the best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument("--start", type=Path, help="folder of an earlier run to go on from")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--processes", type=int, default=2, help="each with batches of its own")
    parser.add_argument("--pictures", type=int, default=8, help="surfaces in a batch, each flawless and broken")
    parser.add_argument("--namesakes", type=int, default=2, help="further pictures in a batch")
    parser.add_argument("--pool", type=int, default=8000, help="surfaces rendered")
    parser.add_argument("--lr", type=float, default=7e-4, help="at its highest")
    parser.add_argument("--every", type=int, default=250, help="steps between validations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    seed = 1_000_000 * (1 + arguments.seed)
    pools = {
        "pool": render_pool(list(TRAINING), arguments.pool, seed),
        "namesakes": render_pool(list(NAMESAKES), arguments.pool // 8, seed + 500_000),
        "seen": render_pool(list(TRAINING), 4 * len(TRAINING), 7),
        "unseen": render_pool(list(VALIDATION), 40 * len(VALIDATION), 100_007),
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (arguments, pools, f"{folder}/meeting"), nprocs=arguments.processes)


if __name__ == "__main__":
    main()

"""Score pictures with an exported model: ONNX Runtime, numpy and Pillow, neither anomalib nor torch.

python examples/run_onnx.py results/weights/onnx/model.onnx photo.png more.png [--output heatmaps]
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

OUTPUTS = ["pred_score", "pred_label", "anomaly_map", "pred_mask"]  # a file of several classes has class_index, too

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", type=Path, help="the exported model.onnx")
parser.add_argument("pictures", type=Path, nargs="+", help="of any size")
parser.add_argument("--output", type=Path, default=Path("heatmaps"), help="folder of the heatmaps")
arguments = parser.parse_args()
for path in (arguments.model, *arguments.pictures):
    if not path.is_file():
        parser.error(f"{path} is not a file; give the exported model.onnx and pictures that exist.")

arguments.output.mkdir(parents=True, exist_ok=True)
session = onnxruntime.InferenceSession(arguments.model)
for number, path in enumerate(arguments.pictures):
    picture = Image.open(path).convert("RGB")
    pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)[None] / 255  # any size: the model resizes
    score, label, anomaly_map, mask = session.run(OUTPUTS, {"input": pixels})
    print(f"{path}: {'anomalous' if label[0] else 'normal'}, score {score[0]:.3f}, {mask.mean():.1%} of it marked")
    heatmap = Image.fromarray((255 * anomaly_map[0]).astype(np.uint8)).resize(picture.size)
    heatmap.save(arguments.output / f"{number:03d}_{path.stem}.png")  # pictures of two folders can share a name

"""Judge pictures with an exported model: ONNX Runtime, numpy and Pillow, neither anomalib nor torch.

python examples/run_onnx.py results/weights/onnx/model.onnx photo.png more.png
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
for path in sys.argv[2:]:
    picture = Image.open(path).convert("RGB")
    pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)[None] / 255  # any size: the model resizes
    score, label, anomaly_map, mask = session.run(None, {"input": pixels})
    print(f"{path}: {'anomalous' if label[0] else 'normal'}, score {score[0]:.3f}, {mask.mean():.1%} of it marked")
    Image.fromarray((255 * anomaly_map[0]).astype(np.uint8)).resize(picture.size).save(f"{path}.heatmap.png")

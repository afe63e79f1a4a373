"""Score pictures with an exported model: ONNX Runtime, numpy and Pillow, neither anomalib nor torch.

python examples/run_onnx.py results/weights/onnx/model.onnx photo.png more.png [--output heatmaps]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", type=Path, help="the exported model.onnx")
parser.add_argument("pictures", type=Path, nargs="+", help="of any size")
parser.add_argument("--output", type=Path, default=Path("heatmaps"), help="folder of the heatmaps")
arguments = parser.parse_args()
for path in (arguments.model, *arguments.pictures):
    if not path.is_file():
        parser.error(f"{path} is not a file; give the exported model.onnx and pictures that exist.")


def remarks(found: dict[str, np.ndarray], facts: dict[str, list]) -> str:
    """What a file with ``extra_outputs``, or one of several products, tells of a picture beside its score."""
    words, classes, chosen = (
        facts.get("defects", []),
        facts.get("class_names", []),
        int(found.get("class_index", [0])[0]),
    )
    told = [f"p-value {found['p_value'][0]:.3f}"] if "p_value" in found else []
    if words and found["pred_label"][0]:  # attribution, not diagnosis
        owners = facts.get("class_of_defect", [0] * len(words))
        shares = zip(words, owners, found["defect_probabilities"][0], strict=True)
        told += [f"{word} {share:.2f}" for word, owner, share in shares if owner == chosen]
    return "".join(f", {one}" for one in [*told, *(f"of class {name}" for name in classes[chosen : chosen + 1])])


def open_model(path: Path) -> onnxruntime.InferenceSession:
    """The exported file, ready to run."""
    try:
        opened = onnxruntime.InferenceSession(path)
    except Exception as error:  # noqa: BLE001 - ONNX Runtime has many, of no common kind
        parser.error(f"{path} cannot be run ({str(error).splitlines()[0]}); give the exported model.onnx.")
    names = [output.name for output in opened.get_outputs()]
    if not {"pred_score", "pred_label", "pred_mask", "anomaly_map"}.issubset(names):
        parser.error(f"{path} gives {', '.join(names)}; give the model.onnx that anomalib exported.")
    return opened


def read(path: Path) -> np.ndarray | None:
    """Pixels of a picture, (1, 3, H, W) in [0, 1], scaled as in the engine; of any size, since the model resizes."""
    try:
        with Image.open(path) as image:
            # Pillow would cut 16 bits off at 255. Older versions open a PNG of 16 bits in the mode of 32.
            if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
                return np.asarray(image, dtype=np.float32)[None, None].repeat(3, axis=1) / 65535
            if image.mode in ("I", "F"):
                parser.error(f"{path} has more than 16 bits a pixel; save it with 8 or 16.")
            return np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)[None] / 255
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        print(f"{path} cannot be read and is skipped ({error}).")
        return None


session = open_model(arguments.model)
arguments.output.mkdir(parents=True, exist_ok=True)
names = [output.name for output in session.get_outputs()]
facts = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
for number, path in enumerate(arguments.pictures):
    if (pixels := read(path)) is None:
        continue
    found = dict(zip(names, session.run(names, {"input": pixels}), strict=True))
    label, score, marked = found["pred_label"][0], found["pred_score"][0], found["pred_mask"].mean()
    verdict = f"{'anomalous' if label else 'normal'}, score {score:.3f}, {marked:.1%} of it marked"
    print(f"{path}: {verdict}{remarks(found, facts)}")
    heatmap = Image.fromarray((255 * found["anomaly_map"][0]).astype(np.uint8)).resize(pixels.shape[:1:-1])
    heatmap.save(arguments.output / f"{number:03d}_{path.stem}.png")  # pictures of two folders can share a name

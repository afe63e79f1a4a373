"""Draw a class's prompts and the five vectors that can represent them, in two dimensions.

python examples/prompt_cloud.py bottle [--backbone FOLDER] [--output cloud.png]
"""

import argparse

import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from anomalib_clipad.components import PromptEnsemble, TextEncoder, load_backbone, select_representative_vector

METHODS = {"mean": "o", "pca": "s", "kde": "D", "dbscan": "*", "mean_shift": "P"}
COLOURS = {"normal": "#1b6ca8", "anomalous": "#d95f02"}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("class_name")
parser.add_argument("--backbone", default="ViT-B-16-plus-240")
parser.add_argument("--pretrained", default="laion400m_e31")
parser.add_argument("--output", default="cloud.png")
arguments = parser.parse_args()

clip, tokenizer, *_ = load_backbone(arguments.backbone, arguments.pretrained)
encoder = TextEncoder(clip, tokenizer)
prompts = dict(zip(COLOURS, PromptEnsemble.from_config("industrial").prompts(arguments.class_name), strict=True))
clouds = {state: encoder.encode(sentences) for state, sentences in prompts.items()}
plane = PCA(n_components=2, svd_solver="full").fit(torch.cat(list(clouds.values())).numpy())

figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
axes = figure.subplots()
for state, cloud in clouds.items():
    x, y = plane.transform(cloud.numpy()).T
    axes.scatter(x, y, s=14, alpha=0.35, color=COLOURS[state], label=f"{len(cloud)} {state} prompts")
for method, marker in METHODS.items():
    for state, cloud in clouds.items():
        x, y = plane.transform(select_representative_vector(cloud, method)[None].numpy())[0]
        label = method if state == "normal" else None
        axes.scatter(x, y, s=150, marker=marker, color=COLOURS[state], edgecolor="black", zorder=3, label=label)
axes.set_title(f"Prompts for “{arguments.class_name}” and what can represent them")
axes.set_xlabel("first principal direction of all prompts")
axes.set_ylabel("second")
axes.spines[["top", "right"]].set_visible(False)
figure.legend(loc="outside right upper", frameon=False)
figure.savefig(arguments.output)
print(f"See {arguments.output}")

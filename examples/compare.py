"""Compare SDP's text vectors chosen in two ways, and PatchCore, on a folder in MVTec layout.

python examples/compare.py datasets/widget broken [--backbone FOLDER]
"""

import argparse
from pathlib import Path

from anomalib_clipad.compare import CompareJob, write_report

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("root", type=Path, help="folder with train/good, test/good, test/DEFECT, ground_truth/DEFECT")
parser.add_argument("defect", help="name of the defect's folder")
parser.add_argument("--backbone", default="ViT-B-16-plus-240")
parser.add_argument("--output", type=Path, default=Path("results/compare_example"))
arguments = parser.parse_args()

folders = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": f"test/{arguments.defect}"}
more = {"mask_dir": f"ground_truth/{arguments.defect}", "val_split_mode": "same_as_test", "num_workers": 0}
data = {
    "class_path": "Folder",
    "init_args": {"name": arguments.root.name, "root": str(arguments.root), **folders, **more},
}
models = [
    {"class_path": "ClipAdSdp", "name": f"SDP {rvs}", "init_args": {"backbone": arguments.backbone, "rvs": rvs}}
    for rvs in ("dbscan", "mean")
]
models.append(
    {
        "class_path": "Patchcore",
        "name": "PatchCore",
        "init_args": {"pre_trained": False, "coreset_sampling_ratio": 0.01},
    }
)

jobs = [CompareJob(model, data, None, 42, 256, arguments.output, "cpu") for model in models]
write_report(arguments.output, [job.run() for job in jobs])
print(f"See {arguments.output / 'report.md'}")

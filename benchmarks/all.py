"""All lines of the benchmarks of speed and memory in one run, each with its limit, in one table.

python benchmarks/all.py                    # ViT-B-16-plus-240 with random weights, 20 to 60 minutes on two quiet cores
python benchmarks/all.py --backbone ViT-B-32 --batch-sizes 1 --only routes start
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator

import cpu
import defect_names
import routes
import start
import tiles
from line import HEADER, Line, machine


def main() -> None:
    """Print the table; exit status 1 if a limit is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-B-16-plus-240")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--skip-winclip", action="store_true")
    parser.add_argument("--only", nargs="+", help="cpu, routes, start, tiles, defect_names")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    backbone, sizes = arguments.backbone, arguments.batch_sizes
    parts: dict[str, Callable[[], Iterator[Line]]] = {
        "routes": lambda: routes.lines(backbone, sizes),
        "cpu": lambda: cpu.lines(backbone, sizes, with_winclip=not arguments.skip_winclip),
        "start": start.lines,  # of the default backbone, which has the large file
        "tiles": lambda: tiles.lines(backbone),
        "defect_names": lambda: defect_names.lines(backbone),
    }
    if unknown := set(arguments.only or ()) - set(parts):
        parser.error(f"--only takes {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    print(f"{backbone}, float32, {machine()}, load before {os.getloadavg()[0]:.1f}\n\n{HEADER}", flush=True)
    missed = 0
    for name in arguments.only or parts:
        for line in parts[name]():
            print(line, flush=True)
            missed += not line.met
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()

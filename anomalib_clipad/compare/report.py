"""The report of a comparison: which files it has, and what each is made of."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from anomalib_clipad.compare.drawing import draw_once
from anomalib_clipad.compare.evaluator import METRICS
from anomalib_clipad.compare.example_pictures import choose_rows, examples_figure
from anomalib_clipad.compare.gallery import page_images
from anomalib_clipad.compare.job_files import Kept
from anomalib_clipad.compare.known import PUBLISHED
from anomalib_clipad.compare.markdown import markdown
from anomalib_clipad.compare.metric_figures import categories_figure, means_figure, shots_figure, speed_figure
from anomalib_clipad.compare.naming import naming_picture, naming_remarks, namings
from anomalib_clipad.compare.naming_figure import confusion_figure
from anomalib_clipad.compare.predictions import predictions, read_kept, write_predictions
from anomalib_clipad.compare.progress import Tell, silent
from anomalib_clipad.compare.remarks import remarks, scale_remarks
from anomalib_clipad.compare.score_figure import scores_figure
from anomalib_clipad.compare.tables import done_jobs, first_seed, flat, means_of, over_shots
from anomalib_clipad.errors import InputError
from anomalib_clipad.files import slug, write_atomically
from anomalib_clipad.page import write_page

Drawing = tuple[Path, Sequence[object], Callable[[], Figure]]  # a file, what it depends on, and how it is drawn


def write_report(
    output: Path, rows: list[dict[str, Any]], title: str = "", published: str | None = None, tell: Tell = silent
) -> None:
    """Write tables and pictures of a comparison into its folder; a picture only if something in it has changed.

    Args:
        output: Folder of the comparison; ``jobs/`` in it holds what the jobs kept.
        rows: A row a job, as :class:`anomalib_clipad.compare.CompareJob` returns it.
        title: The configuration, printed at the end of the report.
        published: Name of the data set whose published figures belong beside the measured ones; by default the one
            that all rows are of.
        tell: Is told which picture is drawn.

    Raises:
        InputError: If two rows are of one model on one category, which a table cannot tell apart.

    Example:
        >>> row = {"model": "SDP", "category": "bottle", "image_AUROC": 0.9, "key": "none"}
        >>> write_report(Path(), [{**row, "images_per_second": 3.0, "peak_memory_mib": 900.0}])
        >>> "| SDP | **90.0** | 3.00 | 900 | 1 of 1 |" in Path("report.md").read_text()
        True
    """
    table = pd.DataFrame(rows)
    of_one_job = [name for name in ("model", "category", "seed") if name in table]
    if (twice := table.duplicated(of_one_job)).any():
        model, category = table.loc[twice, ["model", "category"]].iloc[0]
        msg = f"There are several rows of {model} on {category}; give each model a name of its own."
        raise InputError(msg)
    write_atomically(output / "results.csv", flat(table).to_csv(index=False).encode())
    write_atomically(output / "results.json", json.dumps(rows, indent=1, default=str).encode())
    done, metrics = done_jobs(table)
    tell("reading what the jobs kept", 0, None)
    kept = read_kept(output, rows)
    write_predictions(output, predictions(rows, kept))
    first = first_seed(done)
    records = first.to_dict("records")
    judged = predictions(records, kept)
    words = namings(records, kept)
    drawings: list[Drawing] = [
        *_metric_drawings(output, done, metrics),
        *_image_drawings(output, first, judged, kept),
        *((output / naming_picture(one), [one], partial(confusion_figure, one)) for one in words),
    ]
    for number, (path, inputs, draw) in enumerate(drawings):
        tell(f"drawing {path.relative_to(output)}", number, len(drawings))
        path.parent.mkdir(exist_ok=True)
        draw_once(path, inputs, draw)
    drawn = {path.relative_to(output).as_posix() for path, *_ in drawings}
    kinds = set(table["data"]) if "data" in table else set()
    published = published or next((name for name in PUBLISHED if kinds == {name}), None)
    text = markdown(table, metrics, kept, drawn, published)
    if title:
        text += f"\n## Configuration\n```yaml\n{title.strip()}\n```\n"
    write_atomically(output / "report.md", text.encode(errors="backslashreplace"))
    write_page(
        output,
        f"Comparison of {table['model'].nunique()} models",
        page_images(output, records, kept, tell),
        notes=[*remarks(rows), *naming_remarks(words), *scale_remarks(records)],
        metrics=100 * means_of(done, metrics).rename(columns=METRICS).rename_axis("means in %") if metrics else None,
    )


def _metric_drawings(output: Path, done: pd.DataFrame, metrics: list[str]) -> list[Drawing]:
    if not metrics:
        return []
    means, named = means_of(done, metrics), done[["model", "category", *metrics]]
    speed = done[["model", "images_per_second", *metrics, *(["device"] if "device" in done else [])]]
    found: list[Drawing] = [
        (output / "means.png", [means], lambda: means_figure(means)),
        (output / "speed_accuracy.png", [speed], lambda: speed_figure(speed, metrics)),
    ]
    if done["category"].nunique() > 1:
        found.append((output / "per_category.png", [named], lambda: categories_figure(named, metrics)))
    if over_shots(done):
        tried = done[["family", "category", "shots", "seed", *metrics]]
        found.append((output / "shots.png", [tried], lambda: shots_figure(tried, metrics)))
    return found


def _image_drawings(output: Path, first: pd.DataFrame, judged: pd.DataFrame, kept: Mapping[str, Kept]) -> list[Drawing]:
    found: list[Drawing] = []
    if len(judged):
        found.append((output / "scores.png", [judged], lambda: scores_figure(judged)))
    for category, part in first.groupby("category", sort=False):
        of_models = {row["model"]: kept[row["key"]] for _, row in part.iterrows() if row["key"] in kept}
        rows, too_many = choose_rows(of_models)
        if not rows:
            continue
        notes = scale_remarks(part.to_dict("records"))
        if too_many:
            notes.append(f"{too_many} more images that are the worst or the best hidden of a model are left out.")
        inputs = [
            [(model, one.digest) for model, one in of_models.items()],
            [(row, _changed(row.path)) for row in rows],
            notes,
        ]

        def draw(of_models: dict = of_models, rows: list = rows, notes: list = notes) -> Figure:
            return examples_figure(of_models, rows, notes)

        found.append((output / "examples" / f"{slug(str(category))}.png", inputs, draw))
    return found


def _changed(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except (OSError, ValueError):
        return 0

"""The page: what is in its file. test_page_runs.py has test and predict write it, test_page_browser.py opens it."""

import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomalib_clipad.page import Finding, PageImage, original_for_browsers, write_page, write_thumbnail


class Elements(HTMLParser):
    """Tags of a page with their attributes, as a browser without scripts finds them."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text())[1])


def paths_of(page: Path) -> list[str]:
    return sorted(image[0] for image in data_of(page)["images"])


def test_the_page_holds_what_it_was_given(tmp_path: Path) -> None:
    images = [
        PageImage(
            "a/1.png", "cup", 1, {"SDP": Finding(0.25, "0.1", "heat/ä 1.png", 0.5, "a crack")}, "hole", "t/1.jpg"
        ),
        PageImage("b/2.png", "nut", None, {"SDP": Finding(1.75), "SDP+": Finding(float("nan"), "nan")}),
    ]
    data = data_of(write_page(tmp_path, "Cups", images, threshold=0.4))
    assert (data["models"], data["categories"], data["folders"]) == (["SDP", "SDP+"], ["cup", "nut"], ["", "hole"])
    assert data["threshold"] == 0.4
    assert data["images"] == [
        ["a/1.png", 0, 1, 1, "t/1.jpg", None, [[0.25, "0.1", "heat/%C3%A4%201.png", 0.5, "a crack"], None]],
        ["b/2.png", 1, 0, None, None, None, [[1.75, ""], [None, "nan"]]],
    ]


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</script><b>", "it's & <!-- "]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_never_markup(name: str, tmp_path: Path) -> None:
    image = PageImage(f"{name}.png", name, 1, {name: Finding(0.9, name, explanation=name)}, name)
    metrics = pd.DataFrame({name: [0.5], "text": [name]})
    hostile = Elements(write_page(tmp_path, name, [image], notes=[name], metrics=metrics))
    plain = image.path.replace(name, "a")
    harmless = PageImage(plain, "a", 1, {"a": Finding(0.9, "a", explanation="a")}, "a")
    metrics = pd.DataFrame({"a": [0.5], "text": ["a"]})
    expected = Elements(write_page(tmp_path / "plain", "a", [harmless], notes=["a"], metrics=metrics))
    assert [tag for tag, _ in hostile.found] == [tag for tag, _ in expected.found]
    assert data_of(tmp_path / "report.html")["images"][0][0] == f"{name}.png"


def test_bytes_that_are_no_text_are_shown_as_the_table_shows_them(tmp_path: Path) -> None:
    name = b"part \xff.png".decode(errors="surrogateescape")
    page = write_page(
        tmp_path, name, [PageImage(name, "cup", None, {"SDP": Finding(0.1)}, thumbnail=name)], notes=[name]
    )
    image = data_of(page)["images"][0]
    assert image[0] == "part \\udcff.png"
    assert image[4] == "part%20%FF.png", "the file's own bytes"


def test_metrics_are_a_row_a_model(tmp_path: Path) -> None:
    metrics = pd.DataFrame({"image AUROC": [0.98765, np.nan], "seconds": [120.04, 3.5]}, index=["SDP", "SDP+"])
    metrics.index.name = "model"
    html = write_page(tmp_path, "Cups", [], metrics=metrics).read_text()
    assert re.findall(r"<td[^>]*>(.*?)</td>", html) == ["SDP", "0.9877", "120.0", "SDP+", "n/a", "3.5"]


def many_images(count: int, thumbnail: str | None = None) -> list[PageImage]:
    rng = np.random.default_rng(0)
    models = ("SDP", "SDP, 4 normal images", "SDP+", "PatchCore")
    images = []
    for number in range(count):
        truth = int(rng.random() < 0.2)
        scores = rng.normal(0.35 + 0.3 * truth, 0.15, len(models))
        findings = {
            model: Finding(float(score), f"{score:.6g}", f"jobs/{model}/heat/{number:05d}.png", 0.25)
            for model, score in zip(models, scores, strict=True)
        }
        path = f"/data/line 3/camera/2025-01/part_{number:05d}.png"
        images.append(PageImage(path, f"part {number % 3}", truth, findings, ("good", "crack")[truth], thumbnail))
    return images


def test_five_thousand_images_of_four_models_are_a_few_megabytes(tmp_path: Path) -> None:
    images = many_images(5000)
    start = time.process_time()
    page = write_page(tmp_path, "Many", images)
    assert time.process_time() - start < 5  # 0.6 s here
    assert page.stat().st_size < 5000 * 4 * 140


def save(image: Image.Image, path: Path, **arguments: object) -> Path:
    image.save(path, **arguments)
    return path


def test_a_thumbnail_looks_as_the_model_sees_the_image(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 1, 500), (200, 1))
    grey = Image.fromarray((255 * ramp).astype(np.uint8))
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    clear = grey.convert("RGBA")
    clear.putalpha(0)
    files = [
        save(grey, tmp_path / "grey.png"),
        save(grey.convert("P"), tmp_path / "palette.png"),
        save(grey.convert("RGB"), tmp_path / "exif.jpg", exif=upside_down),
        save(clear, tmp_path / "clear.png"),
        save(Image.fromarray((65535 * ramp).astype(np.uint16)), tmp_path / "deep.png"),
        save(Image.fromarray(ramp.astype(np.float32)), tmp_path / "fractions.tiff"),
    ]
    for file in files:
        with Image.open(tmp_path / write_thumbnail(file, tmp_path)) as thumbnail:
            assert thumbnail.size == (240, 96), file.name
            found = np.asarray(thumbnail.convert("L"))[:, 2:-2].mean(axis=0)
        assert np.abs(found - np.linspace(0, 255, 240)[2:-2]).max() < 4, file.name
    shown = [original_for_browsers(file, tmp_path) is not None for file in files]
    assert shown == [True, True, False, True, False, False], "turned or scaled by a browser"


def test_a_thumbnail_is_made_again_only_for_a_newer_image(tmp_path: Path) -> None:
    image = save(Image.new("RGB", (30, 20), "white"), tmp_path / "a.png")
    thumbnail = tmp_path / write_thumbnail(image, tmp_path)
    thumbnail.write_bytes(b"kept")
    assert tmp_path / write_thumbnail(image, tmp_path) == thumbnail
    assert thumbnail.read_bytes() == b"kept"
    save(Image.new("RGB", (50, 20), "white"), image)
    write_thumbnail(image, tmp_path)
    with Image.open(thumbnail) as made:
        assert made.size == (50, 20)


def test_a_thumbnail_is_of_the_image_that_took_anothers_place(tmp_path: Path) -> None:
    image = save(Image.new("RGB", (30, 20), "white"), tmp_path / "a.png")
    thumbnail = tmp_path / write_thumbnail(image, tmp_path)
    save(Image.new("RGB", (50, 20), "white"), image)
    os.utime(image, (1_000_000_000, 1_000_000_000))  # from an archive, older than the thumbnail
    write_thumbnail(image, tmp_path)
    with Image.open(thumbnail) as made:
        assert made.size == (50, 20)
    before = thumbnail.read_bytes()
    write_thumbnail(image, tmp_path, np.eye(2, dtype=bool))
    assert thumbnail.read_bytes() != before, "of which another part is pale"


def test_an_animation_is_shown_as_the_model_sees_it(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.gif")
    assert original_for_browsers(tmp_path / "a.gif", tmp_path) is None
    assert original_for_browsers(tmp_path / "b.gif", tmp_path) == "b.gif"

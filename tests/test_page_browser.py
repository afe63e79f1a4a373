"""The page in a real browser: what is clicked, moved and exported there is what Python computes from them."""

import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomalib_clipad.page import Finding, PageImage, write_heat_layer, write_page, write_thumbnail

from .browser import assert_judged, cards_of, choose, downloaded, enter, judge, number, show, shown, wait_for
from .test_page import HOSTILE, many_images

MODELS = ("SDP", "PatchCore")
NAMES = [*HOSTILE, "=cmd|' /C calc'!A0", 'two "quoted", words', "two\nlines", "größe"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One Chromium for all tests, by the driver of the system; none is ever downloaded."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no Chromium with its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    arguments = ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1400,4000")
    for argument in arguments:
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    downloads = tmp_path_factory.mktemp("downloads")
    found.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    found.downloads = downloads
    yield found
    found.quit()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[[Path], Any]]:
    """Opens a page; afterwards nothing may have failed in it, nor been asked for outside of the disk."""

    def open_page(page: Path) -> Any:
        browser.get(page.as_uri())
        return browser

    browser.get_log("performance")
    yield open_page
    browser.execute_script("localStorage.clear()")
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert urls
    assert not [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def example(folder: Path) -> tuple[Path, list[PageImage]]:
    """A page of 24 images of two models in two categories: scores beyond [0, 1], NaN and hostile names among them."""
    rng = np.random.default_rng(0)
    picture = folder / "picture.png"
    Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(picture)
    thumbnail, heat = write_thumbnail(picture, folder), write_heat_layer(rng.random((32, 32)), picture, folder)
    images = []
    for place in range(24):
        truth = place % 2
        scores = rng.normal(0.3 + 0.4 * truth, 0.3, 2)
        if place == 5:
            scores[0] = np.nan
        name = NAMES[place] if place < len(NAMES) else f"part {place}"
        path = f"{name}.png" if name.startswith("=") else f"line/{name}.png"
        findings = {
            model: Finding(float(score), f"{score:.3g}", heat) for model, score in zip(MODELS, scores, strict=True)
        }
        category, group = ("cup", "nut")[place % 3 == 0], ("good", "hole")[truth]
        images.append(PageImage(path, category, truth, findings, group, thumbnail, "picture.png"))
    metrics = pd.DataFrame({"model": [*MODELS, "SDP+"], "image AUROC": [0.9, 0.95, np.nan]})
    return write_page(folder, "Cups and nuts", images, notes=["A note."], metrics=metrics), images


def paths(images: Sequence[PageImage], test: Callable[[float, PageImage], bool], model: str = "SDP") -> set[str]:
    return {image.path for image in images if test(image.findings[model].score, image)}


def test_counts_follow_the_threshold_while_it_moves(opened: Callable, tmp_path: Path) -> None:
    page, images = example(tmp_path)
    browser = opened(page)
    slider = browser.find_element("id", "threshold")
    seen = set()
    for keys in ("", "\ue014" * 7, "\ue012" * 20, "\ue010", "\ue011"):  # right, left, end, home
        slider.send_keys(keys)
        threshold = float(slider.get_property("value"))
        called = [(not image.findings["SDP"].score <= threshold, image.truth) for image in images]
        expected = [called.count(pair) for pair in ((True, 1), (False, 1), (True, 0), (False, 0))]
        ids = ("true-positives", "false-negatives", "false-positives", "true-negatives")
        assert [number(browser, name) for name in ids] == expected
        words = browser.find_elements("css selector", ".card .badge")
        assert sum("false alarm" in word.text for word in words) == expected[2]
        assert sum("missed" in word.text for word in words) == expected[1]
        seen.add(tuple(expected))
    assert len(seen) == 5
    browser.find_element("id", "threshold-reset").click()
    assert float(slider.get_property("value")) == 0.5


def test_filters_show_the_right_images(opened: Callable, tmp_path: Path) -> None:
    page, images = example(tmp_path)
    browser = opened(page)
    assert set(shown(browser)) == paths(images, lambda *_: True)
    kinds = {
        "false": lambda score, image: not score <= 0.5 and not image.truth,
        "missed": lambda score, image: score <= 0.5 and bool(image.truth),
        "anomalous": lambda score, _: not score <= 0.5,
        "normal": lambda score, _: score <= 0.5,
    }
    for kind, test in kinds.items():
        show(browser, kind)
        assert set(shown(browser)) == paths(images, test) != set()
        assert number(browser, f"count-{kind}") == len(paths(images, test))
    show(browser, "all")
    choose(browser, "category", "nut")
    assert set(shown(browser)) == paths(images, lambda _, image: image.category == "nut")
    choose(browser, "folder", "hole")
    assert set(shown(browser)) == paths(images, lambda _, image: image.category == "nut" and bool(image.truth))
    choose(browser, "category", "all")
    choose(browser, "folder", "all")
    enter(browser, "score-from", "0.2")
    enter(browser, "score-to", "0.6")
    assert set(shown(browser)) == paths(images, lambda score, _: 0.2 <= score <= 0.6) != set()
    enter(browser, "score-from", "")
    enter(browser, "score-to", "")
    enter(browser, "text", "PART 1")
    assert set(shown(browser)) == paths(images, lambda _, image: "part 1" in image.path) != set()


def test_order_is_by_score_or_by_name(opened: Callable, tmp_path: Path) -> None:
    page, images = example(tmp_path)
    browser = opened(page)
    scores = {image.path: image.findings["SDP"].score for image in images}
    falling = sorted(scores, key=lambda path: math.inf if math.isnan(scores[path]) else scores[path], reverse=True)
    assert shown(browser) == falling
    choose(browser, "sort", "score, lowest first")
    assert shown(browser) == falling[::-1]
    choose(browser, "sort", "name")
    parts = [path for path in shown(browser) if "part" in path]
    assert parts == [f"line/part {place}.png" for place in range(len(NAMES), 24)], "10 behind 9"


def test_another_model_has_its_own_scores_and_threshold(opened: Callable, tmp_path: Path) -> None:
    page, images = example(tmp_path)
    browser = opened(page)
    enter(browser, "threshold-number", "0.9")
    choose(browser, "model", "PatchCore")
    show(browser, "anomalous")
    assert set(shown(browser)) == paths(images, lambda score, _: score > 0.5, "PatchCore")
    choose(browser, "model", "SDP")
    assert set(shown(browser)) == paths(images, lambda score, _: not score <= 0.9)


def test_judgements_outlive_a_reload_and_are_exported(opened: Callable, browser: Any, tmp_path: Path) -> None:
    page, images = example(tmp_path)
    opened(page)
    wanted = {images[4].path: "OK", images[6].path: "NG"}
    for path, judgement in wanted.items():
        judge(browser, path, judgement)
    browser.refresh()
    assert_judged(browser, "1 OK, 1 NG, 22 not judged")
    choose(browser, "judged", "NG")
    assert shown(browser) == [images[6].path]
    enter(browser, "threshold-number", "0.25")
    browser.find_element("id", "export").click()
    exported = downloaded(browser.downloads)
    assert exported.count("\r\n") == 25
    rows = list(csv.DictReader(exported.splitlines(keepends=True)))
    assert list(rows[0]) == ["path", "category", "score", "threshold", "verdict", "judgement", "truth", "model"]
    found = {row["path"]: row for row in rows}
    for image in images:
        row = found[f"'{image.path}" if image.path.startswith("=") else image.path]
        score = image.findings["SDP"].score
        assert float(row["score"]) == pytest.approx(score, nan_ok=True)
        assert row["verdict"] == ("normal" if score <= 0.25 else "anomalous")
        assert row["judgement"] == wanted.get(image.path, "")
        assert (row["category"], row["truth"]) == (image.category, ("normal", "anomalous")[image.truth])
        assert (row["threshold"], row["model"]) == ("0.25", "SDP")
    browser.find_element("id", "clear").click()
    browser.switch_to.alert.accept()
    assert_judged(browser, "0 OK, 0 NG, 24 not judged")


def test_two_windows_of_a_page_keep_each_others_judgements(opened: Callable, browser: Any, tmp_path: Path) -> None:
    page, images = example(tmp_path)
    opened(page)
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(page.as_uri())
    second = browser.current_window_handle
    for window, image, words in (
        (first, images[4], "1 OK, 0 NG, 23 not judged"),
        (second, images[6], "2 OK, 0 NG, 22 not judged"),
        (first, images[7], "3 OK, 0 NG, 21 not judged"),
    ):
        browser.switch_to.window(window)
        judge(browser, image.path, "OK")
        for seen_in in (first, second):
            browser.switch_to.window(seen_in)
            assert_judged(browser, words)
    browser.close()
    browser.switch_to.window(first)


def test_names_are_text(opened: Callable, tmp_path: Path) -> None:
    page, images = example(tmp_path)
    browser = opened(page)  # an alert would make every further call fail
    assert browser.title == "Cups and nuts"
    assert set(shown(browser)) == {image.path for image in images}
    texts = {card.find_element("class name", "name").get_property("textContent") for card in cards_of(browser)}
    assert '"><img src=x onerror=alert(1)>.png' in texts
    assert not browser.find_elements("css selector", ".card b, .card script, .card img:not(.photo, .heat)")


def test_an_image_is_enlarged_and_keys_lead_through_all(opened: Callable, tmp_path: Path) -> None:
    browser = opened(example(tmp_path)[0])
    order = shown(browser)
    browser.find_elements("class name", "picture")[1].click()
    dialog = browser.find_element("id", "dialog")
    assert dialog.find_element("class name", "path").text == order[1]
    photo, heat = (wait_for(dialog, f".stage .{name}") for name in ("photo", "heat"))
    assert photo.rect == heat.rect, "the heatmap lies on the picture"
    assert photo.rect["width"] / photo.rect["height"] == pytest.approx(120 / 90, rel=0.01)
    dialog.send_keys("\ue014")
    assert dialog.find_element("class name", "path").text == order[2]
    dialog.send_keys("n")
    dialog.send_keys("\ue012\ue012\ue012")  # ends at the first
    assert dialog.find_element("class name", "path").text == order[0]
    dialog.send_keys("h")
    assert wait_for(dialog, ".stage .heat").value_of_css_property("opacity") == "0"
    dialog.send_keys("\ue00c")
    assert not dialog.is_displayed()
    choose(browser, "judged", "NG")
    assert shown(browser) == [order[2]]


def test_metrics_are_sorted_by_a_click(opened: Callable, tmp_path: Path) -> None:
    browser = opened(example(tmp_path)[0])
    name, auroc = browser.find_elements("css selector", "#metrics thead button")

    def models() -> list[str]:
        return [cell.text for cell in browser.find_elements("css selector", "#metrics tbody td:first-child")]

    auroc.click()
    assert models() == ["PatchCore", "SDP", "SDP+"], "highest first, unknown last"
    auroc.click()
    assert models() == ["SDP", "PatchCore", "SDP+"]
    name.click()
    assert models() == ["PatchCore", "SDP", "SDP+"]


def test_a_page_without_ground_truth_has_no_false_alarms(opened: Callable, tmp_path: Path) -> None:
    images = [PageImage(f"{n}.png", "cup", None, {"SDP": Finding(n / 10)}) for n in range(10)]
    browser = opened(write_page(tmp_path, "Cups", images))
    assert (number(browser, "positives"), number(browser, "negatives")) == (4, 6)
    assert [i.get_attribute("value") for i in browser.find_elements("name", "kind")] == ["all", "anomalous", "normal"]


def test_five_thousand_images_stay_usable(opened: Callable, tmp_path: Path) -> None:
    images = many_images(5000)
    browser = opened(write_page(tmp_path, "Many", images))
    milliseconds = browser.execute_script("""
        const start = performance.now(), text = document.getElementById("text");
        text.value = "part_04";
        text.dispatchEvent(new Event("input"));
        document.body.offsetHeight;  // has the browser lay the page out
        return performance.now() - start;""")
    assert milliseconds < 1000  # some 30 here
    assert browser.find_element("id", "shown").text == "1000 of 5000 images"
    choose(browser, "sort", "name")
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    last = '.card[aria-posinset="1000"] .name'
    assert wait_for(browser, last).get_attribute("title") == images[4999].path
    assert len(cards_of(browser)) < 200, "the others are not in the document"

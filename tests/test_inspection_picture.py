"""What a picture of an inspected image shows: nothing cut off, and the same colour for the same value."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from anomalib_clipad.data.verdict import Verdict
from anomalib_clipad.pictures import text
from anomalib_clipad.pictures.heatmap import GROUND_TRUTH, PREDICTED, legend, outline
from anomalib_clipad.pictures.image_file import read_picture
from anomalib_clipad.pictures.inspection import BACKGROUND, BADGES, MARGIN, inspection_picture
from anomalib_clipad.pictures.text import lettering

from .conftest import pixels_of

GREY = Image.new("RGB", (400, 300), (120, 120, 120))
BAD = Verdict("line/nut.png", "nut", score=0.83, threshold=0.5, label=True, p_value=0.04, truth=False)


def panels(picture: Image.Image, image: Image.Image) -> list[np.ndarray]:
    """The parts of a picture that show the image, found by the plain image on the left or on top."""
    whole, part = pixels_of(picture), pixels_of(image)
    height, width = part.shape[:2]
    top = next(y for y in range(len(whole)) if (whole[y : y + height, MARGIN : MARGIN + width] == part).all())
    lefts = range(MARGIN, whole.shape[1] - width, width + 10)
    return [whole[top : top + height, left : left + width] for left in lefts]


def drawn(values: np.ndarray, **arguments: object) -> list[np.ndarray]:
    return panels(inspection_picture(GREY, values, BAD, **arguments), GREY)


def test_the_same_value_has_the_same_colour_whatever_the_rest_of_the_map_is() -> None:
    calm, loud = np.full((30, 40), 0.1), np.full((30, 40), 0.9)
    calm[10:20, 10:20] = loud[10:20, 10:20] = 0.6
    (_, first), (_, second) = drawn(calm), drawn(loud)
    assert (first[150, 150] == second[150, 150]).all()
    assert (first[20, 20] != second[20, 20]).any()


def test_a_normal_image_looks_calm_and_an_anomalous_one_does_not() -> None:
    def away(values: float) -> float:
        image, heat = drawn(np.full((30, 40), values))
        return np.abs(image - heat).mean()

    assert away(0.0) == 0
    assert away(0.2) < 12
    assert away(0.2) < away(0.45) < 35 < away(0.8) < away(1.0)


def test_the_outlines_are_where_the_masks_are() -> None:
    marked, true = np.zeros((30, 40), dtype=bool), np.zeros((30, 40), dtype=bool)
    marked[10:20, 5:15], true[3:9, 20:36] = True, True
    _, heat, truth = drawn(np.zeros((30, 40)), pred_mask=marked, gt_mask=true)
    for panel, colour, mask in ((heat, PREDICTED, marked), (truth, GROUND_TRUTH, true)):
        rows, columns = np.nonzero((panel == colour).all(axis=-1))
        wanted_rows, wanted_columns = np.nonzero(mask)
        box = [10 * wanted_rows.min(), 10 * wanted_columns.min(), 10 * wanted_rows.max(), 10 * wanted_columns.max()]
        found = [rows.min(), columns.min(), rows.max() - 9, columns.max() - 9]
        assert np.abs(np.subtract(box, found)).max() <= 1
        assert (panel[15 * 10, 10 * 10 :: 400] == (120, 120, 120)).all()


def test_an_outline_is_closed_with_a_black_line_around_it() -> None:
    mask, wanted = np.zeros((40, 60), dtype=bool), np.full((40, 60, 3), 255)
    mask[10:30, 15:45] = True
    wanted[8:32, 13:47], wanted[10:30, 15:45], wanted[12:28, 17:43] = 0, GROUND_TRUTH, 255
    drawn = outline(Image.new("RGB", (60, 40), "white"), mask, GROUND_TRUTH)
    np.testing.assert_array_equal(pixels_of(drawn), wanted)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 1.0])
def test_the_legend_marks_the_threshold_where_it_is(threshold: float) -> None:
    marked, plain = (pixels_of(legend(201, value)) for value in (threshold, None))
    assert (plain[12:16] == 255).all()
    assert plain[16:, :10].min() < 100 > plain[16:, -10:].min(), "the ends of the scale"
    line, words = (
        np.flatnonzero((marked[rows] != plain[rows]).any(axis=(0, 2))) for rows in (slice(15), slice(16, 30))
    )
    assert line.tolist() == [200 * threshold]
    assert not marked[:15, line].any()
    assert len(words) > 50
    if threshold == 0.5:
        assert abs(words[0] + words[-1] - 200) <= 4


def test_a_map_that_is_not_a_number_is_grey_and_said() -> None:
    values = np.zeros((30, 40))
    values[:, 20:] = np.nan
    _, heat = drawn(values)
    assert (heat[:, 380:] == heat[0, 399]).all()
    assert heat[0, 399].max() - heat[0, 399].min() <= 2
    assert (heat[0, 399] != heat[0, 0]).any()
    headers = [inspection_picture(GREY, shown, BAD).crop((0, 0, 828, 110)) for shown in (values, np.zeros((30, 40)))]
    assert ImageChops.difference(*headers).getbbox(), "said"
    assert Verdict("a", score=float("nan"), threshold=0.5, label=True).comparison == "score is not a number"


SIZES = [(500, 1270), (1270, 500), (32, 32), (1, 2000), (2000, 1), (576, 768)]
NAMES = ["W" * 300 + ".png", "零件クッキー쿠키" * 30, "two\nlines", "<script>" * 20]


@pytest.mark.parametrize(
    ("size", "name"), [*((size, "nut.png") for size in SIZES), *((size, name) for size in SIZES[:2] for name in NAMES)]
)
def test_nothing_is_cut_off_and_the_image_keeps_its_shape(size: tuple[int, int], name: str, tmp_path: Path) -> None:
    Image.new("RGB", size, (200, 30, 30)).save(tmp_path / "image.png")
    image = read_picture(tmp_path / "image.png", 512)
    assert abs(image.width * size[1] - image.height * size[0]) <= max(size)
    assert max(image.size) <= 512
    verdict = Verdict("a.png", name, 0.5000004, 0.5, label=True, p_value=0.04, truth=False, explanation=name * 9)
    mask = np.ones((8, 8))
    picture = pixels_of(inspection_picture(image, mask, verdict, name, pred_mask=mask, gt_mask=mask))
    border = picture.copy()
    border[MARGIN - 3 : 3 - MARGIN, MARGIN - 3 : 3 - MARGIN] = BACKGROUND
    assert (border == BACKGROUND).all(), "a margin around everything"
    assert (picture == BADGES["anomalous"]).all(axis=-1).sum() > 200
    assert max(picture.shape) < 1900


def test_score_and_threshold_are_told_apart() -> None:
    assert Verdict("a", score=0.50004, threshold=0.5, label=True).comparison == "score 0.50004 > threshold 0.50000"
    assert Verdict("a", score=0.5, threshold=0.5, label=False).comparison == "score 0.500 ≤ threshold 0.500"


def test_letters_that_the_font_lacks_come_from_another_or_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    letter = "\u24b6"  # in a font that comes with matplotlib, and not in the font of the pictures
    words, face = lettering(f"a{letter}", 12)
    assert (words, face.getname()[0]) == ("a\\u24b6", "DejaVu Sans")
    monkeypatch.setattr(text, "FAMILIES", ("STIXGeneral",))
    text._other_files.cache_clear()
    try:
        words, face = lettering(letter, 12)
    finally:
        text._other_files.cache_clear()
    assert (words, face.getname()[0]) == (letter, "STIXGeneral")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16", "F"])
def test_an_image_of_any_kind_looks_as_the_model_sees_it(mode: str, tmp_path: Path) -> None:
    shades = np.tile(np.linspace(0, 255, 320).astype(np.uint8), (240, 1))
    deep = {"I;16": shades.astype(np.uint16) * 257, "F": shades.astype(np.float32) / 255}
    image = (
        Image.fromarray(deep[mode])
        if mode in deep
        else Image.fromarray(shades).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    )
    image.save(tmp_path / "image.tiff")
    shown = pixels_of(read_picture(tmp_path / "image.tiff", 512))
    assert shown.shape == (240, 320, 3)
    assert np.abs(shown - shades[:, :, None]).max() <= 1


def test_an_image_without_a_score_is_compared_with_nothing() -> None:
    verdict = Verdict("a.png", label=True)
    assert verdict.comparison is None
    assert inspection_picture(Image.new("RGB", (64, 48)), None, verdict, "a.png").width >= 64

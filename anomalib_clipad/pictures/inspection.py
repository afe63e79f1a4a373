"""The picture of one inspected image: image, heatmap and ground truth side by side, under what is said of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anomalib_clipad.data.verdict import Verdict
from anomalib_clipad.pictures.heatmap import GROUND_TRUTH, THRESHOLD, dimmed, legend, outline, overlay
from anomalib_clipad.pictures.text import fitted, font, lettering, wrapped

MARGIN, GAP = 14, 10
NARROWEST, NARROWEST_PANEL = 440, 201  # pixels: room for legend and words beside slim images
STACKED = 1.5  # images this much wider than high stand above each other
LINES = 5  # of the explanation
BACKGROUND, INK, FAINT = (255, 255, 255), (20, 20, 20), (95, 95, 95)
# Told apart by colour-blind readers, too, after Okabe and Ito; dark enough for white letters.
BADGES = {"normal": (0, 105, 165), "anomalous": (184, 74, 0)}
MISTAKES = {True: "false alarm", False: "missed"}  # by label


@dataclass(frozen=True)
class _Piece:
    """A piece of text at its place; with a badge behind it, in white."""

    x: int
    y: int
    words: str
    face: ImageFont.FreeTypeFont
    colour: tuple[int, int, int]
    badge: tuple[int, int, int] | None = None


def inspection_picture(
    image: Image.Image,
    anomaly_map: np.ndarray | None,
    verdict: Verdict,
    name: str | None = None,
    pred_mask: np.ndarray | None = None,
    gt_mask: np.ndarray | None = None,
    map_threshold: float | None = THRESHOLD,
    region: np.ndarray | None = None,
) -> Image.Image:
    """Draw what is known of one image.

    Args:
        image: Of the size in which it is shown.
        anomaly_map: (H, W) in [0, 1], drawn on the fixed scale; not finite values are grey.
        verdict: What the header says.
        name: What the image is called; the name of its file by default.
        pred_mask: (H, W), true where marked; its outline is drawn on the heatmap.
        gt_mask: (H, W), true where anomalous; its outline is drawn on the image, if it has any.
        map_threshold: Where the legend marks the threshold of the mask; None for none.
        region: (H, W), true where the image was looked at; the rest is pale. None for everywhere.

    Returns:
        A picture of mode ``RGB``, whose outermost pixels are background.

    Example:
        >>> verdict = Verdict("nut.png", "nut", score=0.7, threshold=0.5, label=True)
        >>> drawn = inspection_picture(Image.new("RGB", (300, 200)), np.zeros((8, 8)), verdict, pred_mask=np.eye(8))
        >>> drawn.size, drawn.getpixel((0, 0))
        ((638, 366), (255, 255, 255))
    """
    if region is not None:
        image = dimmed(image, region)
    panels = list(_panels(image, anomaly_map, pred_mask, gt_mask))
    stacked = image.width > STACKED * image.height
    cell = max(image.width, NARROWEST_PANEL)
    content = cell if stacked else len(panels) * cell + (len(panels) - 1) * GAP
    content = max(content, NARROWEST - 2 * MARGIN)
    facts = list(_facts(verdict))
    if anomaly_map is not None and not np.isfinite(anomaly_map).all():
        facts.append("grey: the map is not a number")
    if region is not None:
        facts.append("pale: outside of the region")
    pieces, y = _header(name or Path(verdict.path).name, verdict, facts, content)

    pasted = []
    title = font(12)
    title_height = 18
    for number, (words, panel) in enumerate(panels):
        x = MARGIN + (0 if stacked else number * (cell + GAP))
        top = y + (number * (title_height + image.height + GAP) if stacked else 0)
        pieces.append(_Piece(x, top, fitted(words, title, content if stacked else cell), title, FAINT))
        pasted.append((panel, (x, top + title_height)))
    y = pasted[-1][1][1] + image.height + GAP
    if anomaly_map is not None:
        scale = legend(min(360, content), map_threshold)
        pasted.append((scale, (MARGIN, y)))
        y += scale.height
    else:
        y -= GAP

    picture = Image.new("RGB", (content + 2 * MARGIN, y + MARGIN), BACKGROUND)
    for part, place in pasted:
        picture.paste(part, place)
    draw = ImageDraw.Draw(picture)
    for piece in pieces:
        if piece.badge is not None:
            length = piece.face.getlength(piece.words)
            draw.rounded_rectangle((piece.x - 8, piece.y - 3, piece.x + length + 7, piece.y + 19), 4, piece.badge)
        draw.text((piece.x, piece.y), piece.words, piece.colour, piece.face, anchor="la")
    return picture


def _panels(
    image: Image.Image, anomaly_map: np.ndarray | None, pred_mask: np.ndarray | None, gt_mask: np.ndarray | None
) -> Iterator[tuple[str, Image.Image]]:
    yield "image", image
    if anomaly_map is not None:
        heat = overlay(image, anomaly_map)
        if pred_mask is not None and np.any(pred_mask):
            yield "heatmap, marked area outlined", outline(heat, pred_mask)
        else:
            yield "heatmap", heat
    if gt_mask is not None and np.any(gt_mask):
        yield "ground truth", outline(image, gt_mask, GROUND_TRUTH)


def _facts(verdict: Verdict) -> Iterator[str]:
    if verdict.comparison is not None:
        yield verdict.comparison
    if verdict.p_value is not None:
        yield f"p-value {verdict.p_value:.2g}"
    if verdict.truth is not None:
        truth = f"ground truth: {verdict.true_word}"
        if verdict.right is None:
            yield truth
        else:
            yield f"right, {truth}" if verdict.right else f"wrong ({MISTAKES[bool(verdict.label)]}), {truth}"


def _header(name: str, verdict: Verdict, facts: list[str], width: int) -> tuple[list[_Piece], int]:
    """The pieces of text above the images, and where the images begin."""
    pieces, y = [], MARGIN
    words, face = lettering(name, 17)
    pieces.append(_Piece(MARGIN, y, fitted(words, face, width), face, INK))
    y += 26
    if verdict.class_name:
        words, face = lettering(f"class: {verdict.class_name}", 13)
        pieces.append(_Piece(MARGIN, y, fitted(words, face, width), face, FAINT))
        y += 22
    x, face = MARGIN, font(14)
    if verdict.word is not None:
        pieces.append(_Piece(x + 8, y + 3, verdict.word, face, BACKGROUND, BADGES[verdict.word]))
        x += round(face.getlength(verdict.word)) + 16 + GAP
    for fact in facts:
        length = round(face.getlength(fact))
        if x > MARGIN and x + length > MARGIN + width:
            x, y = MARGIN, y + 26
        pieces.append(_Piece(x, y + 3, fitted(fact, face, width), face, INK))
        x += length + 2 * GAP
    if x > MARGIN:
        y += 28
    if verdict.explanation:
        words, face = lettering(verdict.explanation, 13)
        for line in wrapped(words, face, width, LINES):
            pieces.append(_Piece(MARGIN, y, line, face, INK))
            y += 19
        y += 4
    return pieces, y + 4

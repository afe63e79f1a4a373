"""Text in pictures, tables and on the screen: one line, of a width that is there, in letters that the font has."""

from contextlib import suppress
from functools import cache
from pathlib import Path

import matplotlib as mpl
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

# Fonts of the usual systems with the letters of East Asia, which the font of the pictures has not.
FAMILIES = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("Droid Sans Fallback", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Hiragino Sans", "PingFang SC"),
    *("Arial Unicode MS", "Unifont"),
)


def printable(text: str) -> str:
    r"""A text that any screen, table and picture takes: one line, without control characters or broken bytes.

    Example:
        >>> printable("metal nut"), printable("two\nlines")
        ('metal nut', 'two\\nlines')
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, length: int = 40) -> str:
    """A text with its middle left out where it is longer than ``length``.

    Example:
        >>> shortened("a" * 300, 9)
        'aaaa…aaaa'
    """
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all pictures: matplotlib's own DejaVu Sans, which is on every machine and has most scripts' letters.

    Example:
        >>> font(12).getname()[0]
        'DejaVu Sans'
    """
    return ImageFont.truetype(str(_own_file()), size)


def lettering(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    r"""A text as it can be drawn, and the font for it.

    Args:
        text: Any text.
        size: Of the letters, in pixels.

    Returns:
        The text as :func:`printable` gives it, in the font of all pictures, or in one of the system's if that has more
        of its letters. Letters that the font lacks are escaped.

    Example:
        >>> lettering("metal nut", 12)[0], lettering("\ue000", 12)[0]
        ('metal nut', '\\ue000')
    """
    words = printable(text)
    letters = frozenset(map(ord, words))
    file = _own_file()
    if letters - _letters_of(file):
        file = min((file, *_other_files()), key=lambda other: len(letters - _letters_of(other)))
    known = _letters_of(file)
    drawn = "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in words)
    return drawn, font(size) if file == _own_file() else _font_of(file, size)


def fitted(text: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    """A text with as much of its middle left out as a width demands.

    Args:
        text: One line.
        face: The font in which it is drawn.
        width: In pixels.

    Example:
        >>> fitted("short", font(12), 100), fitted("a" * 300, font(12), 60)
        ('short', 'aaa…aaa')
    """
    if face.getlength(text) <= width:
        return text
    fits, too_long = 1, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if face.getlength(shortened(text, middle)) <= width:
            fits = middle
        else:
            too_long = middle
    return shortened(text, fits)


def wrapped(text: str, face: ImageFont.FreeTypeFont, width: float, most: int) -> list[str]:
    """A text in lines of at most a width, broken at spaces where there are any.

    Args:
        text: One line.
        face: The font in which it is drawn.
        width: In pixels.
        most: Number of lines; the last one says by an ellipsis that there is more.

    Example:
        >>> wrapped("a scratch on the left", font(12), 70, most=3)
        ['a scratch', 'on the left']
    """
    lines: list[str] = []
    rest = text.strip()
    while rest:
        if len(lines) == most - 1 or face.getlength(rest) <= width:
            lines.append(rest if face.getlength(rest) <= width else _cut(rest, face, width))
            break
        end = _prefix(rest, face, width)
        space = rest.rfind(" ", 1, end + 1)
        end = space if space > 0 else end
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return lines


def _prefix(text: str, face: ImageFont.FreeTypeFont, width: float) -> int:
    """Number of letters that fit, at least one."""
    fits, too_long = 1, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if face.getlength(text[:middle]) <= width:
            fits = middle
        else:
            too_long = middle
    return fits


def _cut(text: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    return text[: _prefix(text, face, width - face.getlength("…"))].rstrip() + "…"


def _own_file() -> Path:
    return Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _other_files() -> tuple[Path, ...]:
    from matplotlib import font_manager  # which looks through the system's fonts when it is imported

    files = []
    for family in FAMILIES:
        with suppress(ValueError):  # not there
            files.append(Path(font_manager.findfont(family, fallback_to_default=False)))
    return tuple(files)


@cache
def _letters_of(file: Path) -> frozenset[int]:
    return frozenset(FT2Font(str(file)).get_charmap())


@cache
def _font_of(file: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(file), size)

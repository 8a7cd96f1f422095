"""Words in pictures: fonts, lines that fit a width, the colours of ink and paper."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

INK, SOFT, HAIRLINE, PAPER = (34, 34, 38), (120, 120, 128), (218, 218, 222), (255, 255, 255)
LABEL, NOTE, TITLE = 19, 15, 24  # font sizes
OTHER_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf", "Arial.ttf")


@cache
def font_of(size: int, other: bool = False) -> Any:
    """Pillow's own font; `other`: one of the system's with more letters, None if there is none."""
    if not other:
        return ImageFont.load_default(size)
    for name in OTHER_FONTS:
        try:
            return ImageFont.truetype(name, round(size * 0.92))
        except OSError:
            continue
    return None


@cache
def _drawable(character: str) -> bool:
    """Whether Pillow's own font, which holds little more than ASCII, has a glyph for it."""
    font = font_of(20)
    return character.isascii() or bytes(font.getmask(character)) != bytes(font.getmask("\ue123"))


def font_for(text: str, size: int) -> tuple[str, Any]:
    """The text and a font that can draw it; where none is found, accents go and other letters become "?"."""
    if all(map(_drawable, text)):
        return text, font_of(size)
    if other := font_of(size, other=True):
        return text, other
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if _drawable(c) else "?" for c in plain), font_of(size)


def line_height(font: Any) -> int:
    """Pixels from the top of an ascender to the bottom of a descender."""
    ascent, descent = font.getmetrics()
    return ascent + descent


def paragraph(text: str, size: int, color: tuple[int, int, int], width: int, *, most: int = 2) -> Image.Image:
    """Text in lines of at most `width` pixels, no more than `most`, the rest an ellipsis."""
    rest, font = font_for(" ".join(text.split()), size)
    lines: list[str] = []
    while rest and len(lines) < most:
        cut = min(len(rest), width // 2)  # no letter is narrower than two pixels
        while cut > 1 and font.getlength(rest[:cut]) > width:
            blank = rest.rfind(" ", 1, cut)
            cut = blank if blank > 0 else cut - 1
        lines.append(rest[:cut].strip())
        rest = rest[cut:].strip()
    if rest:
        last = f"{lines[-1]} {rest[: width // 2]}"
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + "…"
    pitch = line_height(font) + 2
    image = Image.new("RGB", (width, max(1, len(lines)) * pitch), PAPER)
    draw = ImageDraw.Draw(image)
    for number_, line in enumerate(lines):
        draw.text((0, number_ * pitch), line, color, font)
    return image

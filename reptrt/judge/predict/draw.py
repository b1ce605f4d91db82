"""Draw what a network finds on its image: boxes with names and scores, or a list of classes.

Small images are enlarged first, so that text can be read on an image of any size. The colour of a
class depends on its number alone. The palette is that of Okabe and Ito (Color Universal Design),
whose colours people with any form of colour vision can tell apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]  # x1 y1 x2 y2

PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # bluish green
    (240, 228, 66),  # yellow
    (0, 114, 178),  # blue
    (213, 94, 0),  # vermilion
    (204, 121, 167),  # reddish purple
)
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_LONG_SIDE = 640  # pixels: smaller images are enlarged by a whole factor, to about this
_TEXT = 0.022  # height of letters, of the mean of width and height
_LINE = 0.003  # width of a line, of the same
_SMALLEST_TEXT = 12  # pixels
_PADDING = 0.25  # around a text, of its height
_BRIGHT = 140  # on brighter colours text is black


@dataclass(frozen=True, slots=True)
class Mark:
    """One box of a picture."""

    box: Rectangle  # in pixels of the image
    text: str
    index: int  # of the class


@dataclass(frozen=True, slots=True)
class Bar:
    """One line below a picture."""

    text: str
    part: float  # 0..1
    index: int  # of the class


def colour_of(index: int) -> Colour:
    """Return the colour of a class: the palette, then lighter, then darker, then again."""
    colour = PALETTE[index % len(PALETTE)]
    shade = index // len(PALETTE) % 3
    return colour if shade == 0 else _mixed(colour, _WHITE if shade == 1 else _BLACK)


def draw_boxes(image: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """Return an image with boxes and their texts, the first mark on top.

    A text stands where it covers least of the other texts: above its box, below it, or inside.
    """
    picture, factor = _enlarged(image)
    pen = ImageDraw.Draw(picture)
    font, line = _font_of(picture), _line_of(picture)
    boxes = [tuple(factor * side for side in mark.box) for mark in marks]
    for mark, box in reversed(list(zip(marks, boxes, strict=True))):
        _outline(pen, box, colour_of(mark.index), line)
    placed: list[Rectangle] = []
    for mark, box in zip(marks, boxes, strict=True):
        place = _place(pen, picture.size, box, mark.text, font, placed)
        placed.append(place)
    for mark, place in reversed(list(zip(marks, placed, strict=True))):
        _write(pen, place, mark.text, font, colour_of(mark.index))
    return picture


def draw_classes(image: Image.Image, bars: Sequence[Bar]) -> Image.Image:
    """Return an image with a list of classes below it, each with a bar as long as its part."""
    picture, _ = _enlarged(image)
    font = _font_of(picture)
    pen = ImageDraw.Draw(picture)
    height = _height(font) + 2 * _padding(font)
    wide = max([pen.textlength(bar.text, font=font) for bar in bars], default=0.0)
    width = max(picture.width, math.ceil(wide + 2 * _padding(font)))
    sheet = Image.new("RGB", (width, picture.height + math.ceil(height * len(bars))), _WHITE)
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(sheet)
    for row, bar in enumerate(bars):
        top = picture.height + row * height
        end = round(bar.part * width)
        if end > 0:
            pen.rectangle(
                (0, top, end - 1, top + height - 2), fill=_mixed(colour_of(bar.index), _WHITE)
            )
        middle = top + height / 2
        pen.text((_padding(font), middle), bar.text, fill=_BLACK, font=font, anchor="lm")
    return sheet


def _enlarged(image: Image.Image) -> tuple[Image.Image, int]:
    """Return a copy in RGB, enlarged by a whole factor if it is small, and the factor."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns when such an image goes straight to RGB
    picture = image.convert("RGB")
    factor = max(1, round(_LONG_SIDE / max(picture.size)))
    size = (factor * picture.width, factor * picture.height)
    return picture.resize(size, Image.Resampling.BICUBIC) if factor > 1 else picture, factor


def _font_of(picture: Image.Image) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(_SMALLEST_TEXT, round(_TEXT * sum(picture.size) / 2)))


def _line_of(picture: Image.Image) -> int:
    return max(2, round(_LINE * sum(picture.size) / 2))


def _height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> float:
    _, top, _, bottom = font.getbbox("Ag")
    return bottom - top


def _padding(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> float:
    return math.ceil(_PADDING * _height(font))


def _outline(pen: ImageDraw.ImageDraw, box: Sequence[float], colour: Colour, line: int) -> None:
    """Draw a box whose thin dark edge sets it off from any background."""
    x1, y1, x2, y2 = box
    x2, y2 = max(x1, x2), max(y1, y2)
    pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_BLACK, width=line + 2)
    pen.rectangle((x1, y1, x2, y2), outline=colour, width=line)


def _place(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: Sequence[float],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    taken: Sequence[Rectangle],
) -> Rectangle:
    """Return where a text stands: the first of the places that covers least of those taken."""
    padding = _padding(font)
    width, height = pen.textlength(text, font=font) + 2 * padding, _height(font) + 2 * padding
    x1, y1, x2, y2 = box
    corners = [
        (x1, y1 - height),  # above
        (x1, y2),  # below
        (x1, y1),  # inside, at the top
        (x1, y2 - height),
        (x2 - width, y1 - height),
        (x2 - width, y2),
    ]
    places = [_inside(size, left, top, width, height) for left, top in corners]
    outside = [abs(p[1] - top) for p, (_, top) in zip(places, corners, strict=True)]
    covered = [
        sum(_shared(place, other) for other in taken) + width * moved
        for place, moved in zip(places, outside, strict=True)
    ]
    return places[covered.index(min(covered))]


def _inside(
    size: tuple[int, int], left: float, top: float, width: float, height: float
) -> Rectangle:
    """Return a rectangle moved into the picture."""
    left = max(0.0, min(left, size[0] - width))
    top = max(0.0, min(top, size[1] - height))
    return left, top, left + width, top + height


def _shared(first: Rectangle, second: Rectangle) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)


def _write(
    pen: ImageDraw.ImageDraw,
    place: Rectangle,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    colour: Colour,
) -> None:
    left, top, right, bottom = place
    pen.rectangle((left, top, right - 1, bottom - 1), fill=colour)
    red, green, blue = colour
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > _BRIGHT
    at = (left + _padding(font), (top + bottom) / 2)
    pen.text(at, text, fill=_BLACK if bright else _WHITE, font=font, anchor="lm")


def _mixed(first: Colour, second: Colour) -> Colour:
    """Return the mean of two colours."""
    red, green, blue = ((a + b) // 2 for a, b in zip(first, second, strict=True))
    return red, green, blue

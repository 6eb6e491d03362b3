"""Read pictures of any common kind as RGB, and write masks and overlays. Needs Pillow."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from fastdeeplab.atomic import replace_when_complete
from fastdeeplab.palettes import Palette

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # Pillow's other decoders never see a file
LEGEND_ENTRIES = 40  # an overlay names this many classes at most


class PictureError(ValueError):
    """A picture that can't be segmented; the message names it and says why."""


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture file as an RGB image, turned as its EXIF orientation says; the first frame if it has several.

    See `to_rgb` for how other kinds of pixels become RGB. Colour profiles are not applied.

    Raises PictureError if the file can't be read whole: it is missing, empty, cut off, not a picture in one of
    `FORMATS`, or has more pixels than Pillow's limit against decompression bombs, ``PIL.Image.MAX_IMAGE_PIXELS``
    (Pillow itself only warns up to twice the limit).
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ValueError("is a folder, not a picture")
        if path.exists() and not path.is_file():
            raise ValueError("is not a regular file")
        if path.stat().st_size == 0:
            raise ValueError("is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return to_rgb(image)
    except Exception as error:  # a decoder meets damaged bytes with any kind of exception
        raise PictureError(f"{path}: {_reason(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says and convert it to RGB.

    Transparent pixels show the white behind them. 16-bit grey is scaled, 0 to 65535 becoming 0 to 255; so are
    32-bit integers in that range, and floats from 0 to 1. Palette, CMYK, LAB, YCbCr, grey and 1-bit images are
    converted by Pillow.

    Raises ValueError for 32-bit integers or floats outside those ranges, as nothing says what white is there.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _grey(image, white=65535)
    elif image.mode == "F":
        image = _grey(image, white=1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey(image: Image.Image, white: int) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    if not (values.min() >= 0 and values.max() <= white):  # NaN fails as well
        raise ValueError(f"has grey values outside 0 to {white}, such as {values.min():g} or {values.max():g}")
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit against decompression bombs"
    if isinstance(error, UnidentifiedImageError):
        return f"is not a picture in one of the formats {', '.join(FORMATS)}"
    if isinstance(error, MemoryError):
        return "not enough memory to read it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def write_mask(
    path: str | os.PathLike[str], mask: NDArray[np.integer], palette: Palette, text: Mapping[str, str] | None = None
) -> None:
    """Write class indices as a PNG whose pixel values are the indices; `text` goes into its metadata.

    Up to 256 classes it is a palette PNG in the colours of `palette`, above that 16-bit grey.

    Args:
        mask: (H, W) indices below ``len(palette)``, which is 65536 at most.

    Raises ValueError if the mask is not that, OSError if the file can't be written; then none is left under `path`.
    """
    if mask.ndim != 2 or mask.size == 0 or mask.min() < 0 or mask.max() >= len(palette):
        raise ValueError(f"mask must be (H, W) with indices below {len(palette)}, got shape {mask.shape}")
    if len(palette) > 65536:
        raise ValueError(f"a PNG holds 65536 classes at most, got {len(palette)}")
    if len(palette) <= 256:
        image = Image.fromarray(mask.astype(np.uint8))
        image.putpalette([value for color in palette.colors for value in color])
    else:
        image = Image.fromarray(mask.astype(np.uint16))
    _write_png(path, image, text)


def write_overlay(
    path: str | os.PathLike[str],
    picture: Image.Image,
    mask: NDArray[np.integer],
    palette: Palette,
    *,
    opacity: float = 0.5,
    text: Mapping[str, str] | None = None,
) -> None:
    """Write `draw_overlay`'s image as a PNG; `text` goes into its metadata."""
    _write_png(path, draw_overlay(picture, mask, palette, opacity=opacity), text)


def draw_overlay(
    picture: Image.Image, mask: NDArray[np.integer], palette: Palette, *, opacity: float = 0.5
) -> Image.Image:
    """Lay the mask's colours over an RGB picture, with a legend of the classes found in a strip below it.

    The picture keeps its size and place in the upper left corner; a picture that is narrower than the legend gets a
    white margin on its right. Pixels of the palette's background class keep the picture's colours.

    Args:
        mask: (H, W) class indices for the picture's H x W pixels.
        opacity: from 0 (the picture) to 1 (the mask's colours).
    """
    if mask.shape != (picture.height, picture.width):
        raise ValueError(f"mask must be {(picture.height, picture.width)} like the picture, got {mask.shape}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be from 0 to 1, got {opacity}")
    colors = np.array(palette.colors, dtype=np.uint8)[mask]
    overlay = Image.blend(picture, Image.fromarray(colors), opacity)
    if palette.background is not None:
        overlay.paste(picture, mask=Image.fromarray(mask == palette.background))
    legend = _draw_legend(shares(mask), palette, picture.size)

    page = Image.new("RGB", (max(overlay.width, legend.width), overlay.height + legend.height), "white")
    page.paste(overlay, (0, 0))
    page.paste(legend, (0, overlay.height))
    return page


def shares(mask: NDArray[np.integer]) -> dict[int, float]:
    """The classes found in a mask and their shares of its pixels, the largest first."""
    classes, counts = np.unique(mask, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {int(classes[i]): float(counts[i] / mask.size) for i in order}


def percent(share: float) -> str:
    return "<0.1%" if share < 0.0005 else f"{share:.1%}"


def _draw_legend(found: Mapping[int, float], palette: Palette, picture_size: tuple[int, int]) -> Image.Image:
    """A white strip of colour swatches and class names in columns; the letters grow with the picture."""
    width, height = picture_size
    size = max(14, round((width * height) ** 0.5 / 36))
    font = ImageFont.load_default(size)
    named = list(found.items())[:LEGEND_ENTRIES]
    entries: list[tuple[int | None, str]] = [
        (index, f"{palette.classes[index]} {percent(share)}") for index, share in named
    ]
    if len(found) > len(named):
        entries.append((None, f"and {len(found) - len(named)} more"))

    gap = size // 2
    swatch = size
    cell_width = max(swatch + gap + round(font.getlength(text)) for _, text in entries) + 2 * gap
    cell_height = round(size * 1.6)
    columns = max(1, (width - gap) // cell_width)
    rows = -(-len(entries) // columns)
    legend = Image.new("RGB", (gap + cell_width * min(columns, len(entries)), cell_height * rows + gap), "white")
    draw = ImageDraw.Draw(legend)
    for number, (index, text) in enumerate(entries):
        x = gap + cell_width * (number % columns)
        y = gap // 2 + cell_height * (number // columns) + cell_height // 2  # the line's middle
        if index is not None:
            color = "white" if index == palette.background else palette.colors[index]
            box = (x, y - swatch // 2, x + swatch, y + swatch // 2)
            draw.rectangle(box, fill=color, outline="black", width=max(1, size // 14))
        draw.text((x + swatch + gap, y), text, fill="black", font=font, anchor="lm")
    return legend


def _write_png(path: str | os.PathLike[str], image: Image.Image, text: Mapping[str, str] | None) -> None:
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in (text or {}).items():
        chunks.add_text(keyword, value)
    with replace_when_complete(path) as partial:
        image.save(partial, format="PNG", pnginfo=chunks)

"""Pictures of every kind read as RGB, bad ones refused with their reason; masks and overlays written."""

import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fastdeeplab.palettes import PALETTES, generated_palette
from fastdeeplab.pictures import PictureError, draw_overlay, read_picture, shares, write_mask, write_overlay

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def photograph(width: int = 40, height: int = 30) -> Image.Image:
    """Noise, so that a file of it is long enough to be cut."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp", "gif", "jpg"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{suffix}"
    Image.new("RGB", (40, 30), GREEN).save(path, **({"lossless": True} if suffix == "webp" else {}))
    picture = read_picture(path)
    assert (picture.mode, picture.size) == ("RGB", (40, 30))
    np.testing.assert_allclose(np.asarray(picture, dtype=int)[15, 20], GREEN, atol=2)  # JPEG rounds


def test_a_phone_picture_with_a_second_frame(tmp_path: Path) -> None:
    photograph().save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[photograph(20, 20)])
    assert read_picture(tmp_path / "phone.jpg").size == (40, 30)


def test_formats_outside_the_list_are_refused(tmp_path: Path) -> None:
    photograph().save(tmp_path / "picture.ico")
    with pytest.raises(PictureError, match=r"picture\.ico: is not a picture in one of the formats JPEG, PNG"):
        read_picture(tmp_path / "picture.ico")


def test_fault_17_sixteen_bits(tmp_path: Path) -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.asarray(read_picture(tmp_path / name))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_fault_17_sixteen_bits_big_endian(tmp_path: Path) -> None:
    (tmp_path / "grey.pgm").write_bytes(b"P5 2 1 65535 " + struct.pack(">2H", 65535, 32768))
    assert np.asarray(read_picture(tmp_path / "grey.pgm"))[0, :, 0].tolist() == [255, 128]


def test_fault_17_integers_and_floats_without_a_known_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "long.tif")
    with pytest.raises(PictureError, match=r"long\.tif: has grey values outside 0 to 65535, such as 0 or 70000"):
        read_picture(tmp_path / "long.tif")
    for value in (2.0, np.nan):
        Image.fromarray(np.array([[0, value]], dtype=np.float32)).save(tmp_path / "float.tif")
        with pytest.raises(PictureError, match=r"float\.tif: has grey values outside 0 to 1"):
            read_picture(tmp_path / "float.tif")


def test_fault_17_floats_from_0_to_1(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)).save(tmp_path / "float.tif")
    assert np.asarray(read_picture(tmp_path / "float.tif"))[0, :, 1].tolist() == [0, 128, 255]


def test_fault_17_palette(tmp_path: Path) -> None:
    image = Image.new("P", (3, 2), 1)
    image.putpalette([*RED, *GREEN, *BLUE])
    image.save(tmp_path / "palette.png")
    assert read_picture(tmp_path / "palette.png").getpixel((0, 0)) == GREEN


def test_fault_17_palette_with_transparency_shows_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    image.putpalette([*RED, *GREEN])
    image.save(tmp_path / "palette.png", transparency=1)
    assert np.asarray(read_picture(tmp_path / "palette.png"))[0].tolist() == [list(RED), [255, 255, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_fault_17_alpha_shows_white(mode: str, tmp_path: Path) -> None:
    Image.new("RGBA", (3, 2), (0, 0, 0, 0)).convert(mode).save(tmp_path / "alpha.png")
    assert read_picture(tmp_path / "alpha.png").getpixel((0, 0)) == (255, 255, 255)


def test_fault_17_half_transparent(tmp_path: Path) -> None:
    Image.new("RGBA", (3, 2), (*RED, 51)).save(tmp_path / "alpha.png")
    assert read_picture(tmp_path / "alpha.png").getpixel((0, 0)) == (255, 204, 204)


def test_fault_17_cmyk(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), BLUE).convert("CMYK").save(tmp_path / "press.jpg", quality=100)
    np.testing.assert_allclose(read_picture(tmp_path / "press.jpg").getpixel((8, 8)), BLUE, atol=3)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_fault_17_grey(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (3, 2), 1 if mode == "1" else 200).save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png").getpixel((0, 0)) == ((255,) * 3 if mode == "1" else (200,) * 3)


# Where the picture's red left half lies after each orientation is applied.
@pytest.mark.parametrize(
    ("orientation", "size", "red"),
    [
        (1, (40, 30), "left"),
        (2, (40, 30), "right"),
        (3, (40, 30), "right"),
        (4, (40, 30), "left"),
        (5, (30, 40), "top"),
        (6, (30, 40), "top"),
        (7, (30, 40), "bottom"),
        (8, (30, 40), "bottom"),
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_fault_17_exif_orientation(
    orientation: int, size: tuple[int, int], red: str, suffix: str, tmp_path: Path
) -> None:
    image = Image.new("RGB", (40, 30), BLUE)
    image.paste(RED, (0, 0, 20, 30))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"turned.{suffix}", exif=exif)

    picture = read_picture(tmp_path / f"turned.{suffix}")
    assert picture.size == size
    width, height = size
    middle = {"left": (2, height // 2), "right": (width - 3, height // 2), "top": (15, 2), "bottom": (15, height - 3)}
    np.testing.assert_allclose(picture.getpixel(middle[red]), RED, atol=5)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp", "ppm"])
def test_fault_17_truncated(suffix: str, tmp_path: Path) -> None:
    photograph().save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    for length in (3, len(data) // 2, len(data) * 9 // 10):
        cut.write_bytes(data[:length])
        with pytest.raises(PictureError, match=rf"cut\.{suffix}: "):
            read_picture(cut)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_fault_17_zero_bytes(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(PictureError, match=r"empty\.jpg: is empty"):
        read_picture(tmp_path / "empty.jpg")


def test_fault_17_not_a_picture(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("These are notes, not a picture.")
    with pytest.raises(PictureError, match=r"notes\.jpg: is not a picture"):
        read_picture(tmp_path / "notes.jpg")


def test_fault_17_a_directory(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="is a folder, not a picture"):
        read_picture(tmp_path)


def test_fault_17_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"absent\.png: No such file"):
        read_picture(tmp_path / "absent.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_fault_17_a_pipe_that_nobody_writes_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(PictureError, match=r"pipe\.jpg: is not a regular file"):
        read_picture(tmp_path / "pipe.jpg")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no POSIX permissions")
def test_fault_17_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "private.png"
    photograph().save(path)
    read_picture(path)  # so that every module is loaded before the permissions are dropped
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # permissions do not bind root
    try:
        with pytest.raises(PictureError, match=r"private\.png: Permission denied"):
            read_picture(path)
    finally:
        if root:
            os.seteuid(0)


def png_header_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 60_000], ids=["above the limit", "above twice the limit"])
def test_fault_17_decompression_bomb(side: int, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header_of(side, side))
    with pytest.raises(PictureError, match=r"bomb\.png: has more than 89,478,485 pixels"):
        read_picture(tmp_path / "bomb.png")


def test_fault_12_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), RED).save(tmp_path / "dot.png")
    assert read_picture(tmp_path / "dot.png").size == (1, 1)


def indices(num_classes: int, height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, num_classes, (height, width))


@pytest.mark.parametrize("num_classes", [1, 2, 3, 16, 17, 19, 21, 150, 255, 256])
def test_fault_12_mask_in_palette_png_has_the_class_indices(num_classes: int, tmp_path: Path) -> None:
    mask = indices(num_classes).astype(np.uint8)
    palette = generated_palette(num_classes)
    write_mask(tmp_path / "mask.png", mask, palette, {"Note": "kept"})
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        assert image.info["Note"] == "kept"
        np.testing.assert_array_equal(np.asarray(image), mask)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.array(palette.colors)[mask])


@pytest.mark.parametrize("num_classes", [257, 1000, 65536])
def test_fault_12_mask_of_more_than_256_classes_is_16_bit_grey(num_classes: int, tmp_path: Path) -> None:
    mask = indices(num_classes)
    write_mask(tmp_path / "mask.png", mask, generated_palette(num_classes))
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(image), mask)


@pytest.mark.parametrize("mask", [np.full((2, 2), 21), np.full((2, 2), -1), np.zeros((2, 2, 1), int), np.zeros((0, 2))])
def test_masks_that_are_none(mask: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mask must be \(H, W\) with indices below 21"):
        write_mask(tmp_path / "mask.png", mask, PALETTES["voc"])
    assert not list(tmp_path.iterdir())


def test_overlay_blends_all_but_the_background() -> None:
    picture = Image.new("RGB", (200, 100), (100, 100, 100))
    mask = np.zeros((100, 200), np.uint8)
    mask[:, 100:] = 15
    overlay = draw_overlay(picture, mask, PALETTES["voc"], opacity=0.25)
    assert overlay.getpixel((50, 50)) == (100, 100, 100)
    np.testing.assert_allclose(overlay.getpixel((150, 50)), [123, 107, 107], atol=1)
    assert overlay.width == 200
    assert overlay.height > 100
    strip = np.asarray(overlay)[100:]
    assert (strip == PALETTES["voc"].colors[15]).all(axis=-1).sum() > 100  # a swatch
    assert (strip < 50).all(axis=-1).sum() > 100  # letters


@pytest.mark.parametrize("size", [(1, 1), (8, 300), (300, 8), (1500, 1200)])
def test_fault_13_overlay_of_any_size_has_a_whole_legend(size: tuple[int, int]) -> None:
    width, height = size
    mask = np.zeros((height, width), np.uint8)
    overlay = draw_overlay(Image.new("RGB", size), mask, PALETTES["ade20k"])
    strip = np.asarray(overlay)[height:]
    assert overlay.width >= max(width, 80)
    assert len(strip) >= 22
    assert (strip[:, -1] == 255).all()  # nothing runs over the right edge
    assert (strip < 50).all(axis=-1).any()


def test_overlay_of_hundreds_of_classes_names_the_largest() -> None:
    mask = np.arange(1000).reshape(20, 50)
    overlay = draw_overlay(Image.new("RGB", (50, 20)), mask, generated_palette(1000))
    assert overlay.height < 1200


def test_overlay_at_the_ends_of_opacity() -> None:
    picture, mask = photograph(), indices(19)
    for opacity, expected in ((0, np.asarray(picture)), (1, np.array(PALETTES["cityscapes"].colors)[mask])):
        overlay = draw_overlay(picture, mask, PALETTES["cityscapes"], opacity=opacity)
        np.testing.assert_array_equal(np.asarray(overlay)[:30, :40], expected)


def test_overlay_arguments() -> None:
    with pytest.raises(ValueError, match=r"mask must be \(30, 40\) like the picture, got \(40, 30\)"):
        draw_overlay(photograph(), np.zeros((40, 30), int), PALETTES["voc"])
    for opacity in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="opacity must be from 0 to 1"):
            draw_overlay(photograph(), np.zeros((30, 40), int), PALETTES["voc"], opacity=opacity)


def test_shares_are_sorted() -> None:
    assert shares(np.array([[3, 1, 1], [1, 0, 3]])) == {1: 0.5, 3: 1 / 3, 0: 1 / 6}
    assert list(shares(np.array([[3, 1, 1], [1, 0, 3]]))) == [1, 3, 0]


def write_voc_mask(path: Path) -> None:
    write_mask(path, indices(21), PALETTES["voc"])


def write_voc_overlay(path: Path) -> None:
    write_overlay(path, photograph(), indices(21), PALETTES["voc"])


@pytest.mark.parametrize("write", [write_voc_mask, write_voc_overlay])
def test_fault_21_interrupted_writing_keeps_the_older_file(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"older")

    def interrupted(image: Image.Image, target: Path, **_: object) -> None:
        target.write_bytes(b"\x89PNG half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_fault_21_no_space_for_the_whole_mask(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, pathlib, numpy\n"
        "from fastdeeplab.pictures import write_mask\n"
        "from fastdeeplab.palettes import PALETTES\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "mask = numpy.random.default_rng(0).integers(0, 21, (100, 100))\n"
        "try:\n    write_mask(sys.argv[1], mask, PALETTES['voc'])\n"
        "except OSError:\n    sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "mask.png")], capture_output=True, check=False)
    assert done.returncode == 7, done.stderr.decode()
    assert not list(tmp_path.iterdir())

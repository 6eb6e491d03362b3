"""Class names and colours against what torchvision and the data sets publish."""

import pytest
from import_torchvision import torchvision

from fastdeeplab.palettes import PALETTES, choose_palette, generated_palette, named_palette, voc_color


def test_voc_names_are_those_of_torchvision() -> None:
    names = torchvision.models.segmentation.DeepLabV3_ResNet50_Weights.DEFAULT.meta["categories"]
    assert PALETTES["voc"].classes == ("background", *names[1:])


@pytest.mark.parametrize(
    ("index", "color"), [(0, (0, 0, 0)), (1, (128, 0, 0)), (15, (192, 128, 128)), (20, (0, 64, 128))]
)
def test_voc_colors(index: int, color: tuple[int, int, int]) -> None:
    assert PALETTES["voc"].colors[index] == color


def test_voc_color_of_the_border_is_that_of_index_255() -> None:
    assert voc_color(255) == (224, 224, 192)


@pytest.mark.parametrize(
    ("palette", "name", "index", "color"),
    [
        ("cityscapes", "road", 0, (128, 64, 128)),
        ("cityscapes", "car", 13, (0, 0, 142)),
        ("cityscapes", "bicycle", 18, (119, 11, 32)),
        ("ade20k", "wall", 0, (120, 120, 120)),
        ("ade20k", "person", 12, (150, 5, 61)),
        ("ade20k", "minibike", 116, (163, 0, 255)),
        ("ade20k", "flag", 149, (92, 0, 255)),
    ],
)
def test_published_classes(palette: str, name: str, index: int, color: tuple[int, int, int]) -> None:
    assert PALETTES[palette].classes[index] == name
    assert PALETTES[palette].colors[index] == color


@pytest.mark.parametrize(("name", "length"), [("voc", 21), ("cityscapes", 19), ("ade20k", 150)])
def test_every_class_has_a_name_and_a_color(name: str, length: int) -> None:
    palette = PALETTES[name]
    assert len(palette) == len(set(palette.classes)) == len(palette.colors) == length
    assert all(0 <= value <= 255 for color in palette.colors for value in color)


@pytest.mark.parametrize(("num_classes", "name"), [(21, "voc"), (19, "cityscapes"), (150, "ade20k"), (2, "generated")])
def test_auto_goes_by_the_number_of_classes(num_classes: int, name: str) -> None:
    palette = choose_palette("auto", num_classes)
    assert palette == PALETTES.get(name, generated_palette(2))
    assert len(palette) == num_classes


def test_known_names_go_before_the_number_of_classes() -> None:
    names = ("background", *(f"part {index}" for index in range(20)))
    palette = choose_palette("auto", 21, names)
    assert palette.classes == names
    assert palette.background == 0
    assert palette.colors == PALETTES["voc"].colors
    assert choose_palette("auto", 19, PALETTES["cityscapes"].classes) is PALETTES["cityscapes"]
    assert choose_palette("auto", 21, ("cat", "dog")) is PALETTES["voc"], "names of other classes"
    assert choose_palette("voc", 21, names) is PALETTES["voc"], "asked for by name"


def test_names_without_a_background_have_no_black() -> None:
    palette = named_palette(("cat", "background"))
    assert (0, 0, 0) not in palette.colors
    assert palette.background is None


def test_generated_colors_differ_and_none_is_black() -> None:
    palette = generated_palette(1000)
    assert len({(0, 0, 0), *palette.colors}) == 1001
    assert palette.classes[999] == "class 999"


def test_palette_for_another_number_of_classes() -> None:
    with pytest.raises(ValueError, match="palette voc has 21 classes, but the model has 19"):
        choose_palette("voc", 19)


def test_unknown_palette() -> None:
    with pytest.raises(ValueError, match="palette must be voc, cityscapes, ade20k or auto, got 'coco'"):
        choose_palette("coco", 21)

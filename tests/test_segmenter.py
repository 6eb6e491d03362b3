"""Pictures in, masks out: torchvision's preprocessing, sizes, batches, memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from import_torchvision import torchvision
from networks import randomise_batch_norm, small_model
from PIL import Image
from torch import Tensor, nn

from fastdeeplab.pictures import PictureError
from fastdeeplab.segmenter import Segmenter, is_out_of_memory, smallest_dtype

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


class Primaries(nn.Module):
    """A "network" whose classes are the primary colours, at an eighth of the size; it keeps the sizes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, ...]] = []
        self.eval()

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        self.seen.append(tuple(images.shape))
        return {"out": F.avg_pool2d(images * self.scale, 8, ceil_mode=True)}


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def halves(size: tuple[int, int], left: tuple[int, int, int], right: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


@pytest.mark.parametrize("resize", [520, 64, 1, None])
@pytest.mark.parametrize("size", [(451, 300), (300, 451), (33, 47), (520, 520), (640, 520), (1, 1), (7, 3)])
def test_preprocessing_is_that_of_torchvision_bit_for_bit(size: tuple[int, int], resize: int | None) -> None:
    picture = photograph(*size)
    expected = torchvision.transforms._presets.SemanticSegmentation(resize_size=resize)(picture)
    torch.testing.assert_close(Segmenter(Primaries(), resize=resize).preprocess(picture), expected, rtol=0, atol=0)


def test_mask_is_that_of_torchvisions_transform_and_one_upsampling() -> None:
    model = small_model(aux_head=False).eval()
    randomise_batch_norm(model)
    picture = photograph(97, 65)
    images = torchvision.transforms._presets.SemanticSegmentation(resize_size=80)(picture)[None]
    with torch.no_grad():
        logits = F.interpolate(model.logits(images)["out"], (65, 97), mode="bilinear", align_corners=False)
    expected = logits.argmax(dim=1)[0].numpy()
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(Segmenter(model, resize=80)(picture), expected)


def test_one_picture_or_several_of_every_kind(tmp_path: Path) -> None:
    image = halves((64, 32), RED, BLUE)
    image.save(tmp_path / "picture.png")
    segmenter = Segmenter(Primaries(), resize=None)
    pictures = [tmp_path / "picture.png", str(tmp_path / "picture.png"), image, np.asarray(image)]
    expected = np.repeat([[0] * 32 + [2] * 32], 32, axis=0)
    for picture in pictures:
        mask = segmenter(picture)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, expected)
    masks = segmenter(pictures)
    assert isinstance(masks, list)
    np.testing.assert_array_equal(masks, [expected] * 4)
    assert segmenter([]) == []


def test_fault_17_mask_of_a_turned_picture_lies_as_it_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    halves((64, 32), GREEN, BLUE).save(path, exif=exif, quality=95)
    with Image.open(path) as image:
        masks = Segmenter(Primaries(), resize=None)([path, image])
    for mask in masks:
        assert mask.shape == (64, 32)
        assert (mask[:28] == 1).all()
        assert (mask[36:] == 2).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 5), (33, 65), (65, 33), (99, 101)])
@pytest.mark.parametrize("resize", [None, 40])
def test_fault_13_any_size_comes_back_unchanged(size: tuple[int, int], resize: int | None) -> None:
    model = small_model(num_classes=3, aux_head=False).eval()
    assert Segmenter(model, resize=resize)(photograph(*size)).shape == size[::-1]


@pytest.mark.parametrize(
    ("num_classes", "dtype"),
    [(1, np.uint8), (255, np.uint8), (256, np.uint8), (257, np.int16), (32768, np.int16), (32769, np.int32)],
)
def test_fault_12_smallest_type_that_holds_the_classes(num_classes: int, dtype: type) -> None:
    assert torch.empty(0, dtype=smallest_dtype(num_classes)).numpy().dtype == dtype


@pytest.mark.parametrize("num_classes", [1, 256, 1000])
def test_fault_12_masks_of_one_and_of_many_classes(num_classes: int) -> None:
    model = small_model(num_classes=num_classes, aux_head=False).eval()
    mask = Segmenter(model, resize=None)(photograph(48, 48))
    np.testing.assert_array_equal(
        mask, model.predict(Segmenter(model, resize=None).preprocess(photograph(48, 48))[None])[0]
    )


def test_pictures_of_equal_size_share_a_batch_in_their_order() -> None:
    model = Primaries()
    wide = [halves((64, 32), color, color) for color in (RED, GREEN, BLUE)]
    tall = [halves((32, 64), color, color) for color in (BLUE, RED)]
    pictures = [wide[0], tall[0], wide[1], tall[1], wide[2]]
    masks = Segmenter(model, resize=None, batch_size=2)(pictures)
    assert [mask.shape for mask in masks] == [(32, 64), (64, 32), (32, 64), (64, 32), (32, 64)]
    assert [int(mask[0, 0]) for mask in masks] == [0, 2, 1, 0, 2]
    assert model.seen == [(2, 3, 32, 64), (2, 3, 64, 32), (1, 3, 32, 64)]


def test_pictures_whose_own_sizes_differ_can_share_a_batch() -> None:
    model = Primaries()
    masks = Segmenter(model, resize=32, batch_size=2)([halves((128, 64), RED, BLUE), halves((64, 32), BLUE, GREEN)])
    assert model.seen == [(2, 3, 32, 64)]
    assert [mask.shape for mask in masks] == [(64, 128), (32, 64)]
    assert [(int(mask[0, 0]), int(mask[-1, -1])) for mask in masks] == [(0, 2), (2, 1)]


def test_pictures_are_read_when_their_turn_comes() -> None:
    """At most two batches are read ahead of the first result that is not yet taken, whatever the sizes."""
    read = 0

    def pictures() -> object:
        nonlocal read
        for number in range(40):
            read += 1
            yield photograph(16 + 8 * number, 16)

    for taken, _ in enumerate(Segmenter(Primaries(), resize=None, batch_size=3).stream(pictures()), start=1):
        assert read - taken < 6


def test_a_bad_picture_costs_its_batch_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("These are notes.")
    pictures = [halves((32, 32), RED, RED), tmp_path / "notes.jpg", halves((32, 32), BLUE, BLUE)]
    model = Primaries()
    first, bad, last = Segmenter(model, resize=None, batch_size=3).stream(pictures)
    assert (first.mask == 0).all()
    assert (last.mask == 2).all()
    assert bad.mask is None
    assert "notes.jpg: is not a picture" in str(bad.error)
    assert model.seen == [(2, 3, 32, 32)]
    with pytest.raises(PictureError, match=r"notes\.jpg: is not a picture"):
        Segmenter(model)(pictures)


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (np.zeros((4, 4), np.uint8), r"must be an \(H, W, 3\) uint8 array, got \(4, 4\) uint8"),
        (np.zeros((4, 4, 3), np.float32), r"must be an \(H, W, 3\) uint8 array, got \(4, 4, 3\) float32"),
        (np.zeros((0, 4, 3), np.uint8), r"must be an \(H, W, 3\) uint8 array, got \(0, 4, 3\) uint8"),
    ],
)
def test_arrays_that_are_no_pictures(picture: np.ndarray, reason: str) -> None:
    with pytest.raises(PictureError, match="picture 1: " + reason):
        Segmenter(Primaries())(picture)


def test_a_tensor_is_no_picture() -> None:
    with pytest.raises(PictureError, match=r"picture 1: must be a path, .* array, got Tensor"):
        Segmenter(Primaries())([torch.zeros(3, 4, 4)])


def test_fault_17_a_pil_image_whose_file_is_cut_off(tmp_path: Path) -> None:
    photograph(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(PictureError, match="picture 1: image file is trunc"):
        Segmenter(Primaries())(image)


def test_fault_17_a_thin_picture_that_resizing_would_blow_up() -> None:
    with pytest.raises(PictureError, match="picture 1: is too thin: 2 x 400 pixels would be resized to 520 x 104000"):
        Segmenter(Primaries())(Image.new("RGB", (2, 400)))
    assert Segmenter(Primaries(), resize=2)(Image.new("RGB", (2, 400))).shape == (400, 2)


def test_fault_17_an_image_without_pixels() -> None:
    with pytest.raises(PictureError, match="picture 1: has no pixels: it is 0 x 5"):
        Segmenter(Primaries())(Image.new("RGB", (0, 5)))


class Small(Primaries):
    """A network on a device whose memory holds so many pictures."""

    def __init__(self, holds: int, error: BaseException) -> None:
        super().__init__()
        self.holds = holds
        self.error = error

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        outputs = super().logits(images)
        if len(images) > self.holds or images.shape[-1] > 100:
            raise self.error
        return outputs


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 2147483648 bytes."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_fault_19_the_batch_is_halved(error: BaseException) -> None:
    colors = [RED, GREEN, BLUE, RED, BLUE, GREEN, RED, BLUE, GREEN]
    model = Small(2, error)
    masks = Segmenter(model, resize=None, batch_size=8)([halves((32, 32), color, color) for color in colors])
    assert [int(mask[0, 0]) for mask in masks] == [0, 1, 2, 0, 2, 1, 0, 2, 1]
    assert [size[0] for size in model.seen] == [8, 4, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_fault_19_a_picture_that_does_not_fit_alone_is_the_only_one_lost(error: BaseException) -> None:
    sizes = [(32, 32), (32, 32), (200, 32), (32, 32), (32, 32)]
    results = list(Segmenter(Small(2, error), resize=None, batch_size=4).stream(photograph(*size) for size in sizes))
    assert [result.mask is not None for result in results] == [True, True, False, True, True]
    assert str(results[2].error) == "picture 3: not enough memory to segment it"


def test_fault_19_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(ValueError("can't allocate memory"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Segmenter(Small(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied")))(photograph(32, 32))


def test_fault_19_a_real_allocation_that_fails() -> None:
    class Greedy(Primaries):
        def logits(self, images: Tensor) -> dict[str, Tensor]:
            if len(images) > 1:
                torch.empty(2**60)
            return super().logits(images)

    masks = Segmenter(Greedy(), resize=None, batch_size=2)([halves((32, 32), GREEN, GREEN)] * 2)
    assert [int(mask[0, 0]) for mask in masks] == [1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_fault_19_a_real_allocation_that_fails_on_a_gpu() -> None:
    class Greedy(Primaries):
        def logits(self, images: Tensor) -> dict[str, Tensor]:
            if len(images) > 1:
                torch.empty(2**50, device=images.device)
            return super().logits(images)

    segmenter = Segmenter(Greedy(), resize=None, batch_size=2, device="cuda")
    masks = segmenter([halves((32, 32), GREEN, GREEN)] * 2)
    assert [int(mask[0, 0]) for mask in masks] == [1, 1]


def test_a_model_in_training_mode_is_refused_and_left_alone() -> None:
    model = Primaries().train()
    with pytest.raises(RuntimeError, match=r"Segmenter needs the model in eval mode: call model\.eval\(\) first"):
        Segmenter(model)(photograph(8, 8))
    assert model.training
    assert model.seen == []


def test_images_come_in_the_dtype_of_the_model() -> None:
    model = small_model(aux_head=False).eval().to(torch.bfloat16)
    assert Segmenter(model, resize=None)(photograph(40, 40)).shape == (40, 40)


def test_seconds_are_counted_by_stage() -> None:
    segmenter = Segmenter(Primaries())
    assert set(segmenter.seconds.values()) == {0.0}
    segmenter(photograph(64, 64))
    assert list(segmenter.seconds) == ["read", "preprocess", "network", "upsample + argmax"]
    assert min(segmenter.seconds.values()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resize": 0}, "resize must be an integer from 1 up or None, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer from 1 up, got 0"),
        ({"mean": (0.5,)}, "mean and std must be three values each"),
        ({"std": (1, 1, 0)}, "mean and std must be three values each, std above 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmenter(Primaries(), **arguments)  # type: ignore[arg-type]

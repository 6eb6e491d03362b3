"""The kernel of upsample_argmax against fp64 and, where the arithmetic is exact, against PyTorch bit by bit."""

import pytest
import torch
from accuracy import assert_argmax, interpolate
from fastdeeplab.kernels import argmax
from fastdeeplab.kernels.argmax import TILES, choose_tile, upsample_argmax
from fastdeeplab.kernels.measure import peak_memory
from guard_bands import assert_kept, banded, banded_allocations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS
from torch import Tensor

LARGE = TILES[0]  # few programs: the interpreter's cost is per operation, whatever its size
FLOATS = (torch.float32, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("K", [1, 2, 19, 21, 150, 171, 255, 256, 1000])
def test_fault_12_any_number_of_classes(K: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = torch.randn(2, K, 3, 4, device=device).to(dtype)
    assert_argmax(upsample_argmax(logits, (24, 32), torch.int64, tile=LARGE), logits, (24, 32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("low", "high"),
    [
        pytest.param((9, 17), (72, 136), id="8x"),
        pytest.param((5, 6), (80, 96), id="16x"),
        pytest.param((4, 5), (12, 15), id="odd ratio"),
        pytest.param((17, 17), (129, 129), id="513 at stride 8 in small"),
        pytest.param((9, 9), (129, 129), id="513 at stride 16 in small"),
        pytest.param((1, 1), (7, 9), id="one sample"),
        pytest.param((1, 6), (5, 1), id="one row, one column"),
        pytest.param((7, 9), (7, 9), id="same size"),
        pytest.param((7, 9), (3, 4), id="down"),
        pytest.param((9, 3), (2, 30), id="down and up"),
        pytest.param((2, 3), (1, 1), id="to one pixel"),
    ],
)
def test_fault_13_any_size(
    low: tuple[int, int], high: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    logits = torch.randn(1, 3, *low, device=device).to(dtype)
    assert_argmax(upsample_argmax(logits, high, torch.int64, tile=LARGE), logits, high)


def test_fault_01_positions_above_int32(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a cell begins is a quotient whose dividend, 2 * 16384 * 65600, does not fit into int32."""
    if device.type == "cpu":
        monkeypatch.setattr(argmax, "BLOCK", 4096)  # few programs for the interpreter
    logits = torch.randn(1, 3, 1, 16384, device=device)
    assert_argmax(upsample_argmax(logits, (1, 65600), torch.int64, tile=LARGE), logits, (1, 65600), near_ties=0.2)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.rows}x{tile.columns}")
@pytest.mark.parametrize(("low", "high"), [((3, 5), (24, 40)), ((4, 3), (31, 25)), ((6, 5), (4, 9))], ids=str)
def test_every_tile(tile: argmax.Tile, low: tuple[int, int], high: tuple[int, int], device: torch.device) -> None:
    logits = torch.randn(2, 6, *low, device=device)
    assert_argmax(upsample_argmax(logits, high, torch.int64, tile=tile), logits, high)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fault_05_any_strides(layout: str, device: torch.device) -> None:
    contiguous = torch.randn(2, 5, 4, 6, device=device)
    logits = LAYOUTS[layout](contiguous)
    assert torch.equal(logits, contiguous)
    index = upsample_argmax(logits, (32, 48), torch.int64, tile=LARGE)
    assert index.is_contiguous()
    assert torch.equal(index, upsample_argmax(contiguous, (32, 48), torch.int64, tile=LARGE))


def test_fault_05_expanded_inputs(device: torch.device) -> None:
    picture = torch.randn(1, 5, 3, 3, device=device)
    index = upsample_argmax(picture.expand(4, -1, -1, -1), (24, 24), torch.int64, tile=LARGE)
    assert torch.equal(index, upsample_argmax(picture, (24, 24), torch.int64, tile=LARGE).expand(4, -1, -1))
    assert not upsample_argmax(picture[:, :1].expand(1, 9, 3, 3), (24, 24), torch.int64, tile=LARGE).any()


def test_fault_05_size_one_dimensions_with_odd_strides(device: torch.device) -> None:
    values = torch.randn(7, device=device)
    logits = values.as_strided((1, 7, 1, 1), (12345, 1, 999, 31))
    index = upsample_argmax(logits, (8, 8), torch.int64, tile=LARGE)
    assert (index == values.argmax()).all()


def test_nothing_past_the_last_class_is_read(device: torch.device) -> None:
    """The loop loads a class ahead. With one class, its stride can point far outside the memory of this process."""
    logits = torch.randn(9, device=device).as_strided((1, 1, 3, 3), (2**42, 2**42, 3, 1))
    assert not upsample_argmax(logits, (24, 24), torch.int64, tile=LARGE).any()


def test_fault_01_strides_above_int32(device: torch.device) -> None:
    """Classes 2^31 elements apart; only the pages that hold logits are touched."""
    buffer = torch.empty(2**31 + 2**10, dtype=torch.float16, device=device)
    logits = buffer.as_strided((1, 2, 4, 4), (1, 2**31, 4, 1))
    logits.copy_(torch.randn(1, 2, 4, 4))
    assert_argmax(upsample_argmax(logits, (32, 32), torch.int64, tile=LARGE), logits, (32, 32))


def exact_logits(K: int, device: torch.device) -> Tensor:
    """Small integers: at a ratio of 8 their interpolation is exact in fp32 and full of ties."""
    return torch.randint(-3, 4, (2, K, 6, 7), device=device).float()


@pytest.mark.parametrize("K", [2, 19, 150])
def test_first_index_wins_a_tie(K: int, device: torch.device) -> None:
    logits = exact_logits(K, device)
    expected = interpolate(logits, (48, 56))
    top = expected.topk(2, dim=1).values
    assert (top[:, 0] == top[:, 1]).sum() > 40
    assert torch.equal(upsample_argmax(logits, (48, 56), torch.int64, tile=LARGE), expected.argmax(1))


def test_zeros_of_either_sign_are_equal(device: torch.device) -> None:
    logits = torch.zeros(1, 8, 3, 3, device=device)
    logits[:, ::2] = -0.0
    assert not upsample_argmax(logits, (24, 24), torch.int64, tile=LARGE).any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "specials",
    [(float("nan"),), (float("inf"),), (-float("inf"),), (float("nan"), float("inf"), -float("inf"))],
    ids=str,
)
def test_fault_10_nan_and_infinity(specials: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> None:
    """NaN is the maximum and the first one wins, as in torch.argmax; 0 * inf is NaN, as in torch's interpolation."""
    logits = exact_logits(9, device)
    for special in specials:
        logits[torch.rand(logits.shape, device=device) < 0.03] = special
    logits[0, 3, :3] = specials[0]
    index = upsample_argmax(logits.to(dtype), (48, 56), torch.int64, tile=LARGE)
    assert torch.equal(index, interpolate(logits, (48, 56)).argmax(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_fault_10_a_picture_of_nothing_else(value: float, device: torch.device) -> None:
    logits = torch.full((1, 5, 3, 3), value, device=device)
    assert not upsample_argmax(logits, (24, 20), torch.int64, tile=LARGE).any()


@pytest.mark.parametrize(("dtype", "K"), [(torch.uint8, 256), (torch.int16, 300), (torch.int32, 300)], ids=str)
def test_index_dtypes(dtype: torch.dtype, K: int, device: torch.device) -> None:
    logits = torch.randn(1, K, 3, 3, device=device)
    logits[:, -1, 1, 1] = 9.0
    index = upsample_argmax(logits, (24, 24), dtype, tile=LARGE)
    assert index.dtype == dtype
    assert int(index.max()) == K - 1
    assert_argmax(index, logits, (24, 24))


@pytest.mark.parametrize("shape", [(0, 5, 3, 3)])
def test_fault_12_empty_batch(shape: tuple[int, ...], device: torch.device) -> None:
    index = upsample_argmax(torch.randn(shape, device=device), (24, 16), torch.uint8)
    assert (index.shape, index.dtype) == ((0, 24, 16), torch.uint8)


def test_fault_04_more_programs_than_a_launch_can_have(device: torch.device) -> None:
    with pytest.raises(ValueError, match="more programs than a launch can have"):
        upsample_argmax(torch.zeros(1, device=device).expand(1, 1, 50_000, 50_000), (1, 1), torch.int64)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.rows}x{tile.columns}")
@pytest.mark.parametrize(("low", "high"), [((3, 4), (24, 32)), ((3, 4), (23, 29)), ((7, 5), (3, 4))], ids=str)
def test_no_stray_access(
    tile: argmax.Tile,
    low: tuple[int, int],
    high: tuple[int, int],
    device: torch.device,
) -> None:
    """A read outside the logits would give NaN, hence a wrong class; a write outside the index changes the band."""
    values = torch.randn(2, 4, *low, device=device)
    logits, _ = banded(values, torch.nan)
    with banded_allocations() as buffers:
        index = upsample_argmax(logits, high, torch.int32, tile=tile)
    assert_argmax(index, values, high)
    assert_kept(buffers)


def test_fault_01_strips_past_the_last_cell(device: torch.device) -> None:
    """The last program goes on past the picture, where positions no longer fit into int32."""
    high, band = (89232, 1), 100_000
    logits = torch.randn(1, 2, 12032, 1, device=device)
    with banded_allocations(band) as buffers:
        index = upsample_argmax(logits, high, torch.int16)
    assert_argmax(index, logits, high)
    assert_kept(buffers, band)


def test_choose_tile() -> None:
    assert choose_tile(1, 128, 256, 1024, 2048) == TILES[0]
    assert choose_tile(8, 65, 65, 513, 513) == TILES[0]
    assert choose_tile(8, 256, 256, 512, 512) == TILES[2]
    assert choose_tile(1, 1000, 1000, 1000, 1000) == TILES[3]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(FLOATS),
    tile=st.sampled_from(TILES[:3]),
    seed=st.integers(0, 2**31),
)
def test_anything(
    shape: tuple[int, ...],
    size: tuple[int, int],
    layout: str,
    dtype: torch.dtype,
    tile: argmax.Tile,
    seed: int,
    device: torch.device,
) -> None:
    logits = LAYOUTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype))
    assert_argmax(upsample_argmax(logits, size, torch.int64, tile=tile), logits, size, near_ties=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 19, 128, 256), (1024, 2048)),
        ((8, 150, 64, 64), (512, 512)),
        ((4, 21, 65, 65), (513, 513)),
        ((2, 21, 33, 33), (520, 520)),
        ((1, 7, 90, 90), (60, 71)),
    ],
    ids=str,
)
def test_real_sizes(
    shape: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    logits = LAYOUTS[layout](torch.randn(shape, device=device).to(dtype))
    index = upsample_argmax(logits, size, torch.uint8)
    for i in range(shape[0]):
        assert_argmax(index[i : i + 1], logits[i : i + 1], size)


@pytest.mark.gpu
def test_peak_memory(device: torch.device) -> None:
    """The mask and nothing else: full-size logits would be 1.26 GB."""
    logits = torch.randn(8, 150, 64, 64, device=device)
    used = peak_memory(lambda: upsample_argmax(logits, (512, 512), torch.uint8), device)
    assert used <= 8 * 512 * 512 + 2**20

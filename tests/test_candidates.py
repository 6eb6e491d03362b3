"""What may serve a layer and what does: shares of live taps, tiles by architecture, the order of deciding."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastdeeplab.kernels import candidates
from fastdeeplab.kernels.candidates import Decision, Gpu, Layer, Measurement, Tile, decide, tiles_for

DEVICE = torch.device("cuda", 0)
H200 = Gpu("NVIDIA H200", (9, 0), 132)
GPUS = [
    H200,
    Gpu("NVIDIA A100", (8, 0), 108),
    Gpu("NVIDIA RTX A6000", (8, 6), 84),
    Gpu("NVIDIA L4", (8, 9), 58),
    Gpu("NVIDIA B200", (10, 0), 148),
    Gpu("NVIDIA GeForce RTX 5090", (12, 0), 170),
    Gpu("one multiprocessor", (8, 0), 1),
]
MAPS = {
    (64, 64): (12, 24, 36),
    (65, 65): (12, 24, 36),
    (128, 256): (12, 24, 36),
    (33, 33): (6, 12, 18),
    (32, 32): (6, 12, 18),
}
SIZES = [(1, 1, 1), (5, 7, 1), (9, 4, 2), (6, 6, 3), (7, 8, 4), (5, 11, 6), (4, 4, 9), (65, 65, 36), (33, 20, 18)]


def conv(N: int, C: int, size: tuple[int, int], C_out: int, kernel: int, **options: object) -> Layer:
    options = {"dtype": torch.bfloat16, **options}
    return Layer.of("conv_bn_relu", (N, C, *size), (C_out, C, kernel, kernel), **options)  # type: ignore[arg-type]


def aspp(N: int, size: tuple[int, int], rates: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Layer:
    return Layer.of("aspp_branches", (N, 2048, *size), (256, 2048, 3, 3), dtype, dilations=rates)


def predicted(layer: Layer, gpu: Gpu) -> Tile:
    pointer = [tile for tile in candidates.tiles_for(layer, gpu.capability) if tile.kernel == "pointer"]
    return candidates.predict_tile(layer, gpu, tuple(pointer))


EXPAND = conv(8, 256, (65, 65), 1024, 1, residual=True)
DENSE = conv(8, 256, (65, 65), 256, 3, padding=2, dilations=(2,))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Measurement]]:
    """A shipped table to fill, on a machine with an H200 that has measured nothing itself."""
    rows: list[Measurement] = []
    monkeypatch.setattr(candidates, "shipped", lambda: tuple(rows))
    monkeypatch.setattr(candidates, "_remembered", {})
    monkeypatch.setattr(Gpu, "of", lambda device: H200)
    decide.cache_clear()
    yield rows
    decide.cache_clear()


def measured(layer: Layer, gpu: str = H200.name, *, tile_us: float = 1.0, block_n: int = 64) -> Measurement:
    tile = Tile("pointer", 64, block_n, 64, num_warps=4, num_stages=4 if block_n == 64 else 3)
    return Measurement(gpu, (9, 0), "2.13.0", "3.7.1", layer, tile, tile_us, "cudnn_relu", 2.0)


def live_taps(H: int, W: int, dilation: int) -> torch.Tensor:
    """Which of a pixel's nine taps are inside the map, counted by a convolution: (H, W, 9)."""
    each_tap = torch.eye(9).view(9, 1, 3, 3)
    return F.conv2d(torch.ones(1, 1, H, W), each_tap, padding=dilation, dilation=dilation)[0].permute(1, 2, 0)


@pytest.mark.parametrize(("H", "W", "dilation"), SIZES)
def test_live_share_is_exact(H: int, W: int, dilation: int) -> None:
    live = live_taps(H, W, dilation)
    assert math.isclose(candidates.live_share(H, W, 3, dilation), float(live.mean()), rel_tol=1e-6)
    assert candidates.live_share(H, W, 1, dilation) == 1


def test_live_share_of_a_larger_kernel() -> None:
    counts = F.conv2d(torch.ones(1, 1, 9, 6), torch.ones(1, 1, 7, 7), padding=3)
    assert math.isclose(candidates.live_share(9, 6, 7, 1), float(counts.mean()) / 49, rel_tol=1e-6)


@pytest.mark.parametrize(("H", "W", "dilation"), SIZES)
def test_rectangles_are_the_pixels_with_the_same_live_taps(H: int, W: int, dilation: int) -> None:
    """And what tiles execute is each such set's pixels, over all images, in whole runs."""
    sets = Counter(tuple(taps.tolist()) for taps in live_taps(H, W, dilation).flatten(0, 1))
    found = list(candidates.rectangles(H, W, dilation))
    assert sum(rows * columns for rows, columns, _, _ in found) == H * W
    assert sorted((rows * columns, r * c) for rows, columns, r, c in found) == sorted(
        (pixels, int(sum(taps))) for taps, pixels in sets.items()
    )
    for N, block_m in product((1, 3), (32, 128)):
        tile = Tile("pointer", block_m, 64, 64, 4, 3, skip=True)
        executed = sum(math.ceil(N * pixels / block_m) * block_m * sum(taps) for taps, pixels in sets.items())
        assert math.isclose(candidates.executed_share(tile, N, H, W, dilation), executed / (9 * N * H * W))
        whole = math.ceil(N * H * W / block_m) * block_m / (N * H * W)
        assert math.isclose(candidates.executed_share(tile._replace(skip=False), N, H, W, dilation), whole)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_aspp_executes_little_more_than_what_is_live(gpu: Gpu, dtype: torch.dtype) -> None:
    """Of all four branches' multiplications: within 0.05 at batch 8 and 0.15 at batch 1."""
    print(f"\n{gpu.name}: map, rates, exact share, executed at batch 1 and 8 (tile)")
    for size, rates in MAPS.items():
        line = f"{size[0]}x{size[1]} {rates} {aspp(1, size, rates).live_share:.3f}"
        for N, slack in ((1, 0.15), (8, 0.05)):
            layer = aspp(N, size, rates, dtype)
            tile = predicted(layer, gpu)
            share = layer.executed(tile) / (28 * N * size[0] * size[1])
            line += f"  {share:.3f} ({tile.block_m}x{tile.block_n}, {tile.splits} splits; by rate"
            for rate in rates:
                exact, executed = candidates.live_share(*size, 3, rate), candidates.executed_share(tile, N, *size, rate)
                line += f" {executed:.3f} of {exact:.3f}"
            line += ")"
            assert layer.live_share <= share <= layer.live_share + slack
        print(line)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fault_09_tiles_fit_their_architecture(capability: tuple[int, int], dtype: torch.dtype) -> None:
    architecture = candidates.architecture(capability)
    tiles = [tile for layer in (EXPAND, DENSE) for tile in candidates.tiles_for(retyped(layer, dtype), capability)]
    assert {tile.kernel for tile in tiles} == (
        {"pointer"} if architecture < 90 else {"pointer", "gemm_tma", "boxes_tma"}
    )
    for tile in tiles:
        shared = (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize * tile.num_stages
        assert shared <= candidates.SHARED_KIB[architecture] * 1024
        assert tile.block_k * dtype.itemsize == 128
        assert tile.splits == 1


def retyped(layer: Layer, dtype: torch.dtype) -> Layer:
    return Layer(**vars(layer) | {"dtype": dtype})


def test_architectures() -> None:
    known = {(8, 0): 80, (8, 6): 86, (8, 7): 86, (8, 9): 89, (9, 0): 90, (10, 3): 100, (11, 0): 100, (12, 1): 120}
    assert {capability: candidates.architecture(capability) for capability in known} == known


@pytest.mark.parametrize(
    ("layer", "kernels", "skips"),
    [
        (EXPAND, {"pointer", "gemm_tma"}, {False}),
        (DENSE, {"pointer", "boxes_tma"}, {False, True}),
        (aspp(1, (65, 65), (12, 24, 36)), {"pointer", "boxes_tma"}, {True}),
        (conv(1, 256, (65, 65), 512, 1, stride=2), {"pointer"}, {False}),
        (conv(1, 256, (65, 65), 512, 1, padding=1), {"pointer"}, {False}),
        (conv(1, 256, (65, 65), 256, 3, stride=2, padding=1), {"pointer"}, {False}),
        (conv(1, 256, (65, 65), 256, 3, padding=1, dilations=(2,)), {"pointer"}, {False}),
        (conv(1, 256, (65, 65), 21, 1), {"pointer"}, {False}),  # 42 bytes a pixel: no TMA
        (conv(1, 20, (65, 65), 64, 1), {"pointer"}, {False}),
        (conv(1, 20, (65, 65), 64, 1, dtype=torch.float32), {"pointer", "gemm_tma"}, {False}),
        (conv(1, 256, (65, 65), 64, 1, aligned=False), {"pointer"}, {False}),
        (conv(1, 3, (65, 65), 64, 7, stride=2, padding=3), set(), set()),
        (Layer.of("conv_bn_relu", (1, 8, 9, 9), (8, 8, 1, 3), torch.float16), set(), set()),
        (conv(2, 8, (32768, 32768), 8, 1), set(), set()),  # pixels are counted with 32 bits
        (conv(1, 8, (32768, 32767), 8, 1), {"pointer", "gemm_tma"}, {False}),
    ],
)
def test_which_kernels_serve_a_layer(layer: Layer, kernels: set[str], skips: set[bool]) -> None:
    tiles = candidates.tiles_for(layer, (9, 0))
    assert {tile.kernel for tile in tiles} == kernels
    assert {tile.skip for tile in tiles} == skips


def test_splits_fill_a_gpu_that_few_tiles_leave_idle() -> None:
    few, many = conv(1, 2048, (32, 32), 256, 1), conv(8, 2048, (65, 65), 256, 1)
    assert predicted(few, H200).splits > 1
    assert predicted(many, H200).splits == 1
    assert predicted(few, Gpu("one multiprocessor", (8, 0), 1)).splits == 1


@pytest.mark.parametrize("C", [64, 256, 512, 1024, 2048, 8192])
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_splits_are_of_less_than_two_waves_and_have_some_steps(C: int, gpu: Gpu) -> None:
    for size in range(1, 120, 2):
        tile = predicted(conv(1, C, (size, size), 256, 1), gpu)
        programs = math.ceil(size * size / tile.block_m) * math.ceil(256 / tile.block_n)
        assert tile.splits == 1 or programs < 2 * gpu.multiprocessors
        assert tile.splits == 1 or 4 * tile.splits * tile.block_k <= C


def test_no_tile_that_leaves_the_last_wave_empty() -> None:
    """134 tiles of 64x128 would take 132 multiprocessors two waves, the second for two tiles."""
    layer = conv(1, 128, (65, 65), 256, 1)
    full = predicted(layer, Gpu("134 multiprocessors", (9, 0), 134))
    assert (full.block_m, full.block_n, full.splits) == (64, 128, 1)
    almost = predicted(layer, H200)
    assert (almost.block_m, almost.block_n) != (64, 128)


def test_thin_rectangles_are_not_cut_out() -> None:
    """Where cutting a small map into nine costs more than the padding does."""
    assert not predicted(conv(1, 512, (17, 17), 512, 3, padding=1), H200).skip
    assert predicted(conv(8, 512, (65, 65), 512, 3, padding=24, dilations=(24,)), H200).skip


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("layer", "impl", "reason"),
    [
        (EXPAND, "triton", "the residual takes no pass of its own"),
        (DENSE, "torch", "neither a pass over the activations nor a quarter of the work"),
        (conv(8, 256, (65, 65), 64, 1), "torch", "neither a pass"),
        (
            conv(8, 512, (65, 65), 512, 3, padding=24, dilations=(24,)),
            "triton",
            "% of the multiplications read padding",
        ),
        (aspp(8, (65, 65), (12, 24, 36)), "triton", "41% of the multiplications read padding"),
        (aspp(1, (128, 256), (12, 24, 36)), "torch", "nor a quarter of the work"),
        (
            Layer.of("aspp_projection", (8, 1024, 65, 65), (256, 1024, 1, 1), torch.bfloat16),
            "triton",
            "no concatenation",
        ),
        (conv(8, 3, (512, 512), 64, 7, stride=2, padding=3), "torch", "no tile choice serves"),
    ],
)
def test_unmeasured_the_rule_decides(layer: Layer, impl: str, reason: str) -> None:
    decision = decide(layer, "auto", DEVICE)
    assert decision.impl == impl
    assert decision.form == "conv_pointwise"
    assert reason in decision.why
    assert decision.tile is None or decision.why.startswith("predicted: ")
    assert decision.tile is None or decision.tile.kernel == "pointer"


def test_what_was_asked_for_is_done_with_the_best_choice_known(table: list[Measurement]) -> None:
    table.append(measured(DENSE))
    for impl in ("triton", "torch"):
        assert decide(DENSE, impl, DEVICE) == Decision(impl, table[0].tile, "cudnn_relu", "as asked for")
    stem = conv(8, 3, (512, 512), 64, 7, stride=2, padding=3)
    assert decide(stem, "triton", DEVICE).impl == "nothing"
    assert decide(stem, "torch", DEVICE).impl == "torch"


@pytest.mark.parametrize(("tile_us", "impl"), [(1.0, "triton"), (3.0, "torch")])
def test_the_faster_one_runs(tile_us: float, impl: str, table: list[Measurement]) -> None:
    """Though the prediction would have been the other one, for one of the two."""
    table.append(measured(DENSE, tile_us=tile_us))
    assert decide(DENSE, "auto", DEVICE) == Decision(impl, table[0].tile, "cudnn_relu", "measured on NVIDIA H200")


def test_the_nearest_measurement_decides(table: list[Measurement]) -> None:
    """This layer on this GPU; else the most similar number of pixels; else another GPU of the architecture."""
    other_layer = Layer(**vars(DENSE) | {"relu": False})
    table.append(measured(DENSE)._replace(gpu="NVIDIA A100", capability=(8, 0)))
    table += [measured(other_layer), measured(DENSE, "NVIDIA H100", block_n=128)]
    assert decide(DENSE, "auto", DEVICE).why == "measured on NVIDIA H100"

    decide.cache_clear()
    far, near = (Layer(**vars(DENSE) | {"N": N}) for N in (64, 4))
    table += [measured(far, tile_us=3.0), measured(near)]
    decision = decide(DENSE, "auto", DEVICE)
    assert decision.impl == "triton"
    assert decision.tile is not None
    assert decision.tile._replace(splits=1) == table[-1].tile
    assert decision.why == "measured on NVIDIA H200 at another size"

    decide.cache_clear()
    table.append(measured(DENSE, tile_us=3.0))
    assert decide(DENSE, "auto", DEVICE).impl == "torch"

    candidates.remember(measured(DENSE, tile_us=0.5, block_n=128))
    decision = decide(DENSE, "auto", DEVICE)
    assert decision.impl == "triton"
    assert decision.tile is not None
    assert decision.tile.block_n == 128
    assert decision.why == "measured on NVIDIA H200"


@pytest.mark.parametrize("rates", [(1, 2, 3), (2, 4, 6), (1, 12, 24)], ids=str)
@pytest.mark.parametrize("size", [(17, 17), (33, 33), (9, 40)], ids=str)
def test_aspp_executes_no_more_than_masked_rectangles(size: tuple[int, int], rates: tuple[int, ...]) -> None:
    """At small rates, rectangles of a pixel or two in width would be mostly the ragged ends of runs."""
    layer, tile = aspp(1, size, rates), Tile("pointer", 64, 64, 64, 4, 4, skip=True)
    runs = -(-layer.pixels // tile.block_m)
    assert layer.executed(tile) <= tile.block_m * runs * (1 + 9 * len(rates))


def test_splits_are_those_of_the_size_at_hand(table: list[Measurement]) -> None:
    small = conv(1, 2048, (33, 33), 256, 1)
    row = measured(small)
    table.append(row._replace(tile=row.tile._replace(splits=8)))
    decision = decide(conv(16, 2048, (65, 65), 256, 1), "auto", DEVICE)
    assert decision.tile == row.tile
    assert decide(small, "auto", DEVICE).tile == table[0].tile


def test_a_measured_tile_that_is_not_listed_any_more_is_passed_over(table: list[Measurement]) -> None:
    table.append(measured(DENSE)._replace(tile=Tile("pointer", 512, 512, 64, 8, 3)))
    assert decide(DENSE, "auto", DEVICE).why.startswith("predicted: ")


def test_measurements_are_written_and_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [measured(EXPAND), measured(aspp(1, (33, 33), (6, 12, 18), torch.float32), "NVIDIA H100", block_n=128)]
    text = json.dumps({"measurements": [row.to_json() for row in rows]})
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    candidates.shipped.cache_clear()
    try:
        assert list(candidates.shipped()) == rows
    finally:
        candidates.shipped.cache_clear()


def test_the_shipped_table_can_be_read() -> None:
    candidates.shipped.cache_clear()
    path = Path(candidates.__file__).with_name("tuned.json")
    assert {"measurements": [row.to_json() for row in candidates.shipped()]} == json.loads(path.read_text())


def test_full_fp32_has_tiles_of_its_own_and_is_the_librarys_unmeasured() -> None:
    layer = Layer.of("aspp_projection", (8, 1024, 65, 65), (256, 1024, 1, 1), torch.float32, precision="ieee")
    assert tiles_for(layer, (9, 0)) == (candidates.IEEE_TILES[0][1],)
    assert decide(layer, "auto", torch.device("cpu")).impl == "torch"
    assert decide(layer, "triton", torch.device("cpu")).tile == candidates.IEEE_TILES[0][1]
    assert decide(replace(layer, precision="tf32"), "auto", torch.device("cpu")).impl == "triton"

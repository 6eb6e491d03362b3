"""Packed weights: the same numbers as PyTorch's convolution, of the weights as they are now, nothing left behind."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastdeeplab.kernels.measure import relative_error
from networks import randomise_batch_norm, small_model
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastdeeplab as fdl
from fastdeeplab import fusion, kernels, packed
from fastdeeplab.packed import PackedWeights

pytestmark = pytest.mark.skipif(not packed.operators_work(), reason="PyTorch without oneDNN's operators")


@pytest.fixture(autouse=True)
def _probe_anew() -> Iterator[None]:
    yield
    packed.operators_work.cache_clear()


def accelerated(**arguments: object) -> fdl.AcceleratedModel:
    model = small_model(**arguments)
    randomise_batch_norm(model)
    return fdl.accelerate(model)


def unpacked(fast: fdl.AcceleratedModel, images: Tensor) -> Tensor:
    """While somebody records which layers run, they run as they do where nothing is packed."""
    with kernels.recording() as layers:
        out: Tensor = fast(images)["out"]
    assert layers
    return out


def run(fast: fdl.AcceleratedModel, images: Tensor) -> Tensor:
    """Twice: weights are packed for a shape when it comes again."""
    first, second = fast(images)["out"], fast(images)["out"]
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5, equal_nan=True)
    return second


def convolve(weights: PackedWeights, *arguments: Any, **options: Any) -> Tensor:
    first, second = weights.convolve(*arguments, **options), weights.convolve(*arguments, **options)
    assert first is not None
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5, equal_nan=True)
    return second


def packed_modules(fast: fdl.AcceleratedModel) -> set[nn.Module]:
    return set() if fast._packed is None else set(fast._packed._of)


GEOMETRIES = [
    pytest.param({"kernel_size": 1}, (1, 16, 9, 9), id="1x1"),
    pytest.param({"kernel_size": 1}, (1, 16, 1, 1), id="one pixel"),
    pytest.param({"kernel_size": 1, "stride": 2}, (2, 16, 7, 5), id="1x1 stride 2"),
    pytest.param({"kernel_size": 3, "padding": 1}, (2, 16, 5, 9), id="3x3"),
    pytest.param({"kernel_size": 3, "padding": 1}, (1, 16, 1, 1), id="3x3 of one pixel"),
    pytest.param({"kernel_size": 3, "padding": 1, "stride": 2}, (1, 16, 6, 1), id="3x3 stride 2"),
    pytest.param({"kernel_size": 3, "padding": 12, "dilation": 12}, (1, 16, 9, 9), id="rate 12"),
    pytest.param({"kernel_size": 7, "padding": 3, "stride": 2}, (1, 16, 33, 35), id="stem"),
    pytest.param({"kernel_size": 3, "padding": 1}, (1, 16, 64, 64), id="too large to be packed"),
]


@pytest.mark.parametrize("relu", [True, False], ids=["relu", ""])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", ""])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(("geometry", "shape"), GEOMETRIES)
@torch.no_grad()
def test_as_pytorchs_convolution(
    geometry: dict[str, int], shape: tuple[int, ...], memory_format: torch.memory_format, residual: bool, relu: bool
) -> None:
    conv = nn.Conv2d(16, 24, **geometry).to(memory_format=memory_format)
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    expected = conv.double()(x.double())
    conv, added = conv.float(), torch.randn(expected.shape) if residual else None
    expected = expected if added is None else expected + added
    weights = PackedWeights()
    for _ in range(3):  # the third time with what was packed the second time
        y = weights.convolve(conv, x, conv.weight, conv.bias, added, relu=relu)
        assert y is not None
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(y, expected.relu() if relu else expected) < 1e-6


@torch.no_grad()
def test_a_shift_for_each_image_and_the_first_input_channels() -> None:
    conv, x, shift = nn.Conv2d(24, 8, 1, bias=False), torch.randn(3, 16, 5, 5), torch.randn(3, 8)
    y = convolve(PackedWeights(), conv, x, conv.weight[:, :16], shift)
    expected = (F.conv2d(x, conv.weight[:, :16]) + shift[:, :, None, None]).relu()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_nan_spreads_as_far_as_pytorch_says() -> None:
    conv, x = nn.Conv2d(16, 24, 3, padding=1), torch.randn(1, 16, 9, 9)
    x[0, 3, 4, 2] = torch.nan
    y = convolve(PackedWeights(), conv, x, conv.weight, conv.bias)
    expected = conv(x).relu()
    assert 0 < expected.isnan().sum() < expected.numel()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@torch.no_grad()
def test_what_does_not_fit_is_left_to_others() -> None:
    conv, x = nn.Conv2d(16, 24, 3), torch.randn(1, 16, 9, 9)
    weights = PackedWeights()
    assert weights.convolve(conv, x, conv.weight, conv.bias) is not None
    assert weights.convolve(conv, x[:, :8], conv.weight, conv.bias) is None
    assert weights.convolve(conv, x[:0], conv.weight, conv.bias) is None
    assert weights.convolve(conv, x[:, :, :2], conv.weight, conv.bias) is None  # smaller than the kernel
    assert weights.convolve(conv, x.double(), conv.weight, conv.bias) is None
    conv.double()
    assert weights.convolve(conv, x, conv.weight, conv.bias) is None


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_branches_and_projection(batch: int) -> None:
    aspp = accelerated().classifier[0]
    norms = {part: part.affine() for part in aspp.modules() if isinstance(part, fusion.FoldedBatchNorm)}
    x = torch.randn(batch, aspp.convs[0][0].in_channels, 9, 7)
    atrous = list(aspp.convs)[:-1]
    pooled = torch.randn(batch, aspp.project[0].in_channels // 5, 1, 1)
    found = []
    packing = fusion.PackedAffine(norms, PackedWeights())
    for affine in (norms, packing, packing):
        branches = fusion.aspp_branches([conv for conv, _, _ in atrous], [norm for _, norm, _ in atrous], x, affine)
        projected = fusion.aspp_projection(aspp.project[0], aspp.project[1], branches, pooled, affine)
        assert branches.is_contiguous(memory_format=torch.channels_last)
        assert projected.is_contiguous(memory_format=torch.channels_last)
        found.append((branches, projected))
    assert set(affine.weights._of) == {*(conv for conv, _, _ in atrous), aspp.project[0]}
    assert relative_error(found[1], found[0]) < 1e-6
    assert relative_error(found[2], found[0]) < 1e-6


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3, 33, 47), (3, 3, 65, 17)], ids=str)
def test_a_whole_model(shape: tuple[int, ...], output_stride: int) -> None:
    fast, images = accelerated(output_stride=output_stride), torch.randn(shape)
    expected = unpacked(fast, images)
    assert not packed_modules(fast)
    assert relative_error(run(fast, images), expected) < 1e-6
    assert relative_error(run(fast, images), expected) < 1e-6  # with what was packed
    if shape[-1] > 1:
        convolutions = {part for part in fast.backbone.modules() if isinstance(part, nn.Conv2d)}
        assert convolutions | {fast.classifier[1], fast.classifier[4]} <= packed_modules(fast)


def test_nan_in_an_image_is_nan_in_its_logits() -> None:
    fast, images = accelerated(), torch.randn(2, 3, 33, 33)
    images[0, 1, 7, 7] = torch.nan
    out = run(fast, images)
    assert out[0].isnan().any()
    assert not out[1].isnan().any()
    assert torch.equal(out.isnan(), unpacked(fast, images).isnan())


def write_in_place(fast: fdl.AcceleratedModel) -> None:
    fast.backbone.layer1[0].conv2.weight.neg_()
    fast.classifier[1].weight.mul_(3)


def replace_data(fast: fdl.AcceleratedModel) -> None:
    weight = fast.backbone.layer1[0].conv2.weight
    weight.data = -weight.data


def transpose_data(fast: fdl.AcceleratedModel) -> None:
    """The same memory, and a change that PyTorch does not count."""
    weight = fast.backbone.layer1[0].conv2.weight
    weight.data = weight.data.transpose(0, 1)


def replace_parameter(fast: fdl.AcceleratedModel) -> None:
    conv = fast.backbone.layer1[0].conv2
    conv.weight = nn.Parameter(-conv.weight, requires_grad=False)


def replace_module(fast: fdl.AcceleratedModel) -> None:
    conv = fast.backbone.layer1[0].conv2
    other = copy.deepcopy(conv)
    other.weight.neg_()
    fast.backbone.layer1[0].conv2 = other


def load(fast: fdl.AcceleratedModel) -> None:
    fast.load_state_dict(accelerated().state_dict())


def load_and_assign(fast: fdl.AcceleratedModel) -> None:
    fast.load_state_dict(accelerated().state_dict(), assign=True)


def write_data_and_move(fast: fdl.AcceleratedModel) -> None:
    fast.backbone.layer1[0].conv2.weight.data.neg_()
    fast.cpu()


def change_geometry(fast: fdl.AcceleratedModel) -> None:
    conv = fast.backbone.layer1[0].conv2
    conv.padding = conv.dilation = (2, 2)


@pytest.mark.parametrize(
    "change",
    [
        write_in_place,
        replace_data,
        transpose_data,
        replace_parameter,
        replace_module,
        load,
        load_and_assign,
        write_data_and_move,
        change_geometry,
    ],
)
def test_no_weight_is_ever_stale(change: Callable[[fdl.AcceleratedModel], None]) -> None:
    fast, images = accelerated(), torch.randn(1, 3, 33, 33)
    before = run(fast, images)
    with torch.no_grad():
        change(fast)
    after = run(fast, images)
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, unpacked(fast, images)) < 1e-6


def test_memory_of_a_weight_that_was_replaced_goes_to_no_other() -> None:
    """Whatever is allocated next, its address is none that a packed weight is known by."""
    conv, x, weights = nn.Conv2d(64, 64, 3, padding=1, bias=False), torch.randn(1, 64, 5, 5), PackedWeights()
    shift = torch.zeros(64)
    for number in range(5):
        with torch.no_grad():
            conv.weight.data = torch.full((64, 64, 3, 3), float(number))
            y = convolve(weights, conv, x, conv.weight, shift, relu=False)
            torch.testing.assert_close(y, F.conv2d(x, conv.weight, padding=1), rtol=1e-4, atol=1e-3)


def test_weights_of_inference_mode_whose_writes_nobody_counts() -> None:
    with torch.inference_mode():
        fast, images = accelerated(), torch.randn(1, 3, 33, 33)
        run(fast, images)
        assert not packed_modules(fast)
        fast.backbone.layer1[0].conv2.weight.neg_()
        assert torch.equal(run(fast, images), unpacked(fast, images))


def test_inference_mode_and_outside_share_packed_weights() -> None:
    fast, images = accelerated(), torch.randn(1, 3, 33, 33)
    with torch.inference_mode():
        out = run(fast, images).clone()
    assert packed_modules(fast)
    assert torch.equal(run(fast, images), out)
    with torch.enable_grad():
        assert torch.equal(run(fast, images), out)


def test_nothing_is_saved_or_copied() -> None:
    fast, images = accelerated(), torch.randn(1, 3, 33, 33)
    keys, before = set(fast.state_dict()), len(pickle.dumps(fast))
    out = run(fast, images)
    assert packed_modules(fast)
    assert set(fast.state_dict()) == keys
    assert len(pickle.dumps(fast)) <= before + 200
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not packed_modules(other)
        assert torch.equal(run(other, images), out)
        assert not packed_modules(other) & packed_modules(fast)


def test_other_dtypes_have_none() -> None:
    fast, images = accelerated(), torch.randn(1, 3, 33, 33)
    run(fast, images)
    fast.bfloat16()
    assert not packed_modules(fast)
    assert fast(images)["out"].dtype == torch.bfloat16
    assert not packed_modules(fast)
    fast.float()
    assert relative_error(run(fast, images), unpacked(fast, images)) < 1e-6
    assert packed_modules(fast)


def test_a_module_that_is_gone_leaves_nothing() -> None:
    fast = accelerated()
    run(fast, torch.randn(1, 3, 33, 33))
    assert fast._packed is not None
    found = len(fast._packed._of)
    fast.backbone.layer1[0].conv2 = nn.Identity()
    assert len(fast._packed._of) == found - 1


@torch.no_grad()
def test_pictures_that_all_differ_in_size_wait_for_no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, weights = nn.Conv2d(64, 64, 3, padding=1), PackedWeights()
    packings: list[object] = []
    pack = packed._Layouts.pack
    monkeypatch.setattr(packed._Layouts, "pack", lambda self, *given: packings.append(given) or pack(self, *given))
    for size in range(8, 40):
        x = torch.randn(1, 64, size, size)
        torch.testing.assert_close(
            weights.convolve(conv, x, conv.weight, conv.bias, relu=False), conv(x), rtol=1e-4, atol=1e-4
        )
    assert not packings
    convolve(weights, conv, x, conv.weight, conv.bias)
    assert len(packings) == 1


def run_all_sizes(conv: nn.Conv2d, weights: PackedWeights) -> packed._Layouts:
    """And back again, comparing each."""
    for size in [*range(8, 16), *range(8, 16)]:
        x = torch.randn(1, 64, size, size)
        y = convolve(weights, conv, x, conv.weight, conv.bias, relu=False)
        torch.testing.assert_close(y, conv(x), rtol=1e-4, atol=1e-4)
    (layouts,) = weights._of.values()
    return layouts


@torch.no_grad()
def test_shapes_share_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_LAYOUTS", 8)
    layouts = run_all_sizes(nn.Conv2d(64, 64, 3, padding=1), PackedWeights())
    assert len(layouts.by_key) == 8
    assert len(layouts.by_layout) < 8
    assert {id(each) for each in layouts.by_key.values()} == {id(each) for each in layouts.by_layout.values()}


@pytest.mark.parametrize("limit", ["MOST_SHAPES", "MOST_LAYOUTS"])
@torch.no_grad()
def test_neither_shapes_nor_layouts_grow_for_ever(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, limit, 1)
    layouts = run_all_sizes(nn.Conv2d(64, 64, 3, padding=1), PackedWeights())
    assert len(layouts.by_key if limit == "MOST_SHAPES" else layouts.by_layout) == 1


def test_large_maps_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_PIXELS", 2)
    fast, images = accelerated(), torch.randn(1, 3, 33, 33)
    assert relative_error(run(fast, images), unpacked(fast, images)) < 1e-6
    assert not packed_modules(fast)


def test_other_numbers_of_threads() -> None:
    fast, images, threads = accelerated(), torch.randn(1, 3, 33, 33), torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            assert relative_error(run(fast, images), unpacked(fast, images)) < 1e-6
    finally:
        torch.set_num_threads(threads)


def test_many_threads_at_once() -> None:
    fast, images = accelerated(), torch.randn(1, 3, 33, 33)
    expected, results = unpacked(fast, images), []
    start = threading.Barrier(4)

    def run() -> None:
        start.wait()
        results.extend(fast(images)["out"] for _ in range(4))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16
    assert all(relative_error(out, expected) < 1e-6 for out in results)


# Where nothing is packed


def refuse(*_: object) -> Tensor:
    raise RuntimeError("could not create a primitive")


@pytest.mark.parametrize("operator", ["_convolution_pointwise", "_reorder_convolution_weight"])
def test_a_pytorch_without_the_operators(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Tensor:
        raise AttributeError(f"'_OpNamespace' 'mkldnn' object has no attribute '{operator}'")

    fast, images = accelerated(), torch.randn(1, 3, 33, 33)
    monkeypatch.setattr(torch.ops.mkldnn, operator, missing, raising=False)
    packed.operators_work.cache_clear()
    assert not packed.operators_work()
    assert torch.equal(run(fast, images), unpacked(fast, images))
    assert fast._packed is None


@pytest.mark.parametrize("operator", ["_convolution_pointwise", "_reorder_convolution_weight"])
def test_operators_that_refuse_a_layer(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, images = accelerated(), torch.randn(1, 3, 33, 33)
    assert packed.operators_work()
    monkeypatch.setattr(torch.ops.mkldnn, operator, refuse, raising=False)
    assert relative_error(run(fast, images), unpacked(fast, images)) < 1e-6


def test_operators_that_compute_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", lambda *_: torch.zeros(1, 5, 5, 5), raising=False)
    packed.operators_work.cache_clear()
    assert not packed.operators_work()


@pytest.mark.parametrize("around", [torch.inference_mode, torch.enable_grad, lambda: torch.device("meta")])
def test_the_probe_minds_and_changes_nothing_around_it(around: Callable[[], AbstractContextManager[None]]) -> None:
    packed.operators_work.cache_clear()
    before = torch.get_rng_state()
    with around():
        assert packed.operators_work()
    assert torch.equal(torch.get_rng_state(), before)


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_what_watches_or_traces_sees_the_models_own_operators() -> None:
    fast, images = accelerated(), torch.randn(1, 3, 33, 33)
    out = run(fast, images)
    with Watching() as watching:
        fast(images)
    assert "fastdeeplab.conv_bn_relu.default" in watching.seen
    assert not any("mkldnn" in name for name in watching.seen)
    traced = make_fx(lambda x: fast(x)["out"])(images)
    names = {str(node.target) for node in traced.graph.nodes}
    assert "fastdeeplab.conv_bn_relu.default" in names
    assert not any("mkldnn" in name for name in names)
    with warnings.catch_warnings(action="ignore"):
        jitted = torch.jit.trace(lambda x: fast(x)["out"], images, check_trace=False)
    assert "mkldnn" not in str(jitted.graph)
    assert relative_error(jitted(images), out) < 1e-6


def test_onednn_that_is_turned_off() -> None:
    fast, images = accelerated(), torch.randn(1, 3, 33, 33)
    with torch.backends.mkldnn.flags(enabled=False):
        fast(images)
    assert fast._packed is None


def test_the_model_on_its_live_parameters_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model().eval()
    monkeypatch.setattr(PackedWeights, "convolve", refuse)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 33, 33))["out"].isfinite().all()


def test_kernels_that_were_asked_for_run(device: torch.device) -> None:
    """In the interpreter; what it cannot run, the stem, runs on packed weights."""
    if device.type != "cpu":
        pytest.skip("on a GPU nothing is packed")
    fast = fdl.accelerate(small_model(), kernels="triton")
    run(fast, torch.randn(1, 3, 9, 9))
    assert packed_modules(fast) <= {fast.backbone.conv1, fast.classifier[0].convs[4][1]}

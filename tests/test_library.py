"""PyTorch's path of the kernels' functions: the tail in chunks against the whole, the convolutions, their gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_argmax
from fastdeeplab.kernels import library, reference
from fastdeeplab.kernels.checks import output_shape
from fastdeeplab.kernels.measure import peak_memory, relative_error
from layouts import LAYOUTS
from torch import Tensor

from fastdeeplab import kernels

SIZES = [
    ((8, 9), (64, 72)),
    ((5, 7), (33, 65)),
    ((1, 1), (7, 5)),
    ((1, 6), (9, 1)),
    ((6, 6), (6, 6)),
    ((9, 8), (4, 3)),
    ((3, 9), (40, 5)),
]


@pytest.fixture(params=[1, 700, 1 << 20], ids=["one row", "some rows", "whole"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.CHUNK_ELEMENTS, "cpu", request.param)


def sample(low: tuple[int, int], high: tuple[int, int], K: int = 5, N: int = 3) -> tuple[Tensor, Tensor]:
    target = torch.randint(K, (N, *high))
    target[torch.rand(target.shape) < 0.2] = 255
    return 3 * torch.randn(N, K, *low), target


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(("low", "high"), SIZES, ids=str)
def test_chunks_are_the_rows_of_the_interpolation(low: tuple[int, int], high: tuple[int, int]) -> None:
    logits, _ = sample(low, high)
    expected = F.interpolate(logits.double(), size=high, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    seen = torch.zeros(3, high[0])
    for chunk in library._chunks(logits, high):
        actual = chunk.upsample(logits)
        assert relative_error(actual, expected[chunk.images, chunk.rows]) < 1e-6
        seen[chunk.images, chunk.rows] += 1
    assert (seen == 1).all()


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(("low", "high"), SIZES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_upsample_argmax(low: tuple[int, int], high: tuple[int, int], layout: torch.memory_format) -> None:
    logits = sample(low, high)[0].contiguous(memory_format=layout)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        index = kernels.upsample_argmax(logits, high, dtype=dtype, impl="torch")
        assert index.dtype == dtype
        assert index.is_contiguous()
        assert_argmax(index, logits, high)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_fault_10_nan_and_infinity_in_logits(value: float) -> None:
    logits = torch.randint(-3, 4, (2, 6, 5, 4)).float()
    logits[torch.rand(logits.shape) < 0.05] = value
    expected = reference.upsample_argmax(logits, (40, 32))
    assert torch.equal(kernels.upsample_argmax(logits, (40, 32), impl="torch"), expected)
    assert 0 <= expected.min() <= expected.max() < 6


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(("low", "high"), SIZES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": torch.tensor([0.5, 0.0, 2.0, 1.0, 3.5])},
        {"label_smoothing": 0.1},
        {"weight": torch.tensor([0.5, 0.0, 2.0, 1.0, 3.5]), "label_smoothing": 0.3, "reduction": "sum"},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_upsample_cross_entropy(low: tuple[int, int], high: tuple[int, int], options: dict[str, object]) -> None:
    logits, target = sample(low, high)
    leaf, exact_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    exact_options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    loss = kernels.upsample_cross_entropy(leaf, target, ignore_index=255, impl="torch", **options)  # type: ignore[arg-type]
    exact = reference.upsample_cross_entropy(exact_leaf, target, ignore_index=255, **exact_options)  # type: ignore[arg-type]
    (0.5 * loss).backward()
    (0.5 * exact).backward()
    assert loss.dtype == torch.float32
    assert relative_error(loss.detach(), exact.detach()) < 1e-6
    assert leaf.grad is not None
    assert exact_leaf.grad is not None
    assert relative_error(leaf.grad, exact_leaf.grad) < 2e-6


def test_gradcheck_of_the_reference() -> None:
    logits = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (2, 7, 8))
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: reference.upsample_cross_entropy(x, target, weight=weight, label_smoothing=0.1, ignore_index=2),
        logits,
    )


def test_no_reduction() -> None:
    logits, target = sample((4, 5), (32, 40))
    actual = kernels.upsample_cross_entropy(logits, target, ignore_index=255, reduction="none", impl="torch")
    expected = reference.upsample_cross_entropy(logits, target, ignore_index=255, reduction="none")
    assert actual.shape == target.shape
    torch.testing.assert_close(actual, expected)


def test_half_precision_logits_get_gradients_of_their_own_type() -> None:
    logits, target = sample((4, 5), (32, 40))
    for dtype in (torch.float16, torch.bfloat16):
        leaf = logits.to(dtype).requires_grad_()
        loss = kernels.upsample_cross_entropy(leaf, target, ignore_index=255, impl="torch")
        loss.backward()
        exact_leaf = logits.to(dtype).double().requires_grad_()
        exact = reference.upsample_cross_entropy(exact_leaf, target, ignore_index=255)
        exact.backward()
        assert loss.dtype == torch.float32
        assert relative_error(loss.detach(), exact.detach()) < 1e-6
        assert leaf.grad is not None
        assert exact_leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert (
            relative_error(leaf.grad, exact_leaf.grad)
            <= relative_error(exact_leaf.grad.to(dtype), exact_leaf.grad) * 1.1
        )


def test_fault_14_all_pixels_ignored() -> None:
    logits, target = sample((4, 5), (32, 40))
    logits.requires_grad_()
    loss = kernels.upsample_cross_entropy(logits, torch.full_like(target, 255), ignore_index=255, impl="torch")
    loss.backward()
    assert loss.isnan()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_fault_14_a_stray_target_that_nobody_looked_for_gives_nan() -> None:
    """As on a GPU without ``check_target``: no error, no stray read, a NaN loss."""
    logits, target = sample((4, 5), (32, 40))
    for stray in (-1, 5, 2**40):
        target[0, 3, 4] = stray
        loss, total_weight, _ = library.cross_entropy_forward(logits, target, None, 255, 0.0)
        assert loss.isnan()
        assert total_weight == (target != 255).sum() - 1


@pytest.mark.parametrize("scale", [300.0, 1e4])
def test_large_logits_that_are_right_keep_a_small_loss_exact(scale: float) -> None:
    """The loss is small beside the logits: it must not be a difference of two large numbers."""
    logits, _ = sample((3, 4), (24, 32))
    logits *= scale
    values = F.interpolate(logits.double(), size=(24, 32), mode="bilinear", align_corners=False)
    target = values.argmax(dim=1)

    def loss_and_gradient(function: Callable[..., Tensor], leaf: Tensor, **options: str) -> tuple[Tensor, Tensor]:
        loss = function(leaf.requires_grad_(), target, **options)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    exact = loss_and_gradient(reference.upsample_cross_entropy, logits.double())
    theirs = loss_and_gradient(reference.upsample_cross_entropy, logits.clone())
    ours = loss_and_gradient(kernels.upsample_cross_entropy, logits.clone(), impl="torch")
    for actual, expected, peer in zip(ours, exact, theirs, strict=True):
        assert relative_error(actual, expected) <= 2 * relative_error(peer, expected) + 1e-6


def test_fault_12_empty_batch() -> None:
    logits, target = torch.empty(0, 4, 3, 3, requires_grad=True), torch.empty(0, 6, 6, dtype=torch.int64)
    assert kernels.upsample_argmax(logits, (6, 6), impl="torch").shape == (0, 6, 6)
    assert kernels.upsample_cross_entropy(logits, target, impl="torch").isnan()
    assert kernels.upsample_cross_entropy(logits, target, reduction="sum", impl="torch") == 0


def test_peak_memory_of_predict_and_loss() -> None:
    """K = 150 at 512x512: full-size fp32 logits alone are 157 MB, and the naive loss holds several of them."""
    logits, target = torch.randn(1, 150, 64, 64), torch.randint(150, (1, 512, 512))

    def step(function: Callable[..., Tensor], **options: str) -> int:
        leaf = logits.clone().requires_grad_()
        return peak_memory(lambda: function(leaf, target, **options).backward(), logits.device)

    naive, ours = step(reference.upsample_cross_entropy), step(kernels.upsample_cross_entropy, impl="torch")
    mask = peak_memory(lambda: kernels.upsample_argmax(logits, (512, 512), impl="torch"), logits.device)
    full = 4 * 150 * 512 * 512
    print(f"loss step: {ours / 2**20:.0f} MiB against {naive / 2**20:.0f} MiB; argmax: {mask / 2**20:.0f} MiB")
    assert naive >= 2 * full
    assert ours <= 0.25 * full
    assert mask <= 0.25 * full


CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"kernel": 3, "padding": 1},
    {"kernel": 3, "padding": 4, "dilation": 4, "scaled": False},
    {"kernel": 3, "padding": 24, "dilation": 24},
    {"kernel": 3, "stride": 2, "padding": 1},
    {"kernel": 1, "stride": 2, "relu": False},
    {"kernel": 7, "stride": 2, "padding": 3},
    {"kernel": 3, "relu": False, "scaled": False},
]


def convolution(
    dtype: torch.dtype = torch.float32,
    *,
    C_out: int = 6,
    kernel: int = 1,
    scaled: bool = True,
    residual: bool = True,
    size: tuple[int, int] = (9, 7),
    **options: Any,
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """Arguments of ``conv_bn_relu``."""
    x, weight = torch.randn(2, 8, *size).to(dtype), torch.randn(C_out, 8, kernel, kernel).div(kernel).to(dtype)
    geometry = {"stride": 1, "padding": 0, "dilation": 1} | {k: v for k, v in options.items() if k != "relu"}
    added = torch.randn(output_shape(x, weight, **geometry)).to(dtype) if residual else None
    return (x, weight, torch.rand(C_out) + 0.5 if scaled else None, torch.randn(C_out), added), options


def aspp(dtype: torch.dtype = torch.float32, scaled: bool = True) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``aspp_branches``."""
    weights = [torch.randn(4, 8, size, size).div(size).to(dtype) for size in (1, 3, 3, 3)]
    scale = torch.rand(16) + 0.5 if scaled else None
    return (torch.randn(2, 8, 9, 7).to(dtype), weights, scale, torch.randn(16)), {"rates": (2, 4, 8)}


def projection(dtype: torch.dtype = torch.float32, scaled: bool = True) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``aspp_projection``."""
    branches, pooled = torch.randn(2, 16, 9, 7).to(dtype), torch.randn(2, 4, 1, 1).to(dtype)
    weight = torch.randn(6, 20, 1, 1).div(4).to(dtype)
    return (branches, pooled, weight, torch.rand(6) + 0.5 if scaled else None, torch.randn(6)), {}


def in_fp64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    return [in_fp64(item) for item in value] if isinstance(value, tuple | list) else value


def errors(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[float, float]:
    """Of the library and of plain PyTorch in the same dtype, against fp64."""
    exact = getattr(reference, name)(*in_fp64(arguments), **options)
    actual = getattr(kernels, name)(*arguments, impl="torch", **options)
    assert actual.dtype == arguments[0].dtype
    assert actual.stride() == torch.empty(actual.shape).contiguous(memory_format=torch.channels_last).stride()
    return relative_error(actual, exact), relative_error(plain(name, arguments, options), exact)


def plain(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The reference in the dtype of x, batch norm's numbers included."""
    dtype = arguments[0].dtype
    cast = [value.to(dtype) if isinstance(value, Tensor) else value for value in arguments]
    return getattr(reference, name)(*cast, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_conv_bn_relu(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """At most half an eps worse than PyTorch's: the rounding of the folded weight."""
    for residual in (False, True):
        ours, theirs = errors("conv_bn_relu", *convolution(dtype, residual=residual, **options))
        assert ours <= theirs + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("arguments", [aspp, projection])
def test_aspp(dtype: torch.dtype, scaled: bool, arguments: Callable[..., Any]) -> None:
    name = "aspp_branches" if arguments is aspp else "aspp_projection"
    ours, theirs = errors(name, *arguments(dtype, scaled))
    assert ours <= theirs + torch.finfo(dtype).eps / 2


def test_convolutions_of_fp64_stay_in_fp64() -> None:
    ours, _ = errors("conv_bn_relu", *convolution(torch.float64, kernel=3, padding=1))
    assert ours < 1e-15
    for name, arguments in (("aspp_branches", aspp), ("aspp_projection", projection)):
        ours, _ = errors(name, *arguments(torch.float64))
        assert ours < 1e-15


def leaves(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone().requires_grad_()
    return [leaves(item) for item in value] if isinstance(value, tuple | list) else value


@pytest.mark.parametrize("impl", ["torch", "auto"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("conv_bn_relu", partial(convolution, kernel=3, padding=2, dilation=2)),
        ("conv_bn_relu", partial(convolution, scaled=False, residual=False, relu=False)),
        ("aspp_branches", aspp),
        ("aspp_projection", projection),
    ],
)
def test_gradients_of_every_input(name: str, arguments: Callable[[], Any], impl: str) -> None:
    tensors, options = arguments()

    def gradients(function: Callable[..., Tensor], inputs: Any, **more: str) -> list[Tensor]:
        inputs = leaves(inputs)
        function(*inputs, **options, **more).square().sum().backward()
        flat = [item for value in inputs for item in (value if isinstance(value, list) else [value])]
        return [item.grad for item in flat if isinstance(item, Tensor)]

    ours = gradients(getattr(kernels, name), tensors, impl=impl)
    exact = gradients(getattr(reference, name), in_fp64(tensors))
    assert len(ours) == len(exact) >= 3
    for actual, expected in zip(ours, exact, strict=True):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "arguments"), [("conv_bn_relu", convolution), ("aspp_branches", aspp), ("aspp_projection", projection)]
)
def test_a_kernel_refuses_to_lose_a_gradient(name: str, arguments: Callable[[], Any]) -> None:
    """Rather than return a result that nothing can be backpropagated through."""
    tensors, options = arguments()
    with pytest.raises(RuntimeError, match=f"{name} has no gradient as a Triton kernel"):
        getattr(kernels, name)(*leaves(tensors), impl="triton", **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fault_05_convolutions_of_any_strides(layout: str) -> None:
    (x, weight, scale, shift, residual), options = convolution(kernel=3, padding=2, dilation=2)
    assert x is not None
    assert weight is not None
    assert residual is not None
    expected = kernels.conv_bn_relu(x, weight, scale, shift, residual, impl="torch", **options)
    moved = [LAYOUTS[layout](tensor) for tensor in (x, weight, residual)]
    actual = kernels.conv_bn_relu(moved[0], moved[1], scale, shift, moved[2], impl="torch", **options)
    torch.testing.assert_close(actual, expected)


def test_the_scale_is_folded_into_the_weight_in_fp32_and_rounded_once() -> None:
    weight, scale = torch.randn(6, 8, 3, 3).half(), torch.rand(6)
    folded, rest = library._folded(weight.contiguous(memory_format=torch.channels_last), scale)
    assert rest is not None
    assert torch.equal(rest, torch.ones(6))
    assert torch.equal(folded, (weight.double() * scale.double()[:, None, None, None]).float().half())
    assert folded.is_contiguous(memory_format=torch.channels_last)


def test_out_is_a_slice_of_a_buffer() -> None:
    arguments, options = convolution(kernel=3, padding=1)
    buffer = torch.full((2, 12, 9, 7), torch.nan).contiguous(memory_format=torch.channels_last)
    out = buffer[:, 4:10]
    assert kernels.conv_bn_relu(*arguments, out=out, impl="torch", **options) is out
    assert torch.equal(out, kernels.conv_bn_relu(*arguments, impl="torch", **options))
    assert buffer[:, :4].isnan().all()
    assert buffer[:, 10:].isnan().all()


def test_fault_12_convolutions_of_an_empty_batch_and_a_single_pixel() -> None:
    for N, size in ((0, (5, 4)), (2, (1, 1))):
        x = torch.randn(N, 8, *size)
        weights = [torch.randn(4, 8, kernel, kernel) for kernel in (1, 3, 3)]
        branches = kernels.aspp_branches(x, weights, None, torch.randn(12), rates=(6, 12), impl="torch")
        assert branches.shape == (N, 12, *size)
        pooled, weight = torch.randn(N, 3, 1, 1), torch.randn(5, 15, 1, 1)
        assert kernels.aspp_projection(branches, pooled, weight, None, torch.randn(5), impl="torch").shape == (
            N,
            5,
            *size,
        )
        assert kernels.conv_bn_relu(x, weights[0], None, torch.randn(4), impl="torch").shape == (N, 4, *size)


def test_nan_passes_the_relu() -> None:
    x = torch.randn(1, 8, 2, 2)
    x[0, 3, 1, 1] = torch.nan
    y = kernels.conv_bn_relu(x, torch.randn(4, 8, 1, 1), None, torch.randn(4), impl="torch")
    assert y.isnan().sum() == 4


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.gpu) if form == "cudnn_relu" else form for form in library.FORMS]
)
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("residual", ["none", "other", "x"])
def test_every_form(form: str, options: dict[str, Any], residual: str, device: torch.device) -> None:
    """Also with a residual that is x itself: cuDNN has had wrong results there (pytorch#62926).

    cuDNN need not serve 6 channels in fp16.
    """
    C_out = 8 if form == "cudnn_relu" or residual == "x" else 6
    (*tensors, added), options = convolution(torch.float16, C_out=C_out, **options)
    x, weight, scale, shift = (None if tensor is None else tensor.to(device) for tensor in tensors)
    added = {"none": None, "other": added.to(device), "x": x}[residual]
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "relu": True} | options
    if residual == "x" and output_shape(x, weight, *list(defaults.values())[:3]) != x.shape:
        pytest.skip("the residual has the result's shape, which is not x's here")
    exact = reference.conv_bn_relu(*in_fp64((x, weight, scale, shift, added)), **options)
    actual = library.FORMS[form](x, weight, scale, shift, added, *defaults.values())
    assert relative_error(actual, exact) < 3 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.gpu) if form == "cudnn_relu" else form for form in library.FORMS]
)
@pytest.mark.parametrize(("of_x", "of_weight", "of_scale"), [(1e-3, 1, 1e5), (1e3, 1, 1e-6), (10, 1e3, 1e-6)])
def test_a_scale_that_fp16_weights_can_not_take(
    form: str, of_x: float, of_weight: float, of_scale: float, device: torch.device
) -> None:
    """The product would be infinite or nothing, or the result overflow before the scale; the end result is ordinary."""
    generator = torch.Generator().manual_seed(0)
    x = (of_x * torch.rand(2, 64, 5, 4, generator=generator)).half()
    weight = (of_weight * (0.5 + torch.rand(8, 64, 1, 1, generator=generator))).half()
    scale, shift = of_scale * (1 + torch.rand(8, generator=generator)), torch.rand(8, generator=generator)
    scale[0], weight[1] = 0, 0
    arguments = [value.to(device) for value in (x, weight, scale, shift)]
    exact = reference.conv_bn_relu(*in_fp64(tuple(arguments)))
    assert 0 < exact.max() < 6e4
    actual = library.FORMS[form](*arguments, None, 1, 0, 1, True)
    assert actual.dtype == torch.float16
    assert relative_error(actual, exact) < 3 * torch.finfo(torch.float16).eps


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("convolve", [library.conv_pointwise, library.conv_fused_pointwise])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scaled", [True, False])
def test_every_form_of_the_projection(
    convolve: Callable[..., Tensor], dtype: torch.dtype, scaled: bool, device: torch.device
) -> None:
    """A shift per image is added by both; to more than one image."""
    arguments = [None if value is None else value.to(device) for value in projection(dtype, scaled)[0]]
    assert len(arguments[0]) > 1
    exact = reference.aspp_projection(*in_fp64(tuple(arguments)))
    actual = library.projection_of_branches(convolve, *arguments)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(actual, exact) < 3 * torch.finfo(dtype).eps

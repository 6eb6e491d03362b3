"""Check this installation on this machine: every implementation of every function, every tile choice, the network.

Everything is compared with fp64: a function with ``fastdeeplab.kernels.reference``, the network with PyTorch's own
layers, one by one. What can't run here is listed with the reason. On a GPU the choices of a kernel are compiled side by
side, then compared one after another.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdeeplab import kernels
from fastdeeplab.accelerate import AcceleratedModel, accelerate
from fastdeeplab.kernels import reference
from fastdeeplab.kernels.candidates import TILES, Gpu, Layer, Tile
from fastdeeplab.kernels.choice import CONVOLUTIONS, DTYPES, convolution_precision, kernels_are_off, why_not
from fastdeeplab.kernels.measure import largest_error, relative_error
from fastdeeplab.kernels.tuning import (
    kernel_call,
    library_call,
    library_forms,
    random_inputs,
    tile_choices,
    tile_name,
    tolerance,
)
from fastdeeplab.model import ResNetModel, upsample_logits
from fastdeeplab.speed.rivals import layer_by_layer, short_name

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

OK, WRONG, FAILED, NOT_RUN = "ok", "WRONG", "failed: ", "not run: "
IGNORED = 255

# Of the loss, ||difference|| / ||fp64||: fp32 terms, whose rounding errors cancel in their sum.
LOSS_LIMIT = 1e-5
# Of the network's logits: in full fp32, rounding errors of 53 convolutions in a row. In fp16 and bf16, PyTorch's own
# layers tell what they amount to; ours round less often, and the factor leaves room for chance. In TF32 tensor cores
# may cut values off, by which a product loses up to 2^-10 on average, and each convolution again.
NETWORK_LIMIT, NETWORK_FACTOR, TF32_LIMIT = 1e-4, 2.0, 53 * 2**-10


class Check(NamedTuple):
    """One result that was compared, or could not be."""

    function: str  # of fastdeeplab.kernels, or "network"
    what: str  # shape and options
    implementation: str  # "torch", "triton" or, of the network, "auto"
    choice: str  # tile choice or form of the library; "" for what the function itself chooses
    dtype: str
    error: float  # NaN if there is none
    limit: float
    verdict: str  # "ok", "WRONG", "failed: why" or "not run: why"

    @property
    def bad(self) -> bool:
        return self.verdict == WRONG or self.verdict.startswith(FAILED)


def verify(device: torch.device, *, quick: bool = False) -> Iterator[Check]:
    """Compare all that can run on a device with fp64.

    Args:
        device: a CUDA GPU; or a CPU, where kernels run only in Triton's interpreter (``TRITON_INTERPRET=1``).
        quick: fewer shapes, each tile choice on one of them and without splits, and the network in fp16 only.

    Yields:
        A check after the other, as they are done. What raises is "failed"; after an error that leaves the GPU unusable
        the rest is "not run".

    Raises:
        ValueError: the device is of another type.
    """
    for subject in _subjects(device, quick):
        yield from _checks(subject, device)


def run_verify(console: "Console", device: torch.device, *, quick: bool = False) -> bool:
    """Verify with a progress bar on stderr, print a table, and return whether nothing was wrong or failed.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA GPU.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    subjects = _subjects(device, quick)
    checks: list[Check] = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(subjects))
        for subject in subjects:
            progress.update(task, description=subject.function)
            checks += _checks(subject, device)
            progress.advance(task)
    console.print(_table(checks, device))
    bad, not_run = sum(check.bad for check in checks), sum(check.verdict.startswith(NOT_RUN) for check in checks)
    console.print(f"{len(checks) - bad - not_run} right, {bad} wrong or failed, {not_run} could not run")
    return bad == 0


@dataclass(frozen=True)
class _Trial:
    """One way to compute a subject."""

    implementation: str
    choice: str
    limit: float
    error: Callable[[], float]  # computes and compares


@dataclass(frozen=True)
class _Subject:
    """What is computed in several ways that are compared with one fp64 result."""

    function: str
    what: str
    dtype: str
    trials: Callable[[], list[_Trial]]  # computes the fp64 result

    def check(self, implementation: str, choice: str, verdict: str, error: float, limit: float) -> Check:
        return Check(self.function, self.what, implementation, choice, self.dtype, error, limit, verdict)


class _CanNotRunError(Exception):
    """Why kernels can't run here."""


def _subjects(device: torch.device, quick: bool) -> list[_Subject]:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA GPU, got {device}")
    return [
        *_argmax_subjects(device, quick),
        *_loss_subjects(device, quick),
        *_convolution_subjects(device, quick),
        *_network_subjects(device, quick),
        *_obstacles(device),
    ]


def _checks(subject: _Subject, device: torch.device) -> Iterator[Check]:
    unusable = _why_unusable(device)
    if unusable:
        yield subject.check("", "", NOT_RUN + unusable, math.nan, math.nan)
        return
    try:
        trials = subject.trials()
    except Exception as error:
        yield subject.check("", "", _verdict(error), math.nan, math.nan)
        return
    ours = [trial for trial in trials if trial.implementation == "triton"]
    if device.type == "cuda" and ours:
        _compile(ours)
        if unusable := _why_unusable(device):
            yield subject.check("triton", f"one of {len(ours)}", FAILED + unusable, math.nan, math.nan)
            return
    for trial in trials:
        found, verdict = math.nan, NOT_RUN + unusable
        if not unusable:
            try:
                found = trial.error()
                verdict = OK if found <= trial.limit else WRONG  # NaN is wrong, too
            except Exception as error:  # a compiler's, a launch's
                verdict, unusable = _verdict(error), _why_unusable(device)
        yield subject.check(trial.implementation, trial.choice, verdict, found, trial.limit)


def _compile(trials: Sequence[_Trial]) -> None:
    """Run all once, side by side, for what they compile. What fails will fail again when it is compared."""

    def run(trial: _Trial) -> None:
        with suppress(Exception):
            trial.error()

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, trials))


def _why_unusable(device: torch.device) -> str:
    """Empty unless a kernel has left the GPU in a state in which no call succeeds."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        return f"the GPU is unusable after an error: {_first_line(error)}"
    return ""


def _verdict(error: Exception) -> str:
    """Too little memory says nothing about the result."""
    can_not_run = isinstance(error, _CanNotRunError | torch.OutOfMemoryError)
    return (NOT_RUN if can_not_run else FAILED) + _first_line(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _why_no_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    return "FASTDEEPLAB_KERNELS=torch" if kernels_are_off() else why_not(device, dtype)


def _implementations(device: torch.device, dtype: torch.dtype) -> list[str]:
    return ["torch"] if _why_no_kernels(device, dtype) else ["torch", "triton"]


def _obstacles(device: torch.device) -> Iterator[_Subject]:
    """A line for each function whose kernel can't run, and for each kernel that has no tile choice for this GPU."""

    def can_not_run(why: str) -> list[_Trial]:
        raise _CanNotRunError(why)

    dtypes: dict[str, list[torch.dtype]] = {}
    for dtype in DTYPES:
        if why := _why_no_kernels(device, dtype):
            dtypes.setdefault(why, []).append(dtype)
    for why, those in dtypes.items():
        for function in kernels.FUNCTIONS:
            yield _Subject(function, "the Triton kernel", ", ".join(map(short_name, those)), partial(can_not_run, why))

    able = [dtype for dtype in DTYPES if not _why_no_kernels(device, dtype)]
    if able:
        gpu = Gpu.of(device)
        listed = {
            tile.kernel
            for dtype in able
            for layer in _layers(device, dtype)
            for tile in tile_choices(layer, device, wasteful=True)
        }
        for kernel in sorted({row[1].kernel for row in TILES} - listed):
            why = "it has no tile choice for {}, compute capability {}.{}".format(gpu.name, *gpu.capability)
            yield _Subject(CONVOLUTIONS[0], f"the kernel {kernel}", "", partial(can_not_run, why))


# upsample_argmax


def _argmax_subjects(device: torch.device, quick: bool) -> Iterator[_Subject]:
    shapes: list[tuple[Sequence[int], tuple[int, int], torch.dtype]] = [
        ((2, 21, 65, 65), (513, 513), torch.int64),
        ((1, 150, 64, 64), (512, 512), torch.uint8),
        ((3, 19, 70, 41), (33, 64), torch.int32),
    ]
    if device.type == "cpu":
        shapes = [
            ((2, 5, 3, 4), (19, 27), torch.int64),
            ((1, 7, 3, 3), (24, 24), torch.uint8),
            ((3, 3, 9, 8), (4, 15), torch.int32),
        ]
    for dtype in DTYPES:
        for shape, size, index in shapes[:1] if quick else shapes:
            what = f"{_times(shape)}->{_times(size)} {short_name(index)}"
            trials = partial(_argmax_trials, shape, size, index, dtype, device)
            yield _Subject("upsample_argmax", what, short_name(dtype), trials)


def _argmax_trials(
    shape: Sequence[int], size: tuple[int, int], index: torch.dtype, dtype: torch.dtype, device: torch.device
) -> list[_Trial]:
    logits = _random_logits(shape, dtype, device)
    full = upsample_logits(logits.double(), size)
    limit = 2 * _interpolation_rounding(shape)  # of two classes' logits

    def trial(implementation: str, choice: str, call: Callable[[], Tensor]) -> _Trial:
        def error() -> float:
            _soil((shape[0], *size), index, device)
            return shortfall(call(), full)

        return _Trial(implementation, choice, limit, error)

    implementations = _implementations(device, dtype)
    trials = [
        trial(impl, "", partial(kernels.upsample_argmax, logits, size, dtype=index, impl=impl))
        for impl in implementations
    ]
    if "triton" in implementations:
        from fastdeeplab.kernels import argmax

        for tile in argmax.TILES:
            call = partial(argmax.upsample_argmax, logits, size, index, tile=tile)
            trials.append(trial("triton", f"{tile.rows}x{tile.columns}", call))
    return trials


def shortfall(indices: Tensor, full: Tensor) -> float:
    """How far the chosen class's logit is below the best one at the worst pixel, over the largest logit.

    Args:
        indices: (N, H, W).
        full: (N, K, H, W) logits in fp64.

    Returns:
        Infinity where the shape is another or an index is no class.
    """
    if indices.shape != full[:, 0].shape or indices.min() < 0 or indices.max() >= full.shape[1]:
        return math.inf
    chosen = full.gather(1, indices.long()[:, None])[:, 0]
    return float((full.amax(1) - chosen).max() / full.abs().max())


def _interpolation_rounding(shape: Sequence[int]) -> float:
    """By how much interpolation in fp32 may be off, over the largest logit.

    A source coordinate is off by its own rounding, at most its size * 2^-23, and moves a value by twice the largest
    logit per unit on each axis; the products and sums add six roundings.
    """
    return 2 * sum(shape[2:]) * 2**-23 + 6 * 2**-24


# upsample_cross_entropy


def _loss_subjects(device: torch.device, quick: bool) -> Iterator[_Subject]:
    cases: list[tuple[Sequence[int], tuple[int, int], dict[str, Any]]] = [
        ((4, 21, 65, 65), (513, 513), {"reduction": "sum", "label_smoothing": 0.1}),
        ((1, 150, 64, 64), (512, 512), {"reduction": "mean"}),
    ]
    if device.type == "cpu":
        small = [((2, 5, 3, 4), (19, 27)), ((1, 7, 3, 3), (24, 24))]
        cases = [(shape, size, options) for (shape, size), (_, _, options) in zip(small, cases, strict=True)]
    for dtype in DTYPES:
        for shape, size, options in cases[:1] if quick else cases:
            for part in ("loss", "gradient"):
                what = f"{part}, {_times(shape)}->{_times(size)} {options['reduction']}"
                trials = partial(_loss_trials, part, shape, size, options, dtype, device)
                yield _Subject("upsample_cross_entropy", what, short_name(dtype), trials)


def _loss_trials(
    part: str,
    shape: Sequence[int],
    size: tuple[int, int],
    options: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> list[_Trial]:
    generator = torch.Generator(device).manual_seed(1)
    logits = _random_logits(shape, dtype, device)
    target = torch.randint(shape[1], (shape[0], *size), device=device, generator=generator)
    target[torch.rand(target.shape, device=device, generator=generator) < 0.1] = IGNORED
    weight = None
    if options["reduction"] == "sum":
        weight = torch.rand(shape[1], device=device, generator=generator) + 0.5

    def compute(function: Callable[..., Tensor], dtype: torch.dtype, **impl: str) -> Tensor:
        values = logits.to(dtype).requires_grad_()
        class_weight = None if weight is None else weight.to(torch.promote_types(dtype, torch.float32))
        with torch.enable_grad():
            loss = function(values, target, weight=class_weight, ignore_index=IGNORED, **options, **impl)
            if part == "loss":
                return loss.detach()
            # Times some number, as a gradient scaler does it: the mean's gradients are too small for fp16.
            factor = torch.full_like(loss, 1.0 if options["reduction"] == "sum" else 1000.0)
            return torch.autograd.grad(loss, values, factor)[0]

    expected = compute(reference.upsample_cross_entropy, torch.float64)
    # Gradients of half precision are rounded once, at the end.
    limit = LOSS_LIMIT if part == "loss" or dtype == torch.float32 else 2 * torch.finfo(dtype).eps

    def error(impl: str) -> float:
        _soil(expected.shape, dtype, device)
        return relative_error(compute(kernels.upsample_cross_entropy, dtype, impl=impl), expected)

    return [_Trial(impl, "", limit, partial(error, impl)) for impl in _implementations(device, dtype)]


# Convolutions


def _convolution_subjects(device: torch.device, quick: bool) -> Iterator[_Subject]:
    for dtype in DTYPES:
        for layer, tiles in chosen_tiles(_layers(device, dtype), device, quick):
            trials = partial(_convolution_trials, layer, tiles, device)
            yield _Subject(layer.function, str(layer), _convolution_dtype(dtype, device), trials)


def chosen_tiles(layers: Sequence[Layer], device: torch.device, quick: bool) -> Iterator[tuple[Layer, list[Tile]]]:
    """The tile choices to verify on each layer, so that a function has all that any of its layers may have.

    Those without splits on every layer, those with splits on the first that may have them. If ``quick``, those without
    splits on the first that may have them.
    """
    seen: set[tuple[str, Tile]] = set()
    for layer in layers:
        tiles = [] if kernels_are_off() else tile_choices(layer, device, wasteful=True)
        fresh = {(layer.function, tile) for tile in tiles} - seen
        seen |= fresh
        if quick:
            yield layer, [tile for tile in tiles if tile.splits == 1 and (layer.function, tile) in fresh]
        else:
            yield layer, [tile for tile in tiles if tile.splits == 1 or (layer.function, tile) in fresh]


def _layers(device: torch.device, dtype: torch.dtype) -> list[Layer]:
    """Of each function and each kind of convolution in the network one, odd channel counts, rates near and far."""
    # With few pixels and many channels, so that the K loop can be split.
    cpu = device.type == "cpu"
    N, C, H, W, C_out, deep = (1, 40, 5, 6, 24, 136) if cpu else (2, 512, 17, 19, 192, 2048)
    far, near = ((2, 4, 9), (1, 2)) if cpu else ((4, 9, 36), (1, 2, 18))

    def layer(function: str, shape: tuple[int, ...], C_out: int, kernel: int = 1, **options: Any) -> Layer:
        aligned = all(channels * dtype.itemsize % 16 == 0 for channels in (shape[1], C_out))
        precision = convolution_precision(device) if dtype == torch.float32 else "tf32"
        weight_shape = (C_out, shape[1], kernel, kernel)
        return Layer.of(function, shape, weight_shape, dtype, aligned=aligned, precision=precision, **options)

    return [
        layer("conv_bn_relu", (N, C, H, W), C_out, 3, padding=4, dilations=(4,), residual=True),
        layer("conv_bn_relu", (N, deep, H, W), C_out, residual=True),
        layer("conv_bn_relu", (N, C, H, W), C_out, stride=2, relu=False),
        layer("conv_bn_relu", (N, C, H, W), C_out, 3, stride=2, padding=1),
        layer("conv_bn_relu", (N + 1, C + 8, H, W), C_out + 8, 3, padding=1),
        layer("conv_bn_relu", (N, deep + 3, H, W), 21, relu=False),
        layer("aspp_branches", (1, deep, H, W), C_out, 3, dilations=far),
        layer("aspp_branches", (N + 1, C, H, W), 8, 3, dilations=near),
        layer("aspp_projection", (2, deep, H, W), C_out),
    ]


def _convolution_trials(layer: Layer, tiles: Sequence[Tile], device: torch.device) -> list[_Trial]:
    """The public function with a scale, then forms of the library and tile choices without, as after folding."""
    inputs, limit = random_inputs(layer, device), tolerance(layer.dtype, device)
    branches = 1 + len(layer.dilations) if layer.function == "aspp_branches" else 1
    generator = torch.Generator(device).manual_seed(1)
    scale = torch.rand(branches * layer.C_out, device=device, generator=generator) + 0.5
    scaled, plain = (_reference(layer, inputs, values) for values in (scale, None))
    can_run = _implementations(device, layer.dtype)

    def trial(impl: str, choice: str, expected: Tensor, call: Callable[[], Tensor]) -> _Trial:
        def error() -> float:
            _soil(expected.shape, layer.dtype, device)
            return largest_error(call(), expected)

        return _Trial(impl, choice, limit, error)

    arguments, options = _arguments(layer, inputs, scale)
    function = partial(getattr(kernels, layer.function), *arguments, **options)
    trials = [trial(impl, "", scaled, partial(function, impl=impl)) for impl in can_run]
    forms = library_forms(layer, device)
    for form in forms if "triton" in can_run else forms[:1]:  # the others may need Triton, too
        trials.append(trial("torch", form, plain, partial(library_call(layer, form), *inputs)))
    for tile in tiles:
        trials.append(trial("triton", tile_name(tile), plain, partial(kernel_call(layer, tile), *inputs)))
    return trials


def _arguments(layer: Layer, inputs: Sequence[Any], scale: Tensor | None) -> tuple[list[Any], dict[str, Any]]:
    """Of the layer's function, from its ``random_inputs``."""
    if layer.function == "aspp_branches":
        x, shift, *weights = inputs
        return [x, weights, scale, shift], {"rates": layer.dilations}
    if layer.function == "aspp_projection":
        branches, pooled, weight, shift = inputs
        return [branches, pooled, weight, scale, shift], {}
    x, weight, shift, residual = inputs
    (dilation,) = layer.dilations
    options = {"stride": layer.stride, "padding": layer.padding, "dilation": dilation, "relu": layer.relu}
    return [x, weight, scale, shift, residual], options


def _reference(layer: Layer, inputs: Sequence[Any], scale: Tensor | None) -> Tensor:
    in_fp64 = [None if value is None else value.double() for value in (*inputs, scale)]
    arguments, options = _arguments(layer, in_fp64[:-1], in_fp64[-1])
    return getattr(reference, layer.function)(*arguments, **options)


# The network


def _network_subjects(device: torch.device, quick: bool) -> Iterator[_Subject]:
    config: dict[str, Any] = {"depth": 50}
    shape: Sequence[int] = (1, 3, 513, 513)
    name = "ResNet-50"
    if device.type == "cpu":
        interpreted = _why_no_kernels(device, torch.float32) is None
        config = {"width": 0.125, "layers": (1, 1, 1, 1)} if interpreted else {"width": 0.25, "layers": (2, 2, 2, 2)}
        shape = (1, 3, 33, 41) if interpreted else (2, 3, 97, 113)
        name = f"{sum(config['layers'])} blocks, width {config['width']}"
    for dtype in (torch.float16,) if quick else DTYPES:
        for part in ("logits", "mask"):
            trials = partial(_network_trials, part, config, shape, dtype, device)
            yield _Subject("network", f"{part}, {name}, {_times(shape)}", _convolution_dtype(dtype, device), trials)


def _network_trials(
    part: str, config: dict[str, Any], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[_Trial]:
    model = _random_network(config).to(device)
    images = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(1))
    expected = _logits(model, images, torch.float64)
    if part == "mask":
        limit = 0.0  # pixels
    elif dtype == torch.float32:
        limit = TF32_LIMIT if convolution_precision(device) == "tf32" else NETWORK_LIMIT
    else:
        limit = NETWORK_FACTOR * relative_error(_logits(model, images, dtype), expected)

    def error(fast: AcceleratedModel) -> float:
        logits = fast(images, upsample=False)["out"]
        return relative_error(logits, expected) if part == "logits" else wrong_pixels(fast, images, logits, expected)

    return [
        _Trial(impl, "", limit, partial(error, accelerate(model, kernels=impl, dtype=dtype)))
        for impl in (*_implementations(device, dtype), "auto")
    ]


def wrong_pixels(fast: AcceleratedModel, images: Tensor, logits: Tensor, expected: Tensor) -> int:
    """How many pixels of the predicted mask differ from the mask of fp64, near-ties left out.

    A near-tie is a pixel whose two best logits lie so close that the logits' largest error, and the rounding of their
    interpolation, can swap them.

    Args:
        images: (B, C, H, W).
        logits: (B, K, h, w) of the model.
        expected: the same in fp64.
    """
    rounding = _interpolation_rounding(expected.shape) * float(expected.abs().max())
    bound = 2 * (float((logits - expected).abs().max()) + rounding)
    full = upsample_logits(expected, images.shape[-2:])
    best = full.topk(2, dim=1).values
    differs = fast.predict(images) != full.argmax(1)
    return int((differs & ~(best[:, 0] - best[:, 1] < bound)).sum())


def _random_network(config: dict[str, Any]) -> ResNetModel:
    """With batch norms that differ from the identity, as those of a trained network do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNetModel(aux_head=False, **config)
        norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            for values in (norm.running_mean, norm.bias):
                nn.init.uniform_(values, -0.2, 0.2)
            for values in (norm.running_var, norm.weight):
                nn.init.uniform_(values, 0.5, 1.5)
    return model.eval()


def _logits(model: ResNetModel, images: Tensor, dtype: torch.dtype) -> Tensor:
    """By PyTorch's own layers."""
    return layer_by_layer(copy.deepcopy(model).to(dtype).requires_grad_(False), images.to(dtype))


# What several of them need


def _random_logits(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """In channels_last memory, as the head gives them."""
    logits = 3 * torch.randn(tuple(shape), device=device, generator=torch.Generator(device).manual_seed(0))
    return logits.to(dtype, memory_format=torch.channels_last)


def _soil(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Write nonsense where the allocator will most likely put the result: what is not written is then no old result."""
    nonsense = math.nan if dtype.is_floating_point else torch.iinfo(dtype).max
    torch.full(tuple(shape), nonsense, dtype=dtype, device=device)


def _convolution_dtype(dtype: torch.dtype, device: torch.device) -> str:
    tf32 = dtype == torch.float32 and convolution_precision(device) == "tf32"
    return f"{short_name(dtype)} (TF32)" if tf32 else short_name(dtype)


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


# The table


def _table(checks: Sequence[Check], device: torch.device) -> "Table":
    """A line for each check that is bad, and one for all choices of an implementation that have the same verdict."""
    from rich.table import Table
    from rich.text import Text

    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    table = Table(title=f"compared with fp64 on {place}, torch {torch.__version__}", title_justify="left")
    for name in ("compared", "dtype", "runs", "choice", "error", "limit", "verdict"):
        table.add_column(name, justify="right" if name in ("error", "limit") else "left", overflow="fold")
    for function in (*kernels.FUNCTIONS, "network"):
        lines: dict[Check, list[Check]] = {}
        for check in checks:
            if check.function == function:
                lines.setdefault(check if check.bad else check._replace(choice="", error=0.0), []).append(check)
        table.add_section()
        table.add_row(function, style="bold")
        for line, those in lines.items():
            choice = those[0].choice if len(those) == 1 else f"{len(those)} choices"
            error = max(check.error for check in those)
            numbers = ["" if math.isnan(number) else f"{number:.2g}" for number in (error, line.limit)]
            cells = [line.what, line.dtype, line.implementation, choice, *numbers, line.verdict]
            table.add_row(*map(Text, cells), style="red" if line.bad else None)
    return table

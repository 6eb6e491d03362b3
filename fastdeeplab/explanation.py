"""Which implementation each module of a model runs, and why."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastdeeplab import kernels, packed
from fastdeeplab.accelerate import AcceleratedModel
from fastdeeplab.fusion import FUSED
from fastdeeplab.model import ResNetModel

Rows = list[tuple[str, ...]]
PACKED = "Where nobody watches, convolutions of small maps run on weights in oneDNN's own layout: see AcceleratedModel."


def explain(module: nn.Module, images: Tensor | None = None) -> str:
    """Say for every module with a ``kernel`` flag which implementation runs and why.

    Without images, the answer is for inputs of the device and dtype of the module's parameters; a module without any,
    such as a loss, is explained for fp32 on the GPU that there is, or else the CPU. A flag that can't be followed is
    shown with the reason; calling the module raises it.

    With images, the module runs on them once, in eval mode (a ``ResNetModel`` by ``predict``), and every convolution is
    listed with its shape, the tail, upsampling and argmax, last: a choice that depends on the shape is "measured", on
    which GPU, or "predicted", and why. On a CPU a line may follow on what a watched run does not show.

    Args:
        module: a ``ResNetModel``, a ``SegmentationLoss``, or any module that holds some.
        images: what the module takes, (B, C, H, W), on its device.

    Returns:
        A table as text: the module's name, its function, with images the layer, the implementation, the reason.
    """
    if images is not None:
        table = _table([("module", "function", "layer", "runs", "because"), *_layers(module, images)])
        dtypes = {part.backbone.conv1.weight.dtype for part in module.modules() if isinstance(part, AcceleratedModel)}
        return f"{table}\n\n{PACKED}" if any(packed.can_run(images.to(dtype)) for dtype in dtypes) else table
    tensors = (tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32
    if (tensor := next(tensors, None)) is not None:
        device, dtype = tensor.device, tensor.dtype
    rows: Rows = [("module", "function", "runs", "because")]
    for name, part in module.named_modules():
        if hasattr(part, "kernel") and hasattr(part, "kernel_function"):
            obstacle = getattr(part, "kernel_obstacle", None)  # the module's own, on any device
            runs, why = kernels.choose(part.kernel_function, part.kernel, device, dtype, obstacle)
            if obstacle and obstacle not in why:
                why += f"; {obstacle}"
            if runs == "triton" and part.kernel == "auto" and hasattr(part, "auto_limit"):
                why += f"; {part.auto_limit}"
            rows.append((name or type(part).__name__, part.kernel_function, runs, why))
    return _table(rows)


@torch.no_grad()
def _layers(module: nn.Module, images: Tensor) -> Rows:
    rows: Rows = []
    with _in_eval_mode(module), kernels.recording() as found, names_of_calls(module, found) as names:
        module.predict(images) if isinstance(module, ResNetModel) else module(images)
    for (layer, decision), name in zip(found, names, strict=True):
        rows.append((name, layer.function, str(layer), decision.impl, decision.why))
    return rows


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def names_of_calls(module: nn.Module, found: Sequence[object]) -> Iterator[list[str]]:
    """For each entry that a call appends to ``found``, the innermost module that was running."""
    names: list[str] = []

    def close(name: str) -> None:
        names.extend([name] * (len(found) - len(names)))

    handles, running = [], [""]
    for name, part in module.named_modules():
        if isinstance(part, FUSED) or (isinstance(part, nn.Sequential) and not hasattr(part, "kernel_function")):
            continue  # watched, they would run one by one

        def enter(*_: object, name: str = name or type(part).__name__) -> None:
            close(running[-1])
            running.append(name)

        def leave(*_: object) -> None:
            close(running.pop())

        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _table(rows: Rows) -> str:
    """Left-aligned columns, the last one as long as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )

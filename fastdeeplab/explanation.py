"""Which implementation each module of a model runs, and why."""

import torch
from torch import nn

from fastdeeplab.kernels import choose


def explain(module: nn.Module) -> str:
    """Say for every module with a ``kernel`` flag which implementation runs and why.

    The answer is for inputs of the device and dtype of the module's parameters; a module without any, such as a loss,
    is explained for fp32 on the GPU that there is, or else the CPU. A flag that can't be followed is shown with the
    reason; calling the module raises it.

    Args:
        module: a ``ResNetModel``, a ``SegmentationLoss``, or any module that holds some.

    Returns:
        A table as text: the module's name, its function, the implementation, the reason.
    """
    tensors = (tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32
    if (tensor := next(tensors, None)) is not None:
        device, dtype = tensor.device, tensor.dtype
    rows = [("module", "function", "runs", "because")]
    for name, part in module.named_modules():
        if hasattr(part, "kernel") and hasattr(part, "kernel_function"):
            runs, why = choose(part.kernel_function, part.kernel, device, dtype)
            if runs == "triton" and part.kernel == "auto" and hasattr(part, "auto_limit"):
                why += f"; {part.auto_limit}"
            rows.append((name or type(part).__name__, part.kernel_function, runs, why))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]) for row in rows
    )

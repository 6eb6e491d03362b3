"""The strides in which a kernel may get its input: each function gives the same values laid out otherwise."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: F.pad(x, (1, 2, 1, 1, 2, 1))[:, 2:-1, 1:-1, 1:-2],
    "every other": lambda x: x.repeat_interleave(2, 3).repeat_interleave(2, 1)[:, ::2, :, ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "classes first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}

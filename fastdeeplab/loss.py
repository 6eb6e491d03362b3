"""The training loss of DeepLabV3: cross-entropy of the main logits plus a share of the auxiliary head's."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastdeeplab.kernels import upsample_cross_entropy
from fastdeeplab.kernels.checks import check_ignore_index, check_impl, check_label_smoothing


class SegmentationLoss(nn.Module):
    """``CE(out) + aux_weight * CE(aux)``, averaged over the pixels that are not ignored.

    The auxiliary head and its weight are those of Zhao et al., "Pyramid Scene Parsing Network" (2017). Each term is
    ``torch.nn.functional.cross_entropy`` in fp32 of the logits, upsampled bilinearly with ``align_corners=False`` to
    the target's size: full-size and low-resolution logits of one model give the same value, and the latter take a
    fraction of the memory, as the upsampled logits are never held.

    Args:
        aux_weight: weight of the auxiliary term.
        ignore_index: target value of the pixels that do not count.
        weight: (K,) weights of the classes, or None.
        label_smoothing: in [0, 1].
        check_target: on a GPU, whether to look for targets outside [0, K), which synchronises; on a CPU it is always
            done. Compiled code never looks: it gives NaN.
        kernel: ``"auto"``, ``"triton"`` or ``"torch"``; see ``fastdeeplab.kernels.upsample_cross_entropy``.

    Raises:
        ValueError: an argument is not one of those above.
    """

    kernel_function = "upsample_cross_entropy"
    auto_limit = 'PyTorch for logits that have full size already, and for reduction="none"'

    def __init__(
        self,
        aux_weight: float = 0.4,
        *,
        ignore_index: int = 255,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        check_target: bool = False,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= aux_weight < math.inf:
            raise ValueError(f"aux_weight must be a number from 0 up, got {aux_weight}")
        check_ignore_index(ignore_index)
        check_label_smoothing(label_smoothing)
        check_impl(kernel, "kernel")
        if weight is not None and not (isinstance(weight, Tensor) and weight.ndim == 1):
            raise ValueError(f"weight must be a (K,) tensor, got {weight!r}")
        self.aux_weight = aux_weight
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.check_target = check_target
        self.kernel = kernel
        self.weight: Tensor | None
        self.register_buffer("weight", None if weight is None else weight.detach().float(), persistent=False)

    def forward(
        self, outputs: Mapping[str, Tensor] | Tensor, target: Tensor, normalizer: Tensor | None = None
    ) -> Tensor:
        """Compute the loss.

        Args:
            outputs: what ``ResNetModel`` returns: ``"out"`` and perhaps ``"aux"``, (B, K, H, W) or, with
                ``upsample=False``, (B, K, h, w); or the main logits alone.
            target: (B, H, W) class indices, uint8, int16, int32 or int64.
            normalizer: a scalar to divide the summed loss by, in place of ``valid_weight(target)``, which gives the
                mean. A batch that is computed in parts, by gradient accumulation or by several processes, has the
                loss and the gradients of the whole where each part is divided by the weight of the whole. Where the
                normalizer is 0, without valid pixels or with those of classes of weight 0 alone, the loss is 0.

        Returns:
            The loss, a scalar in fp32. Without a normalizer NaN if every pixel is ignored, as in PyTorch; NaN, too, if
            the target on a GPU has a class outside [0, K) that is not ``ignore_index``.

        Raises:
            ValueError: shapes or types do not fit, the normalizer is no scalar, or the target has a class outside
                [0, K) that is not ``ignore_index`` (on a GPU with ``check_target``).
            RuntimeError: ``kernel`` is ``"triton"`` and the kernel can't run here.
        """
        outputs = {"out": outputs} if isinstance(outputs, Tensor) else outputs
        if "out" not in outputs:
            raise ValueError(f'outputs must have the main logits as "out", got {sorted(outputs)}')
        if normalizer is not None and not (isinstance(normalizer, Tensor) and normalizer.ndim == 0):
            raise ValueError(f"normalizer must be a scalar tensor, got {normalizer!r}")
        reduction = "mean" if normalizer is None else "sum"
        loss = self._cross_entropy(outputs["out"], target, reduction)
        if "aux" in outputs and self.aux_weight:
            loss = loss + self.aux_weight * self._cross_entropy(outputs["aux"], target, reduction)
        if normalizer is not None:
            loss = loss / normalizer.to(loss).where(normalizer != 0, math.inf)
        return loss

    def valid_weight(self, target: Tensor) -> Tensor:
        """The weights of the pixels that are not ignored, added up: a scalar in fp64 (fp32 on Apple's GPUs).

        It is what the mean divides by: without class weights the number of those pixels.
        """
        precise = torch.float32 if target.device.type == "mps" else torch.float64  # Apple's GPUs have no fp64
        target = target.long()
        valid = target != self.ignore_index
        if self.weight is None:
            return valid.sum(dtype=precise)
        own = target.clamp(0, len(self.weight) - 1)  # strays make the loss an error or NaN
        return (self.weight[own] * valid).sum(dtype=precise)

    def _cross_entropy(self, logits: Tensor, target: Tensor, reduction: str) -> Tensor:
        low, full = tuple(logits.shape[2:]), tuple(target.shape[1:])
        if logits.ndim == 4 and target.ndim == 3 and any(a > b for a, b in zip(low, full, strict=True)):
            raise ValueError(f"logits must be no larger than the target's {full}, got {low}")
        return upsample_cross_entropy(
            logits,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=reduction,
            label_smoothing=self.label_smoothing,
            check_target=self.check_target,
            impl=self.kernel,
        )

    def extra_repr(self) -> str:
        return f"aux_weight={self.aux_weight}, ignore_index={self.ignore_index}, kernel={self.kernel!r}"

"""The training loss of DeepLabV3: cross-entropy of the main logits plus a share of the auxiliary head's."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGET_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


class SegmentationLoss(nn.Module):
    """``CE(out) + aux_weight * CE(aux)``, averaged over the pixels that are not ignored.

    The auxiliary head and its weight are those of Zhao et al., "Pyramid Scene Parsing Network" (2017). Each term is
    ``torch.nn.functional.cross_entropy`` in fp32 of the logits, upsampled bilinearly with ``align_corners=False`` to
    the target's size if they are smaller: full-size and low-resolution logits of one model give the same value.

    Args:
        aux_weight: weight of the auxiliary term.
        ignore_index: target value of the pixels that do not count.
        weight: (K,) weights of the classes, or None.
        label_smoothing: in [0, 1].
        check_target: on a GPU, whether to look for targets outside [0, K), which synchronises; on a CPU it is always
            done.

    Raises:
        ValueError: an argument is not one of those above.
    """

    def __init__(
        self,
        aux_weight: float = 0.4,
        *,
        ignore_index: int = 255,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        check_target: bool = False,
    ) -> None:
        super().__init__()
        if not aux_weight >= 0:
            raise ValueError(f"aux_weight must be at least 0, got {aux_weight}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        if weight is not None and weight.ndim != 1:
            raise ValueError(f"weight must be (K,), got {tuple(weight.shape)}")
        self.aux_weight = aux_weight
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.check_target = check_target
        self.weight: Tensor | None
        self.register_buffer("weight", None if weight is None else weight.detach().float(), persistent=False)

    def forward(self, outputs: Mapping[str, Tensor] | Tensor, target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            outputs: what ``ResNetModel`` returns: ``"out"`` and perhaps ``"aux"``, (B, K, H, W) or, with
                ``upsample=False``, (B, K, h, w); or the main logits alone.
            target: (B, H, W) class indices, uint8, int16, int32 or int64.

        Returns:
            The loss, a scalar in fp32. NaN if every pixel is ignored, as in PyTorch.

        Raises:
            ValueError: shapes or types do not fit, or the target has a class outside [0, K) that is not
                ``ignore_index``.
        """
        outputs = {"out": outputs} if isinstance(outputs, Tensor) else outputs
        if "out" not in outputs:
            raise ValueError(f'outputs must have the main logits as "out", got {sorted(outputs)}')
        loss = self._cross_entropy(outputs["out"], target)
        if "aux" in outputs and self.aux_weight:
            loss = loss + self.aux_weight * self._cross_entropy(outputs["aux"], target)
        return loss

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        self._check(logits, target)
        logits = logits.float()
        if logits.shape[-2:] != target.shape[-2:]:
            logits = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(
            logits,
            target.long(),
            self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def _check(self, logits: Tensor, target: Tensor) -> None:
        if logits.ndim != 4 or not logits.is_floating_point():
            raise ValueError(f"logits must be floating-point (B, K, h, w), got {logits.dtype} {tuple(logits.shape)}")
        if target.ndim != 3 or target.shape[0] != logits.shape[0]:
            raise ValueError(f"target must be ({logits.shape[0]}, H, W), got {tuple(target.shape)}")
        if target.dtype not in TARGET_DTYPES:
            raise ValueError(f"target must be uint8, int16, int32 or int64, got {target.dtype}")
        num_classes = logits.shape[1]
        if self.weight is not None and self.weight.shape != (num_classes,):
            raise ValueError(
                f"weight must be ({num_classes},) for {num_classes} classes, got {tuple(self.weight.shape)}"
            )
        if (target.device.type == "cpu" or self.check_target) and target.numel():
            counted = target[target != self.ignore_index]
            if counted.numel() and not (counted.min() >= 0 and counted.max() < num_classes):
                raise ValueError(
                    f"target must be in [0, {num_classes}) or {self.ignore_index} (ignored), "
                    f"got values from {counted.min()} to {counted.max()}"
                )

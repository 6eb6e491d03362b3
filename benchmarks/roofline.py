"""Floors: what the bytes and the arithmetic of an operation take on a known GPU, if nothing else does.

The larger of bytes / bandwidth, instructions / (lanes x clock) and exponentials / (special-function lanes x clock).
``python benchmarks/roofline.py`` prints those of the benchmarked shapes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    bandwidth: float  # bytes per second that a copy reaches
    multiprocessors: int
    clock: float  # Hz, under load

    @property
    def instructions(self) -> float:
        """Per second and lane: 128 lanes a multiprocessor."""
        return 128 * self.multiprocessors * self.clock

    @property
    def exponentials(self) -> float:
        """Per second: 16 lanes a multiprocessor."""
        return 16 * self.multiprocessors * self.clock


# By a part of the name that the driver gives. The bandwidth was measured with PyTorch; the clock is one under load.
GPUS = {"H200": GPU(bandwidth=4.3e12, multiprocessors=132, clock=1.75e9)}

# Per output pixel and class, in full-rate instructions. Counts that a good kernel reaches, not proofs. The running
# maximum takes a comparison, a maximum and a selection, which run at half rate, so six; interpolation runs beside them.
# A loss interpolates, subtracts and adds up in the forward, and again in the backward, which then shares the gradient
# out to four corners.
ARGMAX_INSTRUCTIONS = 6
CROSS_ENTROPY_INSTRUCTIONS = 18
CROSS_ENTROPY_EXPONENTIALS = 2  # one forward, one backward: the backward computes the probabilities anew


@dataclass(frozen=True)
class Work:
    bytes: int
    instructions: int = 0
    exponentials: int = 0

    def milliseconds(self, gpu: GPU) -> dict[str, float]:
        return {
            "bytes": 1000 * self.bytes / gpu.bandwidth,
            "instructions": 1000 * self.instructions / gpu.instructions,
            "exponentials": 1000 * self.exponentials / gpu.exponentials,
        }

    def floor(self, gpu: GPU) -> float:
        """In milliseconds."""
        return max(self.milliseconds(gpu).values())


def known_gpu(name: str) -> GPU | None:
    return next((gpu for part, gpu in GPUS.items() if part in name), None)


def argmax_work(
    batch: int, classes: int, size_in: tuple[int, int], size_out: tuple[int, int], logit_bytes: int, index_bytes: int
) -> Work:
    """Reads the low-resolution logits once, writes one index per pixel."""
    low, full = batch * size_in[0] * size_in[1], batch * size_out[0] * size_out[1]
    return Work(
        bytes=low * classes * logit_bytes + full * index_bytes,
        instructions=full * classes * ARGMAX_INSTRUCTIONS,
    )


def cross_entropy_work(
    batch: int,
    classes: int,
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    logit_bytes: int,
    target_bytes: int,
    heads: int = 1,
) -> Work:
    """Forward and backward: reads logits and targets twice, writes the gradient, writes and reads the log-sum-exp."""
    low, full = batch * size_in[0] * size_in[1], batch * size_out[0] * size_out[1]
    return Work(
        bytes=heads * (3 * low * classes * logit_bytes + full * (2 * target_bytes + 2 * 4)),
        instructions=heads * full * classes * CROSS_ENTROPY_INSTRUCTIONS,
        exponentials=heads * full * classes * CROSS_ENTROPY_EXPONENTIALS,
    )


SIZES = {  # batch, low and full resolution by output stride and input
    ("512x512", 8): (8, (64, 64), (512, 512)),
    ("520x520", 8): (8, (65, 65), (520, 520)),
    ("1024x2048", 8): (1, (128, 256), (1024, 2048)),
    ("512x512", 16): (8, (32, 32), (512, 512)),
    ("520x520", 16): (8, (33, 33), (520, 520)),
    ("1024x2048", 16): (1, (64, 128), (1024, 2048)),
}


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|")


def main() -> None:
    for name, gpu in GPUS.items():
        print(f"\n{name}: upsample_argmax of bf16 logits, microseconds at the floor\n")
        print_row(
            "input", "output stride", "batch", "K", "bytes, int64", "bytes, uint8", "instructions", "floor, int64"
        )
        print_row(*["---"] * 8)
        for (size, stride), (batch, low, full) in SIZES.items():
            for classes in (19, 21, 150):
                wide, narrow = (argmax_work(batch, classes, low, full, 2, index_bytes) for index_bytes in (8, 1))
                parts, narrow_parts = wide.milliseconds(gpu), narrow.milliseconds(gpu)
                times = (parts["bytes"], narrow_parts["bytes"], parts["instructions"], wide.floor(gpu))
                print_row(size, stride, batch, classes, *(f"{1000 * time:.1f}" for time in times))

        print(f"\n{name}: upsample_cross_entropy, forward and backward, of bf16 logits and int64 targets,", end=" ")
        print("batch 16, 512x512, microseconds at the floor\n")
        print_row("output stride", "K", "heads", "bytes", "instructions", "exponentials", "floor")
        print_row(*["---"] * 7)
        for stride in (8, 16):
            for classes in (19, 21, 150):
                for heads in (1, 2):
                    low = (512 // stride, 512 // stride)
                    work = cross_entropy_work(16, classes, low, (512, 512), 2, 8, heads)
                    parts = work.milliseconds(gpu)
                    times = (parts["bytes"], parts["instructions"], parts["exponentials"], work.floor(gpu))
                    print_row(stride, classes, heads, *(f"{1000 * time:.0f}" for time in times))


if __name__ == "__main__":
    main()

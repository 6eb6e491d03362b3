"""The floors of the benchmarked shapes and networks on every known GPU: ``python benchmarks/roofline.py`` prints them.

What a floor is stands in ``fastdeeplab.speed.roofline``, whose names are this module's, too.
"""

from collections.abc import Sequence

from fastdeeplab.speed.roofline import (
    BRANCHES,
    GPU,
    GPUS,
    PLANS,
    POOL,
    TAIL,
    Layer,
    Plan,
    Work,
    argmax_work,
    conv_layers,
    cross_entropy_work,
    known_gpu,
    network_floor,
    passes,
)

__all__ = [
    "BRANCHES",
    "GPU",
    "GPUS",
    "NETWORKS",
    "PLANS",
    "POOL",
    "SIZES",
    "TAIL",
    "Layer",
    "Plan",
    "Work",
    "argmax_work",
    "conv_layers",
    "cross_entropy_work",
    "images_per_second",
    "known_gpu",
    "network_floor",
    "network_layers",
    "passes",
    "print_row",
]


def images_per_second(plan: Plan, layers: Sequence[Layer], gpu: GPU) -> float:
    return 1000 * layers[0].N / sum(network_floor(plan, layers, gpu).values())


SIZES = {  # batch, low and full resolution by output stride and input
    ("512x512", 8): (8, (64, 64), (512, 512)),
    ("520x520", 8): (8, (65, 65), (520, 520)),
    ("1024x2048", 8): (1, (128, 256), (1024, 2048)),
    ("512x512", 16): (8, (32, 32), (512, 512)),
    ("520x520", 16): (8, (33, 33), (520, 520)),
    ("1024x2048", 16): (1, (64, 128), (1024, 2048)),
}
NETWORKS = (  # depth, output stride, input, classes
    (50, 8, "512x512", 21),
    (50, 8, "512x512", 150),
    (50, 8, "520x520", 21),
    (101, 8, "520x520", 21),
    (50, 16, "512x512", 21),
    (50, 8, "1024x2048", 19),
    (101, 16, "1024x2048", 19),
)


def network_layers(depth: int, output_stride: int, size: str, num_classes: int) -> list[Layer]:
    batch, _, full = SIZES[size, output_stride]
    return conv_layers(depth, output_stride, full, batch, num_classes)


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|")


def main() -> None:
    for name, gpu in GPUS.items():
        print(f"\n{name}: upsample_argmax of bf16 logits, microseconds at the floor\n")
        columns = ("bytes, int64", "bytes, uint8", "instructions", "floor, int64", "floor, uint8")
        print_row("input", "output stride", "batch", "K", *columns)
        print_row(*["---"] * 9)
        for (size, stride), (batch, low, full) in SIZES.items():
            for classes in (19, 21, 150):
                wide, narrow = (argmax_work(batch, classes, low, full, 2, index_bytes) for index_bytes in (8, 1))
                parts, narrow_parts = wide.milliseconds(gpu), narrow.milliseconds(gpu)
                times = [parts["bytes"], narrow_parts["bytes"], parts["instructions"]]
                times += [wide.floor(gpu), narrow.floor(gpu)]
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
                    times = [*(parts[name] for name in ("bytes", "instructions", "exponentials")), work.floor(gpu)]
                    print_row(stride, classes, heads, *(f"{1000 * time:.0f}" for time in times))

        print(f"\n{name}: networks in bf16, images per second at the floor\n")
        print_row("network, input, batch", *(plan.name for plan in PLANS))
        print_row(*["---"] * (1 + len(PLANS)))
        for depth, stride, size, classes in NETWORKS:
            layers = network_layers(depth, stride, size, classes)
            rates = (f"{images_per_second(plan, layers, gpu):.0f}" for plan in PLANS)
            print_row(f"R{depth} OS{stride} {size} B{layers[0].N} K={classes}", *rates)

        print(f"\n{name}: R50 OS8 520x520 B8 K=21, microseconds per image at the floor\n")
        print_row("stage", *(plan.name for plan in PLANS))
        print_row(*["---"] * (1 + len(PLANS)))
        layers = network_layers(50, 8, "520x520", 21)
        floors = [network_floor(plan, layers, gpu) for plan in PLANS]
        for stage in floors[0]:
            print_row(stage, *(f"{1000 * floor[stage] / layers[0].N:.1f}" for floor in floors))


if __name__ == "__main__":
    main()

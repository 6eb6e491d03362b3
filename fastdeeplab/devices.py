"""Where a model runs, as users name it."""

import torch


def usable_device(name: str | None) -> torch.device:
    """The device of a name such as ``"cpu"`` or ``"cuda:0"``; for None the first GPU if there is one, else the CPU.

    Raises:
        ValueError: it can't be used; the message says why.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name} can't be used: {str(error).splitlines()[0]}") from error
    return device

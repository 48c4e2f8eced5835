"""Where tensors live: a device's name, checked before anything is computed."""

from __future__ import annotations

import torch

from dragn_cache.errors import InputError


def find_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        InputError: it is neither ``cpu`` nor ``cuda[:N]``, or this machine does not have it.
    """
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(name)
        torch.empty(0, device=device)
    # AssertionError is what a torch built without CUDA raises.
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            "--device",
            expected="cpu, cuda or cuda:N, and that this machine has it",
            got=repr(str(name)),
            remedy="use --device cpu",
        ) from error
    return device

"""Where tensors live: a device's name, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits

from dragn_cache.errors import SettingError
from dragn_cache.machine import free_memory, parse_memory


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch and NumPy on one thread: sums run in one order, whatever the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


CPU = torch.device("cpu")

# --- how much memory there is ------------------------------------------------------------------

SHARE = 0.6  # of the free memory that features may fill


def memory_for_features(text: str, device: torch.device) -> int:
    """Bytes that features may fill: what ``memory`` says; ``auto`` is 60 % of what is free."""
    given = parse_memory(text)
    if given is not None:
        return given
    free = free_memory()
    if device.type == "cuda":
        free = min(free, free_bytes(device))
    return max(1, int(SHARE * free))


def free_bytes(device: torch.device) -> int:
    """Free bytes where a model computes: those for this process, or a GPU's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def find_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        SettingError: it is neither ``cpu`` nor ``cuda[:N]``, or this machine does not have it.
    """
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(name)
        torch.empty(0, device=device)
    # AssertionError is what a torch built without CUDA raises.
    except (RuntimeError, AssertionError) as error:
        raise SettingError(
            "device",
            expected="cpu, cuda or cuda:N, and that this machine has it",
            got=repr(str(name)),
            remedy="use `device=cpu`",
        ) from error
    return device

"""How much memory is to be had, and running out of it: on a GPU, on a CPU, or in Python."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# Accelerate's predicate for its own retries also takes what cuDNN does not support for this.
_SIGNS = ("out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc")


def spare(devices: Iterable[torch.device]) -> int | None:
    """Half of what is free on the GPU that has least of it, in bytes; None where none of the devices is one."""
    gpus = [device for device in devices if device.type == "cuda"]
    if gpus:
        # What torch keeps for later counts as taken.
        torch.cuda.empty_cache()
    return min((torch.cuda.mem_get_info(gpu)[0] // 2 for gpu in gpus), default=None)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says so. Only a GPU has an error of its own; torch on a CPU raises a RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    )

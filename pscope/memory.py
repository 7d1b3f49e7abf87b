"""Running out of memory: on a GPU, on a CPU, or in Python."""

from __future__ import annotations

import torch

# Accelerate's predicate for its own retries also takes what cuDNN does not support for this.
_SIGNS = ("out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says so. Only a GPU has an error of its own; torch on a CPU raises a RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    )

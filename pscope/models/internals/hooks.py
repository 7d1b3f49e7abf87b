"""Who has a hand in a model's passes: hooks on its modules, and forward passes put in the place of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

MACHINERY = ("accelerate", "transformers", "torch", "peft", "bitsandbytes")
"""Packages whose hooks are part of how a model runs, and change nothing of what it computes for a token."""


def hands_in(model: nn.Module) -> Iterator[Callable[..., Any]]:
    """What is called in a pass of the model beside its modules' own code, but for what libraries run it by."""
    everywhere = torch.nn.modules.module
    yield from everywhere._global_forward_pre_hooks.values()
    yield from everywhere._global_forward_hooks.values()
    for module in model.modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        replaced = [module.forward] if "forward" in vars(module) else []
        yield from (hand for hand in (*hooks, *replaced) if not _is_machinery(hand))


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights are elsewhere until they are used, as accelerate keeps them."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def _is_machinery(hand: Callable[..., Any]) -> bool:
    while isinstance(hand, partial):
        hand = hand.func
    # A module that serves as a hook is somebody's, whoever wrote its class.
    return not isinstance(hand, nn.Module) and (getattr(hand, "__module__", None) or "").split(".")[0] in MACHINERY

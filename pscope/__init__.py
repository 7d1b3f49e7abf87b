"""pscope reads what a language model's hidden states hold, by patching them into another prompt (Patchscopes)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # For editors and type checkers, which do not follow `_HOME`.
    from pscope.errors import DataError as DataError
    from pscope.errors import ModelError as ModelError
    from pscope.errors import PromptError as PromptError
    from pscope.errors import PscopeError as PscopeError
    from pscope.errors import RowError as RowError
    from pscope.errors import RunError as RunError
    from pscope.generate import Decoding as Decoding
    from pscope.lens import logit_lens as logit_lens
    from pscope.loading import load as load
    from pscope.models import LanguageModel as LanguageModel
    from pscope.patchscope import Patchscope as Patchscope
    from pscope.prompts import ENTITY_DESCRIPTION as ENTITY_DESCRIPTION
    from pscope.prompts import TOKEN_IDENTITY as TOKEN_IDENTITY
    from pscope.prompts import Every as Every
    from pscope.prompts import Prompt as Prompt
    from pscope.residual import capture as capture
    from pscope.residual import editing as editing
    from pscope.residual import overwriting as overwriting
    from pscope.residual import recording as recording
    from pscope.unpatched import continue_prompts as continue_prompts

_HOME = {
    "DataError": "errors",
    "ENTITY_DESCRIPTION": "prompts",
    "TOKEN_IDENTITY": "prompts",
    "Decoding": "generate",
    "Every": "prompts",
    "LanguageModel": "models",
    "ModelError": "errors",
    "Patchscope": "patchscope",
    "Prompt": "prompts",
    "PromptError": "errors",
    "PscopeError": "errors",
    "RowError": "errors",
    "RunError": "errors",
    "capture": "residual",
    "continue_prompts": "unpatched",
    "editing": "residual",
    "load": "loading",
    "logit_lens": "lens",
    "overwriting": "residual",
    "recording": "residual",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    # Looked up on first use, so that the command line answers a typing error without importing torch.
    if name not in _HOME:
        raise AttributeError(f"module 'pscope' has no attribute {name!r}")
    return getattr(import_module(f"pscope.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

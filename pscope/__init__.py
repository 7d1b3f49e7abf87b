"""pscope reads what a language model's hidden states hold, by patching them into another prompt (Patchscopes)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # For editors and type checkers, which do not follow `_HOME`.
    from pscope.engine.generate import Decoding as Decoding
    from pscope.engine.lens import logit_lens as logit_lens
    from pscope.engine.patchscope import Patchscope as Patchscope
    from pscope.engine.unpatched import continue_prompts as continue_prompts
    from pscope.engine.writes import Write as Write
    from pscope.engine.writes import Writes as Writes
    from pscope.errors import DataError as DataError
    from pscope.errors import ModelError as ModelError
    from pscope.errors import PromptError as PromptError
    from pscope.errors import PscopeError as PscopeError
    from pscope.errors import RowError as RowError
    from pscope.errors import RunError as RunError
    from pscope.experiments.reading import Reading as Reading
    from pscope.experiments.reading import Writing as Writing
    from pscope.mappings.mapping import Affine as Affine
    from pscope.mappings.mapping_set import MappingSet as MappingSet
    from pscope.mappings.storage import read_mappings as read_mappings
    from pscope.mappings.storage import save_mappings as save_mappings
    from pscope.models.loading import load as load
    from pscope.models.model import LanguageModel as LanguageModel
    from pscope.models.prompts import ENTITY_DESCRIPTION as ENTITY_DESCRIPTION
    from pscope.models.prompts import TOKEN_IDENTITY as TOKEN_IDENTITY
    from pscope.models.prompts import Every as Every
    from pscope.models.prompts import First as First
    from pscope.models.prompts import Prompt as Prompt
    from pscope.models.residual import capture as capture
    from pscope.models.residual import editing as editing
    from pscope.models.residual import overwriting as overwriting
    from pscope.models.residual import recording as recording
    from pscope.models.states import States as States
    from pscope.show.figures import figure as figure
    from pscope.show.lens_page import lens as lens
    from pscope.show.run_page import run_page as run_page

_HOME = {
    "Affine": "mappings.mapping",
    "DataError": "errors",
    "ENTITY_DESCRIPTION": "models.prompts",
    "TOKEN_IDENTITY": "models.prompts",
    "Decoding": "engine.generate",
    "Every": "models.prompts",
    "First": "models.prompts",
    "LanguageModel": "models.model",
    "MappingSet": "mappings.mapping_set",
    "ModelError": "errors",
    "Patchscope": "engine.patchscope",
    "Prompt": "models.prompts",
    "PromptError": "errors",
    "PscopeError": "errors",
    "Reading": "experiments.reading",
    "RowError": "errors",
    "RunError": "errors",
    "States": "models.states",
    "Write": "engine.writes",
    "Writes": "engine.writes",
    "Writing": "experiments.reading",
    "capture": "models.residual",
    "continue_prompts": "engine.unpatched",
    "editing": "models.residual",
    "figure": "show.figures",
    "lens": "show.lens_page",
    "load": "models.loading",
    "logit_lens": "engine.lens",
    "overwriting": "models.residual",
    "read_mappings": "mappings.storage",
    "recording": "models.residual",
    "run_page": "show.run_page",
    "save_mappings": "mappings.storage",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    # Looked up on first use, so that the command line answers a typing error without importing torch.
    if name not in _HOME:
        raise AttributeError(f"module 'pscope' has no attribute {name!r}")
    return getattr(import_module(f"pscope.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""pscope reads what a language model's hidden states hold, by patching them into another prompt (Patchscopes)."""

from importlib import import_module

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

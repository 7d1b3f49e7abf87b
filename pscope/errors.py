"""What pscope raises. All are ValueErrors whose message is one line: what was given, what fits, what to do."""


class PscopeError(ValueError):
    """Something was asked for that cannot be done as asked."""


class ModelError(PscopeError):
    """A model cannot be found, fetched, read or patched."""


class PromptError(PscopeError):
    """A prompt or a position in it cannot be used."""


class TextsError(PscopeError):
    """A file or dataset of texts cannot be used."""


class RunError(PscopeError):
    """A run folder cannot be written."""

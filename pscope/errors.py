"""What pscope raises. All are ValueErrors whose message is one line: what was given, what fits, what to do."""


def first_line(error: Exception) -> str:
    """What somebody else's error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class PscopeError(ValueError):
    """Something was asked for that cannot be done as asked."""


class ModelError(PscopeError):
    """A model cannot be found, fetched, read or patched."""


class PromptError(PscopeError):
    """A prompt or a position in it cannot be used."""


class RowError(PscopeError):
    """A patched row cannot be read. `row` is its index among the states that were given, -1 for the clean row."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"{'the clean row' if row < 0 else f'row {row}'} failed: {reason}")
        self.row, self.reason = row, reason


class DataError(PscopeError):
    """A file or dataset of texts, entities or relations cannot be used."""


class RunError(PscopeError):
    """A run folder cannot be written."""

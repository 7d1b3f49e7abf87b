"""The command `pscope`: one file per command, each thin. Nothing heavy is imported before the arguments are read."""

import os
import sys

from pscope.cli import signals


def main() -> None:
    """The console script. Ctrl-C ends it at once, with exit code 130; so do SIGTERM and SIGHUP."""
    signals.listen()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # A character that the terminal's encoding lacks is shown as its escape.
        stream.reconfigure(errors="backslashreplace")
    code: str | int | None
    try:
        from pscope.cli.app import app

        app()
    except KeyboardInterrupt:
        print("pscope: stopped; nothing was written", file=sys.stderr)
        code = 130
    except SystemExit as end:
        code = end.code
    code = _flush(code)
    if code == 130:
        # Everything is on disk; what is left is a second or two of the interpreter taking its modules down.
        os._exit(130)
    sys.exit(code)


def _flush(code: str | int | None) -> str | int | None:
    """The exit code, once all that was printed has left: the device may be full, or the reader of a pipe gone."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            # What is left in the buffer must not be tried again as the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if not code and not isinstance(error, BrokenPipeError):
                print(f"pscope: cannot print: {error.strerror}", file=sys.stderr)
            code = code or 1
    return code

"""The command `pscope`: one file per command, each thin. Nothing heavy is imported before the arguments are read."""

import os
import signal
import sys


def main() -> None:
    """The console script. Ctrl-C ends it at once, with exit code 130."""
    # What a scheduler sends before it kills: the rows that are done are kept, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from pscope.cli.app import app

        app()
    except KeyboardInterrupt:
        print("pscope: stopped; nothing was written", file=sys.stderr)
        stopped = 130
    except SystemExit as end:
        stopped = end.code
    if stopped == 130:
        # Everything is on disk; what is left is a second or two of the interpreter taking its modules down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stopped)
    sys.exit(stopped)

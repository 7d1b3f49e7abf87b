"""`pscope app`: the live demo."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stdout
from typing import Annotated

import typer
from pscope.cli.console import tell
from pscope.cli.frame import Loader, command

from pscope.errors import PscopeError

HOST = "127.0.0.1"


@command
def app(
    frame: Loader,
    *,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Where to listen, on this machine alone.", show_default="free, from 7860"),
    ] = None,
    share: Annotated[
        bool,
        typer.Option("--share", help="A public address too, by Gradio's servers; all who have it can ask."),
    ] = False,
) -> None:
    """A live demo in the browser: type a text, choose a token, a layer and a target prompt, and see what is said.

    It listens on this machine alone, until Ctrl-C. It needs Gradio: pip install "pscope[app]".
    """
    from pscope.show.live import gradio, live

    # Before a model is loaded, which may take long.
    gradio()
    page = live(frame.load())
    if frame.processes.count > 1:
        raise PscopeError("pscope app is one process; start it without torchrun")
    try:
        # What Gradio says of itself is no result.
        with redirect_stdout(io.StringIO()):
            _, address, public = page.launch(
                server_name=HOST, server_port=port, share=share, prevent_thread_lock=True, quiet=True
            )
    except OSError as error:
        where = "no port from 7860 on is free" if port is None else f"port {port} is taken, or not allowed"
        raise PscopeError(f"{where}; give another by --port") from error
    tell(f"{address} (Ctrl-C ends it)")
    if share:
        tell(public or "no public address: Gradio's servers cannot be reached, or refuse")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        raise typer.Exit from None
    finally:
        page.close(verbose=False)

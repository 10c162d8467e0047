"""The command that goes on until it is ended: serve.

When to add here: another option of it. Keep out: what it does (`serve/`).
"""

from typing import Annotated

import typer

from songvec_assets.cli import base
from songvec_assets.cli.base import app
from songvec_assets.cli.terminal import say


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="Port; 0: any that is free.")] = 8765,
    token_file: Annotated[
        str | None, typer.Option(help="File with the token that requests must bring.", show_default=False)
    ] = None,
) -> None:
    """Serve searches over HTTP: a page, and JSON for programs."""
    from songvec_assets.serve import server

    songs = base.make_searches(serve_token_file=token_file)
    limits = server.make_limits(songs.settings, host)
    with server.listen(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        say(f"Serving searches on http://{name}:{listener.getsockname()[1]}; Ctrl+C ends it.")
        server.serve(songs, listener, limits)

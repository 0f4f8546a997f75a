"""``pisces serve``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from open_pisces.cli.options import Result, add_command, add_int8, at_least, model_folder
from open_pisces.errors import PiscesError


class StoppedError(PiscesError):
    """A server that gave up; its log says why."""


def serve(args: argparse.Namespace) -> Result:
    """Serve a model over HTTP."""
    try:
        from open_pisces.serve import run
        from open_pisces.serve.service import ServeSettings
    except ModuleNotFoundError as error:
        raise StoppedError(f"{error.name} is missing: pip install 'open-pisces[serve]'") from None
    settings = ServeSettings(
        model=str(model_folder(args)),
        name=args.served_name,
        device=args.device,
        threads=args.threads,
        slots=args.slots,
        context=args.context,
        int8=args.int8,
        prefix_bytes=args.prefix_mb << 20,
        keys=run.read_keys(args.api_key_file),
        hosts=tuple(args.allow_host),
        origins=tuple(args.allow_origin),
        fetch=tuple(args.allow_fetch),
        max_queue=args.max_queue,
        patience=args.patience,
    )
    if run.serve(settings, args.host, args.port):
        raise StoppedError("the worker died again and again; what it wrote before says why")
    return None


def add_serve(commands: Any) -> None:
    """``pisces serve``."""
    text = "serve a model over HTTP: OpenAI's chat and images API, and a page to play on"
    command = add_command(commands, "serve", serve, text, model=True, json=False)
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    command.add_argument("--port", type=at_least(0), default=8000, help="0 takes a free one (default: 8000)")
    command.add_argument("--served-name", default="pisces", metavar="NAME", help="the model's name (default: pisces)")
    text = "keys, one a line; the environment variable PISCES_API_KEY holds some, too (default: no key)"
    command.add_argument("--api-key-file", type=Path, metavar="FILE", help=text)
    text = "a further name of this server, * for any (default: localhost and the address)"
    command.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=text)
    text = "web pages that may call it, besides its own, such as https://example.org"
    command.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN", help=text)
    text = "a host that pictures may be fetched from (default: none; clients send pictures as data)"
    command.add_argument("--allow-fetch", action="append", default=[], metavar="HOST", help=text)
    text = "sequences that the LLM writes at once; a drawing may take two (default: 8)"
    command.add_argument("--slots", type=at_least(2), default=8, help=text)
    text = "longest conversation in tokens, pictures included (default: the model's, at most 4096)"
    command.add_argument("--context", type=at_least(64), help=text)
    text = "memory for prompts and pictures that were read, in MB (default: 256)"
    command.add_argument("--prefix-mb", type=at_least(0), default=256, help=text)
    text = "requests that are taken before further ones get 429 (default: 64)"
    command.add_argument("--max-queue", type=at_least(1), default=64, help=text)
    add_int8(command)
    command.add_argument("--threads", type=at_least(1), help="CPU threads of the model (default: all cores)")
    text = "seconds of silence after which a working worker is replaced (default: 120)"
    command.add_argument("--patience", type=float, default=120.0, help=text)

"""``pisces data caption``, and the options of work that runs on several workers."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from open_pisces.cli.options import (
    Result,
    add_command,
    add_json,
    at_least,
    device_name,
    progress_bar,
    quiet,
    say_counts,
    share,
)


def caption(args: argparse.Namespace) -> Result:
    """Write a dataset's samples with captions of a vision LLM."""
    from open_pisces.factory.caption import Captioning
    from open_pisces.factory.caption import caption as write
    from open_pisces.factory.caption_checks import CaptioningError, Filters, find_template
    from open_pisces.factory.captioners import CaptionerSettings
    from open_pisces.files import WEIGHTS

    template = args.template or ("trained" if args.captioner == "pisces" else "detailed")
    model = str(args.model or WEIGHTS) if args.captioner == "pisces" else args.model
    if not model:
        what = "its name at the endpoint" if args.captioner == "endpoint" else "its folder or hub name"
        raise CaptioningError(f"--captioner {args.captioner} needs --model: {what}")
    names = ("max_tokens", "temperature", "max_side", "url", "key_variable", "timeout", "tries", "concurrency")
    how = {name: getattr(args, name) for name in (*names, "batch_size", "device")}
    captioning = Captioning(
        CaptionerSettings(args.captioner, model, **how),
        find_template(template, args.field),
        args.field,
        Filters(args.words, args.repetition, args.language),
    )
    quiet()
    with progress_bar() as show:
        found = write(args.source, args.out, captioning, workers_of(args), partial(show, "captions"))
    return say_counts(args, found)


def workers_of(args: argparse.Namespace) -> Any:
    """The `Workers` of ``--workers``, ``--ray`` and ``--gpus-per-worker``."""
    from open_pisces.factory.cluster import Workers

    return Workers(args.workers, args.ray, gpus=args.gpus_per_worker)


def add_workers(command: argparse.ArgumentParser) -> None:
    """``--workers``, ``--ray`` and ``--gpus-per-worker``."""
    text = "processes that share the work; all write to one folder (default: 1)"
    command.add_argument("--workers", type=at_least(1), default=1, metavar="N", help=text)
    text = "run them on Ray: alone it starts one on this machine, else the address of a cluster, such as auto"
    command.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS", help=text)
    command.add_argument("--gpus-per-worker", type=float, default=0.0, metavar="G", help="on Ray (default: 0)")


def _words(text: str) -> tuple[int, int]:
    least, colon, most = text.partition(":")
    if not (colon and least.isdecimal() and most.isdecimal() and int(least) <= int(most)):
        raise argparse.ArgumentTypeError(f"{text!r} is no MIN:MAX such as 5:400")
    return int(least), int(most)


def add_caption(commands: Any) -> None:
    """``pisces data caption``."""
    text = "describe a dataset's pictures with a vision LLM; its words become their captions"
    command = add_command(commands, "caption", caption, text)
    command.add_argument("source", metavar="SOURCE", help="a dataset folder or address, or its name under $PISCES_DATA")
    command.add_argument("out", metavar="OUT", help="the folder to write; one of an unfinished run is continued")
    text = "who writes: a server that speaks OpenAI's chat completions, a model of transformers, or a Pisces"
    command.add_argument("--captioner", choices=("endpoint", "transformers", "pisces"), required=True, help=text)
    command.add_argument("--model", help="its name at the endpoint, or its folder or hub name")
    text = "what is asked: detailed, detailed_from_caption, brief, trained (as our models were), or a YAML file"
    command.add_argument("--template", help=text)
    command.add_argument("--field", choices=("detailed", "short"), default="detailed", help="the caption to replace")
    command.add_argument("--max-tokens", type=at_least(1), default=300, help="the longest caption (default: 300)")
    command.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest words (default)")
    text = "pictures with a longer side are made smaller first; 0: never (default: 1024)"
    command.add_argument("--max-side", type=at_least(0), default=1024, help=text)
    add_workers(command)
    filters = command.add_argument_group("captions that are kept")
    text = "so many words (default: 5:400)"
    filters.add_argument("--words", type=_words, default=(5, 400), metavar="MIN:MAX", help=text)
    text = "repeat at most this share of themselves (default: 0.3)"
    filters.add_argument("--repetition", type=share, default=0.3, help=text)
    filters.add_argument("--language", help="are in this one, such as en; latin asks for the script alone")
    server = command.add_argument_group("--captioner endpoint")
    text = "up to /chat/completions (default: http://127.0.0.1:8000/v1, vLLM's own)"
    server.add_argument("--url", default="http://127.0.0.1:8000/v1", help=text)
    text = "environment variable with its key (default: OPENAI_API_KEY)"
    server.add_argument("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help=text)
    server.add_argument(
        "--concurrency", type=at_least(1), default=16, help="requests at once of each worker (default: 16)"
    )
    server.add_argument("--timeout", type=float, default=120.0, help="seconds for one request (default: 120)")
    text = "requests for one caption, with growing pauses (default: 8)"
    server.add_argument("--tries", type=at_least(1), default=8, help=text)
    own = command.add_argument_group("--captioner transformers, pisces")
    own.add_argument("--batch-size", type=at_least(1), default=8, help="pictures at once (default: 8)")
    own.add_argument("--device", type=device_name, default="auto", help="cuda, mps, cpu or auto (default)")
    add_json(command)

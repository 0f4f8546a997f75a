"""``pisces generate | ask | reconstruct | demo``: what a model does."""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_pisces.cli.options import (
    Result,
    add_command,
    add_drawing_options,
    add_memory_options,
    at_least,
    check_out,
    load_generator,
    progress_bar,
    say,
)
from open_pisces.files import whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from open_pisces.generate.generator import Generator


def generate(args: argparse.Namespace) -> Result:
    """Draw pictures from prompts: a file each into a folder, or all on one sheet."""
    from open_pisces.sheets import contact_sheet

    check_out(args.out)
    generator = load_generator(args)
    unknown = warn_of_unknown_words(generator, args.prompts)
    use_preset(args, generator)
    how = args.steps, args.guidance_scale, args.seed, args.temperature, args.vector_guidance
    with progress_bar() as progress:
        if args.best_of == 1:
            drawn = generator.image(args.prompts, args.n, *how, progress=progress)
        else:
            from open_pisces.generate.choose import best_of

            drawn = best_of(generator, args.prompts, args.best_of, args.n, *how, progress=progress)
    pictures: list[Image] = []
    prompts: list[str] = []
    for prompt, row in zip(args.prompts, drawn, strict=True):
        pictures += row
        prompts += [prompt] * len(row)
    if args.out.is_dir():
        files = [args.out / name for name in file_names(args.prompts, args.n)]
        save_together(dict(zip(files, pictures, strict=True)))
    else:
        files = [args.out] * len(pictures)
        columns = args.n if args.n > 1 else max(1, round(len(pictures) ** 0.5))  # a row for each prompt, or a square
        sheet = pictures[0] if len(pictures) == 1 else contact_sheet(pictures, prompts, columns)
        save_together({args.out: sheet})
    rows = [{"prompt": prompt, "file": str(file)} for prompt, file in zip(prompts, files, strict=True)]
    say(args, "\n".join(f"{row['prompt']}: {row['file']}" for row in rows))
    names = ("n", "best_of", "steps", "guidance_scale", "seed", "temperature", "vector_guidance")
    return {"pictures": rows, "unknown_words": unknown, **{name: getattr(args, name) for name in names}}


def use_preset(args: argparse.Namespace, generator: Generator) -> None:
    """Fill in the settings of ``--preset`` that were not given themselves."""
    if args.preset is None:
        return
    for name, value in generator.pisces.settings.decoder.preset(args.preset).model_dump().items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def warn_of_unknown_words(generator: Generator, prompts: list[str]) -> list[str]:
    """Say on standard error which words the model never saw, and known ones that are spelt like them; returns them."""
    from open_pisces.generate.words import UnknownWord, unknown_words

    found: dict[str, UnknownWord] = {}
    for prompt in prompts:
        found |= {unknown.word: unknown for unknown in unknown_words(generator.tokenizer, prompt)}
    for unknown in found.values():
        print(f"pisces: {unknown}", file=sys.stderr)
    if found:
        print("pisces: `pisces info --words` lists the words it knows", file=sys.stderr)
    return list(found)


def ask(args: argparse.Namespace) -> Result:
    """Answer a question about one or more images."""
    from open_pisces.data.images import open_image

    images = [open_image(path) for path in args.images]
    answer = load_generator(args).text([images], [args.question], max_new_tokens=args.max_new_tokens)[0]
    say(args, answer)
    return {"images": args.images, "question": args.question, "answer": answer}


def reconstruct(args: argparse.Namespace) -> Result:
    """Send a picture's true generation vectors through the decoder."""
    from open_pisces.data.images import open_image

    check_out(args.out)
    image = open_image(args.picture)
    file = args.out / f"{Path(args.picture).stem}-reconstructed.png" if args.out.is_dir() else args.out
    (rebuilt,) = load_generator(args).reconstruct([image], args.steps, args.guidance_scale, args.seed)
    save_together({file: rebuilt})
    say(args, str(file))
    return {"picture": args.picture, "file": str(file)}


def demo(args: argparse.Namespace) -> Result:
    """Draw a sheet, caption it, talk about two scenes."""
    from open_pisces.cli.demo import run_demo

    check_out(args.out)
    run_demo(load_generator(args), args.out / "demo.png" if args.out.is_dir() else args.out)
    return None


# ------------------------------------------------------------------------------------------------------ the files


def file_names(prompts: list[str], n: int) -> list[str]:
    """A different file name for each of ``n`` pictures of each prompt, made of the prompt's words."""
    names = []
    for i, prompt in enumerate(prompts):
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"
        stem = words if len(prompts) == 1 else f"{i:02d}-{words}"
        names += [f"{stem}.png"] if n == 1 else [f"{stem}-{k}.png" for k in range(n)]
    return names


def save_together(pictures: dict[Path, Image]) -> None:
    """Write all pictures or none: none gets its name before all are written."""
    with ExitStack() as stack:
        for file, picture in pictures.items():
            picture.save(stack.enter_context(whole_file(file)))


# --------------------------------------------------------------------------------------------------- the arguments


def add_generate(commands: Any) -> None:
    """``pisces generate | ask | reconstruct``."""
    command = add_command(commands, "generate", generate, "draw pictures from prompts", model=True)
    command.add_argument("prompts", nargs="+", metavar="PROMPT")
    add_memory_options(command)
    _add_out(command)
    add_drawing_options(command, n=1)
    text = "quality, balanced or fast: the model's own settings for each; other options go before it"
    command.add_argument("--preset", choices=("quality", "balanced", "fast"), help=text)
    text = "draw N for each picture, keep the one that the model itself describes by the prompt best (default: 1)"
    command.add_argument("--best-of", type=at_least(1), default=1, metavar="N", help=text)
    text = "variance of the noise that a sampling head starts from, 0 for none (default: 1); squared error has none"
    command.add_argument("--temperature", type=float, default=1.0, help=text)
    text = "guidance on the LLM's hidden states, away from the empty caption; 1 turns it off (default: the model's)"
    command.add_argument("--vector-guidance", type=float, help=text)

    command = add_command(commands, "ask", ask, "answer a question about images", model=True)
    command.add_argument("images", nargs="+", metavar="IMAGE")
    command.add_argument("question", metavar="QUESTION")
    add_memory_options(command)
    command.add_argument("--max-new-tokens", type=at_least(1), default=64, help="length of the answer (default: 64)")

    text = "rebuild a picture from its true generation vectors: what the decoder can do at best"
    command = add_command(commands, "reconstruct", reconstruct, text, model=True)
    command.add_argument("picture", metavar="PICTURE")
    add_memory_options(command)
    _add_out(command)
    add_drawing_options(command)


def _add_out(command: argparse.ArgumentParser) -> None:
    text = "a picture file or an existing folder (default: .)"
    command.add_argument("--out", type=Path, default=Path("."), help=text)


def add_demo(commands: Any) -> None:
    """``pisces demo``."""
    text = "draw a sheet, caption it, talk about two scenes"
    command = add_command(commands, "demo", demo, text, model=True, json=False)
    command.add_argument("--out", type=Path, default=Path("demo.png"), help="the sheet (default: demo.png)")

"""`ldm COMMAND ...`. A command's module is imported only when it is called, so `ldm --help` is instant."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from ldm import __version__
from ldm.cli.entry import EXIT_USER_ERROR, Parser, run_command

COMMANDS = {
    "generate": "draw pictures from prompts, semantic maps and classes",
    "inpaint": "repaint where a mask is white, and change no other pixel",
    "outpaint": "extend a picture beyond its borders",
    "img2img": "draw variations of a picture",
    "interpolate": "go from one prompt, seed or picture to another",
    "plan": "say what a training will need: memory, time, disk, and what to change if it does not fit",
    "data": "check a dataset, or write the built-in scenes to disk",
    "reconstruct": "measure an autoencoder on images, with a side-by-side picture",
    "export": "write a model or a LoRA in the form that another program opens",
    "evaluate": "measure a model or an autoencoder: one page of pictures, figures and plots",
    "compare": "lay several models side by side: the same prompts and seeds",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    name, *rest = words
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"ldm: unknown command {name!r}{hint} Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USER_ERROR
    module = importlib.import_module(f"ldm.cli.{name}")
    parser = Parser(prog=f"ldm {name}", description=module.__doc__)
    module.add_arguments(parser)
    parsed = parser.parse_args(rest)
    return run_command(f"ldm {name}", lambda: module.run(parsed))


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ldm COMMAND [options]        (ldm COMMAND --help tells its options)",
            "",
            *lines,
            "",
            "Training: python train_vae.py CONFIG key.sub=value ...   (stage 1, the autoencoder)",
            "          python train_ldm.py CONFIG key.sub=value ...   (stage 2, the latent U-Net)",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

"""Check images or shards before training on them, write the built-in scenes as a folder, import semantic maps."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.entry import printable
from ldm.errors import UserError, user_input
from ldm.files import write_text

if TYPE_CHECKING:
    from ldm.data.check import CheckReport

_EXAMPLES = 3
"""Files named on screen for each kind of warning; the JSON report names all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands `check`, `scenes` and `maps`."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="check|scenes|maps")
    check = commands.add_parser("check", help="list every image that cannot be used, with the reason")
    check.description = "Exit code 0: all can be used; 1: some cannot; 2: the folder as a whole cannot."
    check.add_argument(
        "root", metavar="ROOT", help="folder with metadata.jsonl|csv, class subfolders, just images, or .tar shards"
    )
    check.add_argument("--caption-column", default="text", metavar="NAME", help="of the metadata file (default text)")
    check.add_argument("--min-side", type=int, default=64, metavar="PX", help="warn of smaller images (default 64)")
    check.add_argument("--buckets", action="store_true", help="count the images of each aspect-ratio bucket")
    check.add_argument("--resolution", type=int, default=512, metavar="R", help="with --buckets: side of the square")
    check.add_argument("--step", type=int, default=64, metavar="PX", help="with --buckets: sides are multiples of it")
    check.add_argument("--max-aspect", type=float, default=2.0, metavar="A", help="with --buckets: longest shape")
    check.add_argument(
        "--workers", type=int, metavar="N", help="files read at once (default: as many as cores, 8 at most)"
    )
    check.add_argument("--json", type=Path, metavar="OUT", help="write the whole report to this file")

    scenes = commands.add_parser("scenes", help="write the built-in scenes as a folder of images")
    scenes.add_argument("out", type=Path, metavar="OUT", help="new or empty folder")
    scenes.add_argument("--count", type=int, default=1000, metavar="N", help="images (default 1000)")
    scenes.add_argument("--resolution", type=int, default=64, metavar="R", help="side in pixels (default 64)")
    scenes.add_argument("--kind", choices=("shapes", "emoji"), default="shapes")
    scenes.add_argument("--seed", type=int, default=0, metavar="S")
    scenes.add_argument("--split", choices=("train", "held_out"), default="train", help="held_out: never in train")
    scenes.add_argument("--max-objects", type=int, default=1, metavar="M", help="objects a scene, 1 to 3 (default 1)")

    maps = commands.add_parser("maps", help="convert colour-coded semantic maps to index PNGs")
    maps.description = (
        "Every colour of every map is checked first; if one is not in FILE, all such are listed: exit code 2."
    )
    maps.add_argument("maps", type=Path, metavar="IN", help="folder with colour-coded maps; subfolders are kept")
    maps.add_argument("out", type=Path, metavar="OUT", help="new or empty folder")
    maps.add_argument(
        "--classes", type=Path, required=True, metavar="FILE", help="a class a line: [index] name #rrggbb, or r g b"
    )


def run(args: argparse.Namespace) -> int | None:
    """Run the chosen subcommand. Returns the exit code."""
    commands = {"check": run_check, "scenes": run_scenes, "maps": run_maps}
    return commands[args.data_command](args)


def run_check(args: argparse.Namespace) -> int:
    """`ldm data check`: unusable files and the summary on stdout, warnings and progress on stderr."""
    from tqdm import tqdm

    from ldm.data.check import check_folder

    for name, value in (("--workers", args.workers), ("--min-side", args.min_side)):
        if value is not None and value < 1:
            raise UserError(f"{name}: found {value}; allowed is 1 or more")
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json: no folder {args.json.parent}; make it, or name another place")
    buckets = _bucket_sizes(args) if args.buckets else ()
    report = check_folder(
        args.root,
        caption_column=args.caption_column,
        min_side=args.min_side,
        buckets=buckets,
        threads=args.workers,
        on_unusable=lambda problem: tqdm.write(printable(f"{problem.name}: {problem.reason}"), file=sys.stdout),
    )
    _print_warnings(report)
    print(report.summary())
    for name, count in report.buckets.items():
        print(f"bucket {name}: {count} images")
    if args.json is not None:
        write_text(args.json, json.dumps(report.as_json(), indent=1) + "\n")
    return 1 if report.unusable else 0


def _bucket_sizes(args: argparse.Namespace) -> tuple[tuple[int, int], ...]:
    """The shapes that a training with these options would use."""
    from ldm.data.buckets import BucketsConfig, bucket_sizes, check_resolution

    with user_input("ldm data check --buckets", ValueError):
        config = BucketsConfig(step=args.step, max_aspect=args.max_aspect)
        check_resolution(args.resolution, config)
    return bucket_sizes(args.resolution, config)


def run_scenes(args: argparse.Namespace) -> int:
    """`ldm data scenes`: a folder that the source `folder` reads."""
    from ldm.data.scenes import ScenesConfig
    from ldm.data.scenes_folder import write_scenes

    with user_input("ldm data scenes", ValueError):
        config = ScenesConfig(
            kind=args.kind, count=args.count, seed=args.seed, split=args.split, max_objects=args.max_objects
        )
        write_scenes(config, args.resolution, args.out, args.count)
    print(f"{args.out}: {args.count} images of {args.resolution} px; train with data.root={args.out}")
    return 0


def run_maps(args: argparse.Namespace) -> int:
    """`ldm data maps`: stray colours and broken files on stdout, progress on stderr."""
    from tqdm import tqdm

    from ldm.data.maps import convert_maps

    def show(problem: str) -> None:
        tqdm.write(printable(problem), file=sys.stdout)

    with user_input(f"{args.out}: cannot be written", OSError):
        count = convert_maps(args.maps, args.out, args.classes, on_problem=show)
    print(f'{args.out}: {count} index maps; name each in the column "semantic" of the metadata file')
    return 0


def _print_warnings(report: CheckReport) -> None:
    for what, names in report.warnings.items():
        more = f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
        print(printable(f"warning: {what}: {', '.join(names[:_EXAMPLES])}{more}"), file=sys.stderr)

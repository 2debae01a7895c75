"""``python -m dmax_kernels COMMAND``: info, demo, train."""

from __future__ import annotations

import argparse
import importlib
import sys

# name: one line for --help; each is dmax_kernels/cli/<name>.py with add_arguments and run,
# imported only when asked for, so that `info` needs nothing but torch
COMMANDS = {
    "info": "versions, build, and which backend serves each op on each device",
    "demo": "decode held-out problems with the shipped checkpoints: table, page, picture",
    "train": "make the three checkpoints of the demo from nothing",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dmax_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = sys.argv[1:] if argv is None else argv
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:]
        )
        if name in arguments[:1]:
            try:
                module = importlib.import_module(f"dmax_kernels.cli.{name}")
            except ModuleNotFoundError as error:
                if error.name and error.name.startswith("dmax_kernels"):
                    raise
                print(
                    f"dmax_kernels {name}: needs the Python package {error.name!r}; "
                    "install the loops' needs with: pip install 'dmax-kernels[loops]'",
                    file=sys.stderr,
                )
                return 1
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, RuntimeError, OSError) as error:  # a user's mistake reads as one line
        print(f"dmax_kernels {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ndmax_kernels {options.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

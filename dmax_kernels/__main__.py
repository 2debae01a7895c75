"""``python -m dmax_kernels COMMAND``: info, generate, demo, bench, distill, train, evaluate."""

from __future__ import annotations

import argparse
import importlib
import io
import sys

# name: one line for --help; each is dmax_kernels/cli/<name>.py with add_arguments and run, and with
# CONFIG if it takes a file of options; imported only when asked for, so that `info` needs nothing
# but torch
COMMANDS = {
    "info": "versions, build, and which backend serves each op on each device",
    "generate": "answer prompts with a model by name or folder, several tokens per forward pass",
    "demo": "decode held-out problems with the shipped checkpoints: table, page, picture",
    "bench": "time one op at one shape beside the eager PyTorch it replaces",
    "distill": "let a model answer prompts, and keep its complete answers as training data",
    "train": "train a block-diffusion model on conversations (OPUT); or the demo's, from nothing",
    "evaluate": "accuracy, tokens per forward and AUP of models and decoding rules on problems",
}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if argv is None:  # minutes of work must not end in a letter that the terminal does not have
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="python -m dmax_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = arguments[0] if arguments else None
    try:
        for name, summary in COMMANDS.items():
            description = summary[0].upper() + summary[1:]
            command = commands.add_parser(name, help=summary, description=description)
            if name == chosen:
                module = importlib.import_module(f"dmax_kernels.cli.{name}")
                module.add_arguments(command)
                command.set_defaults(run=module.run)
                if hasattr(module, "CONFIG"):
                    arguments = [name, *module.CONFIG.expand(arguments[1:], module.add_arguments)]
        options = parser.parse_args(arguments)
        return options.run(options) or 0
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("dmax_kernels"):
            raise
        problem = (
            f"needs the Python package {error.name!r}; the loops' needs come with: "
            "pip install 'dmax-kernels[loops]'"
        )
        status = 1
    except (ValueError, RuntimeError, OSError) as error:  # a user's mistake reads as one line
        problem, status = str(error), 1
    except KeyboardInterrupt:
        problem, status = "interrupted", 130
    print(f"dmax_kernels {chosen}: {problem}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

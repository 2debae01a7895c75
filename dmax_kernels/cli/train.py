"""`python -m dmax_kernels train`: makes the ring-walk checkpoints from nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("ring_walk_checkpoints"),
        help="folder for checkpoints, log and state; a run begun there is resumed (%(default)s)",
    )
    parser.add_argument(
        "--ops",
        choices=("reference", "fused"),
        default="reference",
        help="implementation of the loss, the rollout's draw and the decoding step (%(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads (%(default)s: the matrices are small, and threads that wait for each "
        "other on a busy machine make it many times slower)",
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit status. What a user can mend is a ValueError or OSError."""
    if args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output must be a folder, got the file {args.output}")
    # Imported here: transformers takes seconds that `--help` need not.
    import torch

    from dmax_kernels.training.train import train

    torch.set_num_threads(args.threads)
    command = f"python -m dmax_kernels train --ops {args.ops} --threads {args.threads}"
    try:
        train(args.output, ops=args.ops, command=command)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; the same command goes on from {args.output / 'state'}", file=sys.stderr
        )
        return 130
    print(f"wrote {args.output}/base, oput, control and training_log.json")
    return 0

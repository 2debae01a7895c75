"""Options of the commands that decode with a model: where it runs, and how it decodes."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from dmax_kernels.cli.options import add_option
from dmax_kernels.decoding import DecodeConfig


def add_machine_options(group: argparse._ArgumentGroup, *, spread: bool = True) -> None:
    """--device and --dtype. spread: whether a model may be spread over devices."""
    several = "auto spreads the layers " if spread else ""
    group.add_argument(
        "--device",
        default=None,
        help=f"cpu, cuda, cuda:1, ...; {several}(default: cuda if there is one)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="data type of the weights (default: auto, as saved)",
    )


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """--raw and --pad-prompts."""
    parser.add_argument(
        "--raw",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="use the prompt without a chat template (default: the tokenizer's)",
    )
    parser.add_argument(
        "--pad-prompts",
        action=argparse.BooleanOptionalAction,
        help="pad raw prompts on the left to whole blocks, as the demo's models were trained; "
        "for copies and descendants of these (default: for base, oput and control)",
    )


def add_decode_options(
    group: argparse._ArgumentGroup,
    *,
    defaults: dict[str, Any],
    without: Collection[str] = (),
) -> None:
    """The fields of `DecodeConfig`; `defaults` are this command's own."""
    for item in fields(DecodeConfig):
        if item.name not in without:
            add_option(group, item, defaults.get(item.name, item.default))


def machine(args: argparse.Namespace) -> tuple[str, Any]:
    """The device's name and the dtype, or None for the checkpoint's."""
    import torch  # imported here: `--help` need not wait for it

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device must be cpu on this machine, which has no GPU, got {device}")
    if device != "auto":
        try:
            torch.device(device)
        except RuntimeError:
            need = "auto or a device of PyTorch, as cpu or cuda:1"
            raise ValueError(f"--device must be {need}, got {device}") from None
    return device, None if args.dtype == "auto" else getattr(torch, args.dtype)


def given_options(args: argparse.Namespace, without: Collection[str] = ()) -> dict[str, Any]:
    """Fields of `DecodeConfig` that the user gave."""
    names = {item.name for item in fields(DecodeConfig)} - set(without)
    options = {name: value for name, value in vars(args).items() if name in names}
    if "eos_token_id" in options:
        options["eos_token_id"] = (options["eos_token_id"],)
    if "logit_bias" in options:
        options["logit_bias"] = read_bias(options["logit_bias"])
    return options


def read_bias(texts: list[str]) -> dict[int, float]:
    """The numbers of --logit-bias by their tokens."""
    bias: dict[int, float] = {}
    for text in texts:
        token, _, number = text.partition("=")
        try:
            pair = int(token), float(number)
        except ValueError:
            raise ValueError(f"--logit-bias must be ID=NUMBER, got {text}") from None
        if pair[0] in bias:
            raise ValueError(f"--logit-bias must be given once for each token, got {token} twice")
        bias[pair[0]] = pair[1]
    return bias

"""--config: the options of a command in a JSON file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmax_kernels.files import read_json


@dataclass(frozen=True)
class ConfigFile:
    """What a command's --config takes; `main` puts the file's options before those that were typed.

    named: values that are no file and that the command reads itself, with their help.
    repeated: options that may be given several times, which are lists in the file. One that was
        typed replaces the whole list.
    """

    named: dict[str, str] = field(default_factory=dict)
    repeated: tuple[str, ...] = ()

    def add_option(self, group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
        text = (
            "a JSON file of these options ('_' for '-'), which options on the command line override"
        )
        named = [f"{name}, {what}" for name, what in self.named.items()]
        group.add_argument("--config", metavar="FILE", help="; or ".join([text, *named]))

    def expand(
        self, typed: list[str], add_arguments: Callable[[argparse.ArgumentParser], None]
    ) -> list[str]:
        """The arguments with those of the file that --config names, if there is one.

        Raises:
            ValueError: no such file, or one that holds anything but options of this command.
        """
        # Abbreviations count, as they do where the command's own parser reads them
        finder = argparse.ArgumentParser(add_help=False)
        finder.add_argument("--config", nargs="?")
        config = finder.parse_known_args(typed)[0].config
        if config is None or config in self.named:
            return typed
        path = Path(config)
        if not path.exists():
            need = " or ".join([*self.named, "a JSON file"])
            raise ValueError(f"--config must be {need}, got no file {path}")
        values = read_json(path, "--config")
        if not isinstance(values, dict):
            raise ValueError(f"--config {path} must hold an object, got {type(values).__name__}")
        try:
            words = {name: self._words(name, value) for name, value in values.items()}
            parser = _Parser(add_help=False, allow_abbrev=False)
            add_arguments(parser)
            for action in parser._actions:  # what is missing may have been typed
                action.required = False
            parser.parse_args([word for each in words.values() for word in each])
        except ValueError as error:
            raise ValueError(f"--config {path}: {error}") from None
        for name in self.repeated:
            if any(_is_flag(word, _flag(name)) for word in typed):
                words.pop(name, None)
        return [*(word for each in words.values() for word in each), *typed]

    def _words(self, name: str, value: Any) -> list[str]:
        """One option as it would be typed; none for null."""
        flag = _flag(name)
        if flag == "--config":
            raise ValueError("config is no option of a file")
        each = value if isinstance(value, list) else [value]
        if any(isinstance(item, (dict, list)) for item in each):
            raise ValueError(f"{name} must be text, a number, true, false, null or a list of these")
        if value is None:
            return []
        if isinstance(value, bool):
            return [flag if value else f"--no-{flag[2:]}"]
        if isinstance(value, list) and name not in self.repeated:
            return [flag, *map(str, value)]
        return [f"{flag}={item}" for item in each]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_flag(word: str, flag: str) -> bool:
    """Whether a word that was typed is this option, or an abbreviation of it, perhaps with "="."""
    begin = word.partition("=")[0]
    return len(begin) > len("--") and flag.startswith(begin)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)

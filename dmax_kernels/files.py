"""The user's files: read line by line, and written completely or not at all."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def check_input(what: str, path: Path) -> None:
    """`what` is the option or argument that named the file. A pipe counts as a file."""
    if not path.exists():
        raise ValueError(f"{what} must be a file, got no file {path}")
    if path.is_dir():
        raise ValueError(f"{what} must be a file, got the folder {path}")


def check_output(what: str, path: Path) -> None:
    """To be called before the minutes of work whose result goes to the file."""
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"{what} must be a file in a folder that exists, got {path}")
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # see write_atomically
        return
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        need = "a file in a folder that can be written to"
        raise ValueError(f"{what} must be {need}, got {path} ({error.strerror})") from None


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Refuses a folder that another process holds in the same way; it is let go with this process.

    Where the system or the file system has no such locks, nothing is refused.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder} is being written by another process") from None
        yield
    finally:
        os.close(handle)


def read_lines(path: Path, what: str) -> Iterator[tuple[str, str | ValueError]]:
    """Yields ("FILE:LINE", text) for each line that is not blank.

    In place of a text that is not UTF-8 comes a ValueError. A line ends with \\n or \\r\\n and with
    nothing else: U+2028 and U+0085, at which `str.splitlines` splits, may stand inside a JSON
    string. A byte-order mark at the start of a line is dropped.
    """
    check_input(what, path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removesuffix(b"\n").removesuffix(b"\r").removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            text: str | ValueError
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                text = ValueError(f"must be UTF-8 text ({error})")
            yield f"{path}:{number}", text


def read_jsonl(path: Path, what: str = "data") -> Iterator[tuple[str, Any]]:
    """Yields ("FILE:LINE", value) for each line that is not blank; a ValueError if not JSON."""
    for place, line in read_lines(path, what):
        value = line
        if isinstance(line, str):
            try:
                value = parse_json(line)
            except ValueError as error:
                value = error
        yield place, value


def read_json(path: Path, what: str) -> Any:
    """The value that a whole file holds.

    Raises:
        ValueError: the file cannot be read as JSON; one sentence.
    """
    check_input(what, path)
    try:
        return parse_json(path.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{what} {path}: {error}") from None


def parse_json(text: str) -> Any:
    """`json.loads`, in which every failure is a ValueError of one line.

    Python itself raises a plain ValueError for integers of more than 4,300 digits, and a
    RecursionError for values that are nested too deeply for its stack.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be JSON ({error})") from None
    except ValueError:
        raise ValueError("must be JSON with numbers of at most 4,300 digits") from None
    except RecursionError:
        raise ValueError("must be JSON that is not nested so deeply") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a temporary file beside `path`, then renames it: nothing half written is ever left.

    If `path` is a link, the file that it points to is replaced, not the link. A device or a pipe,
    such as /dev/null, is written to directly, because renaming would put a file in its place.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        write(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write_text(text, "utf-8"))


def save_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def replace_folder(new: Path, path: Path) -> None:
    """Renames `new` to `path`; an old folder there is deleted once the new one is in place."""
    old = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)

"""User files are written whole or left as they were, and read as they were written."""

import os
import stat
from pathlib import Path

import pytest

from dmax_kernels.files import (
    check_output,
    fcntl,
    one_writer,
    read_json,
    read_lines,
    replace_folder,
    save_json,
    write_atomically,
    write_text,
)


def test_a_failure_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "report.json"
    write_text(path, "before")

    def half(file):
        file.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]


def test_what_is_not_a_plain_file_stays_what_it_is(tmp_path):
    private, link = tmp_path / "private.json", tmp_path / "link.json"
    private.write_text("{}")
    private.chmod(0o600)
    link.symlink_to(private)
    save_json(link, [1])
    assert link.is_symlink()
    assert private.read_text() == "[\n 1\n]\n"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "whole")
    assert os.read(reader, 99) == b"whole"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_is_replaced_as_one(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["old", "old/new"]


def test_outputs_are_refused_before_the_work(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "a.json"):
        with pytest.raises(ValueError, match="--json must be a file in a folder that exists, got"):
            check_output("--json", path)
    check_output("--json", tmp_path / "a.json")
    check_output("--json", Path(os.devnull))
    if Path("/proc/self").exists():  # where not even root can make a file
        with pytest.raises(ValueError, match=r"a folder that can be written to, got /proc/a\.json"):
            check_output("--json", Path("/proc/a.json"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(fcntl is None, reason="the system has no such locks")
def test_a_folder_has_one_writer(tmp_path):
    with one_writer(tmp_path), pytest.raises(ValueError, match="written by another process"):
        one_writer(tmp_path).__enter__()
    with one_writer(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_lines_of_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\u2028two\r\n\r\n \nthree\x85\rfour \n".encode() + b"\xff\n")
    *lines, (place, error) = read_lines(path, "--prompt-file")
    assert lines == [(f"{path}:1", "one\u2028two"), (f"{path}:4", "three\x85\rfour ")]
    assert place == f"{path}:5"
    assert "must be UTF-8 text" in str(error)


def test_json_of_a_whole_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a":\n[1]}', "utf-8")
    assert read_json(path, "--config") == {"a": [1]}
    for data in (b"{", b"\xff", b"[" * 99999, b"1" * 4301):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"--config .*a\.json: ") as caught:
            read_json(path, "--config")
        assert len(str(caught.value).splitlines()) == 1

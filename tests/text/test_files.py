"""Texts of the user: files that are read, and those that are refused by name."""

import re

import pytest

from vestige import InputError
from vestige.text.files import read_text, require_text


def test_a_text_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo é\n".encode())
    assert read_text(path).endswith("one\r\ntwo é\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\xff\xfe", "is not UTF-8 text"),
        (b"abc\x00def", "is not text: it has NUL bytes"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{re.escape(str(path))} {message}"):
        read_text(path)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=f"no such file: {re.escape(str(tmp_path / 'gone'))}"):
        read_text(tmp_path / "gone")
    with pytest.raises(InputError, match=f"cannot read {re.escape(str(tmp_path))}: Is a directory"):
        read_text(tmp_path)


def test_an_unreadable_path_is_refused_and_not_a_traceback(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for path in (file / "below", tmp_path / ("n" * 300)):
        with pytest.raises(InputError):
            read_text(path)


def test_empty_text_is_refused_under_the_name_of_its_option():
    assert require_text(" a ", "--prompt") == " a "
    with pytest.raises(InputError, match="--prompt is empty"):
        require_text(" \n", "--prompt")

"""JSON files of samples: values of the expected type, or an error with the line."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vestige.errors import InputError, unknown_name_message
from vestige.text.files import read_text


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One sample of a file or a data set.

    Its methods raise an InputError with the sample's place if a value is missing or of another type.
    """

    where: str
    """File and line, or data set and number."""
    line: int = 0
    """Line in the file, from 1; 0 in a data set."""
    columns: Mapping[str, Any]

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text, which may be empty; without a value the default, if there is one."""
        if default is not None and not self.has(name):
            return default
        value = self._value(name)
        if not isinstance(value, str):
            raise self.error(f"{name!r} is not a text but {_shorten(value)}")
        return self._require_utf8(name, value)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of texts, at least one; a single text is a list of one."""
        value = self._value(name)
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise self.error(f"{name!r} is not a list of texts but {_shorten(value)}")
        return tuple(self._require_utf8(name, text) for text in texts)

    def number(self, name: str, default: int | None = None) -> int:
        """Return a whole number above 0, which some data sets write in quotes; without a value the default, if any."""
        if default is not None and not self.has(name):
            return default
        value = self._value(name)
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value[:18])
        if type(value) is not int or value < 1:  # True is an int too
            raise self.error(f"{name!r} is not a whole number above 0 but {_shorten(self.columns[name])}")
        return value

    def has(self, name: str) -> bool:
        """Return whether a column has a value other than null and the empty list."""
        return self.columns.get(name) not in (None, [])

    def check_keys(self, valid: Collection[str], kind: str = "key") -> None:
        """Raise an InputError for the first column whose name is not a valid one."""
        for name in self.columns:
            if name not in valid:
                raise self.error(unknown_name_message(kind, name, valid))

    def error(self, what: str) -> InputError:
        """Return an error with the place of the sample."""
        return InputError(f"{self.where}: {what}")

    def _value(self, name: str) -> Any:
        if name not in self.columns:
            raise self.error(f"{name!r} is missing; there is {', '.join(sorted(self.columns)) or 'nothing'}")
        return self.columns[name]

    def _require_utf8(self, name: str, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape and UTF-8 cannot hold
            raise self.error(f"{name!r} has half a character, \\ud800 to \\udfff") from None
        return text


def read(path: Path) -> list[Entry]:
    """Return the objects of a file with one object a line; blank lines are skipped.

    Raises:
        InputError: The file is missing, unreadable, not UTF-8 or empty, or a line is not a JSON object.
    """
    lines = read_text(path).removeprefix("\ufeff").split("\n")  # splitlines would break inside texts, at U+2028
    places = [(n, f"{path}, line {n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
    return [entry(_loads(line, where), where, n) for n, where, line in places]


def read_whole(path: Path) -> Any:
    """Return the content of a JSON file, of any type.

    Raises:
        InputError: The file is missing, unreadable, not UTF-8 or empty, or not JSON; it gives the line.
    """
    return _loads(read_text(path).removeprefix("\ufeff"), str(path))


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"character {error.colno}" if "\n" not in text else f"line {error.lineno}, character {error.colno}"
        raise InputError(f"{where}: not JSON: {error.msg} at {place}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand nested lists
        raise InputError(f"{where}: not JSON that can be read: {str(error).splitlines()[0]}") from None


def entry(columns: object, where: str, line: int = 0) -> Entry:
    """Return parsed JSON as an entry, or raise an InputError if it is not an object."""
    if not isinstance(columns, dict):
        raise InputError(f"{where}: not a JSON object but {_shorten(columns)}")
    return Entry(where=where, columns=columns, line=line)


def _shorten(value: object) -> str:
    """Return a value as JSON, cut to 40 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."

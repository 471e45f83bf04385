"""Reading JSON files of samples: values of the right type, or an error with the line."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vestige.errors import InputError
from vestige.text.files import read_text


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One sample as a file or a data set has it.

    Its methods raise an InputError that says where it stands if a value is missing or of another type.
    """

    where: str
    """File and line, or data set and number."""
    line: int = 0
    """Its line in a file, from 1; 0 where there is none."""
    columns: Mapping[str, Any]

    def text(self, name: str) -> str:
        """Return a text, which may be empty."""
        value = self._value(name)
        if not isinstance(value, str):
            raise self.error(f"{name!r} is not a text but {_shown(value)}")
        return self._sound(name, value)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of texts, at least one; a single text is a list of one."""
        value = self._value(name)
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise self.error(f"{name!r} is not a list of texts but {_shown(value)}")
        return tuple(self._sound(name, text) for text in texts)

    def number(self, name: str) -> int:
        """Return a whole number above 0; digits in quotes are one, as some data sets have it."""
        value = self._value(name)
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value[:18])
        if type(value) is not int or value < 1:  # True is an int too
            raise self.error(f"{name!r} is not a whole number above 0 but {_shown(self.columns[name])}")
        return value

    def has(self, name: str) -> bool:
        """Return whether there is a value; null and empty lists are none."""
        return self.columns.get(name) not in (None, [])

    def error(self, what: str) -> InputError:
        """Return an error that says where it is."""
        return InputError(f"{self.where}: {what}")

    def _value(self, name: str) -> Any:
        if name not in self.columns:
            raise self.error(f"{name!r} is missing; there is {', '.join(sorted(self.columns)) or 'nothing'}")
        return self.columns[name]

    def _sound(self, name: str, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can escape and UTF-8 cannot hold
            raise self.error(f"{name!r} has half a character, \\ud800 to \\udfff") from None
        return text


def read(path: Path) -> list[Entry]:
    """Return the objects of a file, one a line; blank lines are skipped.

    Raises:
        InputError: The file is missing, unreadable, not UTF-8 or empty, or a line is not a JSON object.
    """
    lines = read_text(path).removeprefix("\ufeff").split("\n")  # splitlines would break inside texts, at U+2028
    return [_parsed(line, n, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]


def read_whole(path: Path) -> Any:
    """Return what a JSON file holds, whatever it is.

    Raises:
        InputError: The file is missing, unreadable, not UTF-8 or empty, or not JSON; it gives the line.
    """
    return _loads(read_text(path).removeprefix("\ufeff"), str(path))


def _parsed(line: str, number: int, where: str) -> Entry:
    return entry(_loads(line, where), where, number)


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"character {error.colno}" if "\n" not in text else f"line {error.lineno}, character {error.colno}"
        raise InputError(f"{where}: not JSON: {error.msg} at {place}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand nested lists
        raise InputError(f"{where}: not JSON that can be read: {str(error).splitlines()[0]}") from None


def entry(columns: object, where: str, line: int = 0) -> Entry:
    """Return what was parsed as an entry, or raise an InputError if it is not an object."""
    if not isinstance(columns, dict):
        raise InputError(f"{where}: not a JSON object but {_shown(columns)}")
    return Entry(where=where, columns=columns, line=line)


def _shown(value: object) -> str:
    """Return a value as JSON, cut to fit a line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."

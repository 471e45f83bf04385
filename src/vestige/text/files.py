"""Text of the user: read from files and checked."""

from pathlib import Path

from vestige.errors import InputError


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        InputError: The file is missing, a folder, unreadable, not UTF-8 text, or empty.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    if "\x00" in text:
        raise InputError(f"{path} is not text: it has NUL bytes")
    return require_text(text, str(path))


def require_text(text: str, name: str) -> str:
    """Return the text, or raise an InputError with its source's name if it is empty or cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} is not UTF-8 text") from None
    if not text.strip():
        raise InputError(f"{name} is empty")
    return text

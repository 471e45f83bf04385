"""Files and folders that are written completely or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vestige.errors import InputError


def write_atomically(path: Path, text: str) -> None:
    """Write a file under another name and rename it, so that it is never seen half written."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        work.write_text(text, encoding="utf-8")
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def require_new(path: Path, hint: str = "") -> None:
    """Raise an InputError unless a new folder can be made: nothing exists at its path, or an empty folder.

    ``hint`` is its purpose, for the message, such as " for --save".
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not empty; name a new folder{hint}")


@contextmanager
def new_folder(path: Path, what: str) -> Iterator[Path]:
    """Yield a temporary folder to fill with ``what``, which is moved to its path at the end; parent folders are made.

    Raises:
        InputError: The path is taken, or cannot be written. No file is left.
    """
    require_new(path)
    work, made = None, [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield work
        work.chmod(0o755)  # mkdtemp makes it private
        if path.exists():
            path.rmdir()
        os.replace(work, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {what} to {path}: {error}") from None
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        if not path.exists():
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()

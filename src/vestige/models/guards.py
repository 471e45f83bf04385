"""Guards around calls of transformers: no progress bars and warnings, and errors of one line."""

import importlib
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vestige.errors import ModelError


@contextmanager
def silenced(hub_bars: bool = False) -> Iterator[None]:
    """Silence the progress bars and warnings of transformers; the hub's download bars may stay."""
    hub: Any = importlib.import_module("huggingface_hub.utils")
    logging: Any = importlib.import_module("transformers.utils.logging")
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    tqdm, level = getattr(reader, "tqdm", None), logging.get_verbosity()
    bars, no_hub_bars = logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    reader.tqdm = lambda items, **_: items  # this bar cannot be switched off
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # the hub's too
    if hub_bars and not no_hub_bars:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        reader.tqdm = tqdm
        logging.set_verbosity(level)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        (hub.disable_progress_bars if no_hub_bars else hub.enable_progress_bars)()


@contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """Turn any error into a ModelError of one line: transformers raises a dozen types for a broken model or device."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        code = "trust_remote_code" in str(error)
        why = "it needs code from its repository, which vestige never runs" if code else one_line(error)
        raise ModelError(f"{what}: {why}") from error


def one_line(error: BaseException) -> str:
    """Return an error's message as one line of at most 240 characters, without a closing full stop."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return textwrap.shorten(text.rstrip(". \n"), 240, placeholder=" ...")

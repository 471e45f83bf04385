"""Fetching public data sets: with ``datasets``, or one line that says what to give in place of a connection."""

import logging
from typing import Any

from huggingface_hub.utils import logging as hub_logging

from vestige.errors import InputError


def fetch(name: str, config: str | None, split: str, option: str) -> list[Any]:
    """Return the rows of a data set on the hub.

    Args:
        name: Owner and name.
        config: Which part of it, or None.
        split: ``test``, ``train``, ...
        option: What the user can give in its place: ``--essays DIR``.

    Raises:
        InputError: They cannot be fetched, for whatever reason, or ``datasets`` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f'fetching {name} needs datasets: pip install "vestige[bench]"; or give {option}') from None
    told = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)  # a line for each retry would drown the one that says what to do
    try:
        return list(load_dataset(name, config, split=split))
    except Exception as error:  # whatever the hub's clients raise, the remedy is the same
        reason = " ".join(str(error).split())[:200] or "no reason given"
        raise InputError(f"cannot fetch {name} ({type(error).__name__}: {reason}); give {option}") from None
    finally:
        hub_logging.set_verbosity(told)

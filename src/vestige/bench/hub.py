"""Public data sets, fetched with ``datasets``; an error names the option that takes a local copy."""

import logging
from typing import Any

from huggingface_hub.utils import logging as hub_logging

from vestige.errors import InputError


def fetch(name: str, config: str | None, split: str, option: str) -> list[Any]:
    """Return the rows of a data set on the hub.

    Args:
        name: Owner and name.
        config: Name of a part, or None.
        split: ``test``, ``train``, ...
        option: The option that takes a local copy: ``--essays DIR``.

    Raises:
        InputError: The rows cannot be fetched, for whatever reason, or ``datasets`` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f'fetching {name} needs datasets: pip install "vestige[bench]"; or give {option}') from None
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)  # a line for each retry would hide the error message
    try:
        return list(load_dataset(name, config, split=split))
    except Exception as error:  # the remedy is the same for every error of the hub's clients
        reason = " ".join(str(error).split())[:200] or "no reason given"
        raise InputError(f"cannot fetch {name} ({type(error).__name__}: {reason}); give {option}") from None
    finally:
        hub_logging.set_verbosity(verbosity)

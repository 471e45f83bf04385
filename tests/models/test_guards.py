"""Guards around calls of transformers: any error becomes a ModelError of one line."""

import pytest

from vestige.errors import ModelError
from vestige.models.guards import one_line, plain_errors


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("two\nlines. "), "two lines"),
        (OSError(2, "No such file", "a"), "No such file"),
        (KeyError(), "KeyError"),
        (ValueError("pass trust_remote_code"), "it needs code from its repository, which vestige never runs"),
    ],
)
def test_an_error_is_one_line_with_its_reason(error, reason):
    with pytest.raises(ModelError) as found, plain_errors("cannot load"):
        raise error
    assert str(found.value) == f"cannot load: {reason}"


def test_an_error_of_ours_passes_and_a_long_message_is_cut():
    with pytest.raises(ModelError, match="^ours$"), plain_errors("cannot load"):
        raise ModelError("ours")
    assert len(one_line(ValueError("word " * 99))) <= 240

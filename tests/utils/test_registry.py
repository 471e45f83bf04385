"""A registry resolves names, makes objects with options, and offers its classes as attributes of a package."""

import sys

import pytest

from vestige import InputError
from vestige.spans import Span
from vestige.utils.registry import Registry

PATHS = {"none": None, "span": "vestige.spans:Span", "heavy": "no.such.module:Class"}
SPANS = Registry[type[Span] | None, Span | None]("span", PATHS, InputError, "package", unnamed=["vestige.spans:within"])


def test_listing_imports_nothing_and_has_all_paths():
    assert set(SPANS.members) == {"Span", "Class", "within"}
    assert "no.such.module" not in sys.modules


def test_a_name_gives_its_class_and_an_object_its_name():
    assert SPANS.resolve("span") is Span and SPANS.resolve("none") is None
    assert SPANS.name_of(Span(1, 2)) == "span" and SPANS.name_of(None) == "none"
    assert SPANS.attribute("Span") is Span and SPANS.attribute("within").__name__ == "within"


def test_a_name_with_options_makes_an_object():
    assert SPANS.make("span(start=1, end=5)") == Span(1, 5)
    assert SPANS.make("none") is None
    assert SPANS.parse("span(start=1)", given=("end",)) == ("span", Span, {"start": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spam", "unknown span 'spam'; did you mean 'span'?"),
        ("span(middle=3)", "span 'span' has no option 'middle'; available: end, start"),
        ("none(start=1)", "span 'none' takes no options, got start"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_registrys_error(text, message):
    with pytest.raises(InputError) as error:
        SPANS.make(text)
    assert message in str(error.value)


def test_an_unknown_attribute_is_the_packages():
    with pytest.raises(AttributeError, match="module 'package' has no attribute 'Spam'"):
        SPANS.attribute("Spam")

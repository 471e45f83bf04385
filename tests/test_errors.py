"""The tree of errors and the line that names an unknown word."""

import inspect

import pytest

import vestige
from vestige import errors
from vestige.errors import VestigeError, unknown_name_message

CLASSES = {
    name: item for name, item in vars(errors).items() if inspect.isclass(item) and item.__module__ == errors.__name__
}


def drawn_tree() -> dict[str, str]:
    """Return the parent of each error, read off the tree in the module's docstring."""
    parents, path = {}, ["VestigeError"]
    for line in errors.__doc__.splitlines():
        branch, found, rest = line.partition("── ")
        if found:
            depth, name = len(branch) // 4 + 1, rest.split()[0]
            path = [*path[:depth], name]
            parents[name] = path[depth - 1]
    return parents


def test_the_tree_in_the_docstring_is_the_tree_of_classes():
    drawn = drawn_tree()
    assert set(drawn) | {"VestigeError"} == set(CLASSES)
    for name, parent in drawn.items():
        assert CLASSES[name].__bases__[0] is CLASSES[parent], name


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_error_is_public_documented_and_caught_as_a_vestige_error(name):
    assert issubclass(CLASSES[name], VestigeError)
    assert getattr(vestige, name) is CLASSES[name]
    assert CLASSES[name].__doc__


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("InputError", ValueError),
        ("BudgetError", ValueError),
        ("PolicyError", ValueError),
        ("CacheError", RuntimeError),
    ],
)
def test_an_error_is_also_the_builtin_that_callers_expect(name, builtin):
    assert issubclass(CLASSES[name], builtin)


def test_an_unknown_word_that_is_near_a_valid_one_gets_a_hint():
    assert unknown_name_message("policy", "snapvk", ["tova", "snapkv"]) == (
        "unknown policy 'snapvk'; did you mean 'snapkv'? available: tova, snapkv"
    )


def test_an_unknown_word_that_is_near_none_gets_the_list_alone():
    assert unknown_name_message("share", "xyz", ["head", "layer"]) == "unknown share 'xyz'; available: head, layer"


def test_valid_words_may_come_from_a_dict_or_be_yielded_once():
    assert unknown_name_message("policy", "ful", {"full": 1}).endswith("did you mean 'full'? available: full")
    assert unknown_name_message("policy", "q", (word for word in "ab")).endswith("available: a, b")

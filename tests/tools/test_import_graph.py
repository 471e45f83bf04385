"""The import graph of a small made-up package: floors, counted arrows, cycles, and a picture that does not change."""

import pytest

from tools.import_graph import draw, find_cycles, make_graph, read_floors

pytest.importorskip("matplotlib")

PYPROJECT = """
[tool.importlinter]
root_packages = ["vestige", "experiments"]
[[tool.importlinter.contracts]]
type = "layers"
layers = ["experiments", "vestige"]
[[tool.importlinter.contracts]]
type = "layers"
containers = ["vestige"]
layers = ["(shed)", "roof", "attic | loft", "cellar"]
"""
MODULES = ["house", "house.roof", "house.roof.tiles", "house.attic", "house.loft", "house.cellar", "house.garden"]
DOWN = [("house.roof.tiles", "house.attic"), ("house.roof", "house.attic"), ("house.loft", "house.cellar")]


def test_floors_are_the_layers_of_the_contract_from_the_lowest():
    assert read_floors(PYPROJECT) == {"cellar": 0, "attic": 1, "loft": 1, "roof": 2, "shed": 3}


def test_imports_between_parts_are_counted_and_others_left_out():
    outside = [("house", "house.roof"), ("house.garden", "house.roof"), ("house.roof", "house.roof.tiles")]
    graph = make_graph(MODULES, [*DOWN, *outside], read_floors(PYPROJECT))
    assert graph.arrows == {("roof", "attic"): 2, ("loft", "cellar"): 1}
    assert graph.rooms == {"roof": 2, "attic": 1, "loft": 1, "cellar": 1}
    assert graph.floors == {"cellar": 0, "attic": 1, "loft": 1, "roof": 2}
    assert graph.cycles == [] and graph.upward == []


def test_arrows_to_a_higher_floor_or_to_the_same_one_point_up():
    upward = [("house.cellar", "house.roof"), ("house.attic", "house.loft")]
    graph = make_graph(MODULES, [*DOWN, *upward], read_floors(PYPROJECT))
    assert graph.upward == [("attic", "loft"), ("cellar", "roof")]


def test_modules_that_reach_each_other_are_a_cycle():
    imports = [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "f"), ("f", "e")]
    assert find_cycles(imports) == [["a", "b", "c"], ["e", "f"]]
    assert find_cycles([("a", "b"), ("b", "c"), ("a", "c")]) == []


def test_the_picture_is_the_same_every_time_and_draws_arrows_up_in_red(tmp_path):
    graph = make_graph(MODULES, DOWN, read_floors(PYPROJECT))
    for name in ("one.svg", "two.svg"):
        draw(graph, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert "#c62828" not in (tmp_path / "one.svg").read_text()
    draw(make_graph(MODULES, [("house.cellar", "house.roof")], read_floors(PYPROJECT)), tmp_path / "up.svg")
    assert "#c62828" in (tmp_path / "up.svg").read_text()

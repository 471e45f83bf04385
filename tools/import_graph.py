"""Draw the packages of vestige on their floors, with the imports between them: ``docs/images/import-graph.svg``.

The floors are the layers of the import contract in ``pyproject.toml``. Prints the numbers of modules ("rooms"), floors,
cycles and arrows up; exits with 1 if there is a cycle or an arrow up.
"""

import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = "vestige"
PICTURE = ROOT / "docs" / "images" / "import-graph.svg"

COMMON = 8
"""Parts that import another one before the arrows to that one are drawn thin and without counts."""

Arrow = tuple[str, str]
"""An import: from the importing to the imported package or module."""


@dataclass(frozen=True)
class Graph:
    """The imports of a package, and the same counted between its parts.

    Args:
        rooms: Modules of each part.
        floors: Floor of each part, the lowest is 0.
        arrows: Imports between two parts, counted.
        cycles: Modules that import each other in a circle.
    """

    rooms: Mapping[str, int]
    floors: Mapping[str, int]
    arrows: Mapping[Arrow, int]
    cycles: Sequence[Sequence[str]]

    @property
    def upward(self) -> list[Arrow]:
        """Arrows that do not point down to a lower floor."""
        return sorted(arrow for arrow in self.arrows if self.floors[arrow[0]] <= self.floors[arrow[1]])


def read_floors(pyproject: str) -> dict[str, int]:
    """Return the floor of each part, from the text of ``pyproject.toml``: its contract lists layers from the top."""
    contracts = tomllib.loads(pyproject)["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if PACKAGE in contract.get("containers", ()))
    floors = {}
    for floor, layer in enumerate(reversed(layers)):
        for name in layer.replace(":", "|").split("|"):
            floors[name.strip(" ()").rpartition(".")[2]] = floor
    return floors


def find_part(module: str) -> str:
    """Return the part that a module belongs to: the package or file below the root."""
    return module.split(".")[1]


def make_graph(modules: Iterable[str], imports: Iterable[Arrow], floors: Mapping[str, int]) -> Graph:
    """Return the graph of modules and imports, all named ``root.part...``.

    The root itself, parts without a floor, and floors without a part are left out.
    """
    known = [module for module in modules if "." in module and find_part(module) in floors]
    inside = [arrow for arrow in imports if all("." in module and find_part(module) in floors for module in arrow)]
    between = Counter((find_part(source), find_part(target)) for source, target in inside)
    arrows = {arrow: count for arrow, count in sorted(between.items()) if arrow[0] != arrow[1]}
    rooms = Counter(map(find_part, known))
    return Graph(rooms, {part: floors[part] for part in floors if part in rooms}, arrows, find_cycles(inside))


def find_cycles(imports: Iterable[Arrow]) -> list[list[str]]:
    """Return the groups of modules that reach each other by imports (strongly connected components of two or more)."""
    targets: dict[str, set[str]] = {}
    for source, target in imports:
        targets.setdefault(source, set()).add(target)
        targets.setdefault(target, set())
    reach = {module: _find_reachable(module, targets) for module in targets}
    groups = {tuple(sorted(other for other in reach[module] if module in reach[other])) for module in targets}
    return sorted(list(group) for group in groups if group)


def _find_reachable(start: str, targets: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    queue = [start]
    while queue:
        new = targets[queue.pop()] - found
        found |= new
        queue += new
    return found


def read_graph() -> Graph:
    """Return the graph of the installed package."""
    import grimp

    imports = grimp.build_graph(PACKAGE, cache_dir=None)
    arrows = [(name, target) for name in imports.modules for target in imports.find_modules_directly_imported_by(name)]
    return make_graph(imports.modules, arrows, read_floors((ROOT / "pyproject.toml").read_text()))


def draw(graph: Graph, path: Path) -> None:
    """Write the picture: a box a part, arrows down in grey with their counts, arrows up in red; no date, fixed ids."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": PACKAGE, "svg.fonttype": "none", "font.family": "sans-serif"}):
        top = max(graph.floors.values())
        figure = Figure(figsize=(10, 1.0 + 0.85 * (1 + top)))
        axes = figure.subplots()
        axes.axis("off")
        axes.set(xlim=(-1.5, 1.3), ylim=(-0.6, top + 0.6))
        places = place_boxes(graph)
        for arrow in graph.arrows:
            _draw_arrow(axes, graph, arrow, places)
        box = {"boxstyle": "round,pad=0.45", "facecolor": "#e8eef5", "edgecolor": "#37474f", "linewidth": 0.9}
        for part, (x, y) in places.items():
            label = f"{part}  {graph.rooms.get(part, 0)}"
            axes.text(x, y, label, ha="center", va="center", size=10, zorder=3, bbox=box)
        for floor in range(1 + top):
            axes.text(-1.45, floor, f"floor {floor + 1}", size=7, color="#90a4ae", ha="left", va="center")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")


def _draw_arrow(axes: Any, graph: Graph, arrow: Arrow, places: Mapping[str, tuple[float, float]]) -> None:
    from matplotlib.patches import FancyArrowPatch

    (x, y), (to_x, to_y) = (places[part] for part in arrow)
    count, is_up = graph.arrows[arrow], arrow in graph.upward
    is_common = not is_up and sum(target == arrow[1] for _, target in graph.arrows) >= COMMON
    axes.add_patch(
        FancyArrowPatch(
            (x, y),
            (to_x, to_y),
            arrowstyle="-|>",
            mutation_scale=9,
            shrinkA=12,
            shrinkB=15,
            color="#c62828" if is_up else "#b9c4cf" if is_common else "#607d8b",
            linewidth=(0.4 if is_common else 0.7) + 0.08 * min(count, 25),
            zorder=2 if is_up else 1,
        )
    )
    if not is_common:
        place = (x + 0.42 * (to_x - x), y + 0.42 * (to_y - y))
        color, box = (
            "#c62828" if is_up else "#37474f",
            {"boxstyle": "round,pad=0.12", "facecolor": "white", "linewidth": 0},
        )
        axes.text(*place, str(count), size=7, color=color, zorder=2, ha="center", va="center", bbox=box)


def place_boxes(graph: Graph) -> dict[str, tuple[float, float]]:
    """Return the middle of each box: its floor, and a column that changes from floor to floor so that arrows spread."""
    columns, spreads = (0.0, 0.7, 0.0, 0.4, -0.35, 0.0, 0.0, -0.1, 0.5, -0.5, 0.15, 0.8, -0.25), (1.0, 0.7, 0.85)
    places: dict[str, tuple[float, float]] = {}
    for floor in sorted(set(graph.floors.values())):
        parts = sorted(part for part, at in graph.floors.items() if at == floor)
        for i, part in enumerate(parts):
            across = 2 * i / (len(parts) - 1) - 1 if len(parts) > 1 else 0.0
            spread = spreads[floor % len(spreads)]
            places[part] = (spread * across if across else columns[floor % len(columns)], float(floor))
    return places


def main() -> int:
    """Draw the picture and print the counts; return 1 if there is a cycle or an arrow up."""
    graph = read_graph()
    draw(graph, PICTURE)
    print(
        f"{sum(graph.rooms.values())} rooms, {1 + max(graph.floors.values())} floors, {len(graph.cycles)} cycles, "
        f"{len(graph.upward)} arrows up"
    )
    for cycle in graph.cycles:
        print("cycle:", ", ".join(cycle))
    for source, target in graph.upward:
        print(f"up: {source} -> {target} ({graph.arrows[source, target]})")
    return int(bool(graph.cycles or graph.upward))


if __name__ == "__main__":
    sys.exit(main())

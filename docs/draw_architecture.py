"""Draw ``docs/images/architecture.svg``: rooms of the code, and which imports which, read from the sources.

    python docs/draw_architecture.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FILE = REPOSITORY / "docs" / "images" / "architecture.svg"
PACKAGES = ("pipelines", "amlora_dist")
GROUND = "amlora_dist: ground"
"""Modules that are in no room of their own."""
FROM_OUTSIDE = ("amlora_dist/registry/pyfunc.py",)
"""Ways in that no module imports: MLflow calls the loader of a version."""
WIDTH, HEIGHT, GAP, LIFT = 168, 46, 24, 58
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1b1f24}.s{font-size:11px;fill:#57606a}rect{rx:6;stroke:#8c959f}"
    ".p{fill:#ddf4ff}.a{fill:#fff8c5}path{fill:none;stroke:#8c959f;stroke-width:1;opacity:.55}"
    ".ground{fill:#fff;stroke:none}"
    "@media(prefers-color-scheme:dark){.ground{fill:#0d1117}text{fill:#e6edf3}.s{fill:#9198a1}.p{fill:#0c2d6b}.a{fill:#3b2300}}"
)


def room_of(module: list[str]) -> str | None:
    """Name of the room of a module's dotted path; None for other packages."""
    if module[0] not in PACKAGES or len(module) < 2:
        return None
    if module[0] == "pipelines":
        return f"pipelines/{module[1]}"
    folder = REPOSITORY / "amlora_dist" / module[1]
    return f"amlora_dist/{module[1]}" if folder.is_dir() and module[1] != "config" else _of_config(module)


def _of_config(module: list[str]) -> str:
    above = module[1] == "config" and module[2:3] not in (["schema"], ["strict_yaml"], ["former_values"], ["search_space"])
    return "amlora_dist/config" if above else GROUND


def imported(file: Path) -> Iterator[list[str]]:
    """Dotted paths that a file imports at run time."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in _run(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield [*node.module.split("."), alias.name]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)


def _run(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from _run(child)


def rooms() -> tuple[dict[str, int], dict[str, set[str]]]:
    """Lines of code of each room, and the rooms that it imports."""
    sizes: dict[str, int] = {}
    edges: dict[str, set[str]] = {}
    for package in PACKAGES:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            parts = list(file.relative_to(REPOSITORY).with_suffix("").parts)
            if parts[-1] == "__init__" and len(parts) == 2:
                continue
            own = room_of(parts)
            if own is None:
                continue
            sizes[own] = sizes.get(own, 0) + 1
            outside = file.relative_to(REPOSITORY).as_posix() in FROM_OUTSIDE
            others = {room for path in imported(file) if (room := room_of(path)) is not None and not outside}
            edges.setdefault(own, set()).update(others - {own})
    return sizes, edges


def reached(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """What each room imports over any number of others."""
    below = {room: set(others) for room, others in edges.items()}
    for _ in edges:
        below = {room: others.union(*(below[other] for other in others)) for room, others in below.items()}
    return below


def floors(edges: dict[str, set[str]]) -> list[list[str]]:
    """Rooms from the ground up: each is above all that it imports; rooms that import each other share a floor."""
    below = reached(edges)
    levels: list[list[str]] = []
    placed: set[str] = set()
    while len(placed) < len(edges):
        ready = [room for room in edges if room not in placed and all(o in placed or room in below[o] for o in below[room])]
        levels.append(sorted(ready))
        placed.update(ready)
    return levels


def drawing() -> str:
    """The picture."""
    sizes, edges = rooms()
    levels = floors(edges)
    widest = max(map(len, levels))
    width = widest * (WIDTH + GAP) + GAP
    height = len(levels) * (HEIGHT + LIFT) - LIFT + 2 * GAP
    place: dict[str, tuple[float, float]] = {}
    for number, level in enumerate(reversed(levels)):
        left = (width - len(level) * (WIDTH + GAP) + GAP) / 2
        for column, room in enumerate(level):
            place[room] = (left + column * (WIDTH + GAP), GAP + number * (HEIGHT + LIFT))
    lines = [f'<rect class="ground" width="{width}" height="{height}"/>']  # a reader's page may be darker than their system
    below = reached(edges)
    for room in sorted(edges):
        x, y = place[room]
        for other in sorted(edges[room]):
            a, b = place[other]
            if b == y or any(other in below[third] for third in edges[room] - {other} if place[third][1] < b):
                continue  # it is on the same floor, or follows from another arrow
            start, end = (x + WIDTH / 2, y + HEIGHT), (a + WIDTH / 2, b)
            middle = (start[1] + end[1]) / 2
            lines.append(
                f'<path d="M{start[0]:.0f} {start[1]:.0f} C{start[0]:.0f} {middle:.0f} {end[0]:.0f} {middle:.0f}'
                f' {end[0]:.0f} {end[1]:.0f}"/>'
            )
    for room in sorted(place):
        x, y = place[room]
        kind, middle = ("p" if room.startswith("pipelines") else "a"), x + WIDTH / 2
        lines.append(f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}"/>')
        lines.append(f'<text x="{middle:.0f}" y="{y + 20:.0f}" text-anchor="middle">{escape(room)}</text>')
        files = f"{sizes[room]} modules"
        lines.append(f'<text class="s" x="{middle:.0f}" y="{y + 36:.0f}" text-anchor="middle">{files}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    title = "<title>Rooms of the code, and what each imports</title>"
    return "\n".join([head, title, f"<style>{STYLE}</style>", *lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    FILE.write_text(drawing(), encoding="utf-8")

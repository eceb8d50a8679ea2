"""Draws docs/house.svg, the folders and rooms of gapjax by floor, from today's imports.

python tests/draw_house.py
"""

import json
from pathlib import Path

import matplotlib
import test_architecture as architecture
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon
from matplotlib.path import Path as Path2D

PICTURE = architecture.ROOT / "docs" / "house.svg"

# From left to right on each floor; a folder that is not named here comes last.
_ORDER = ("codec", "fit", "results", "infer", "measure", "optimizers", "model", "jobs",
          "checkpoints", "vae", "parallel", "data")  # fmt: skip
_MEANS = {
    "checkpoints": "pytree to folder",
    "codec": "images to bytes",
    "data": "bytes to Dataset",
    "fit": "source, state to next state",
    "infer": "one x to its posterior",
    "jobs": "threads, processes",
    "measure": "images to nats [N]",
    "model": "one x, one z to nats",
    "optimizers": "gradients to updates",
    "parallel": "function to program",
    "results": "nats [N] to tables",
    "vae": "the contract",
}
_INK, _EDGE, _WALL = "#263238", "#5c6bc0", "#90a4ae"
_FILLS = ("#e8eaf6", "#e3f2fd", "#e0f2f1", "#f1f8e9", "#fffde7", "#fff3e0")
_ROOM_W, _ROOM_H, _PAD, _GAP, _STOREY = 1.62, 0.36, 0.13, 0.5, 0.85


def plan():
    """{"rooms": {folder: its rooms}, "imports": [[folder, a folder that it imports]]}.

    A file beside the folders is a folder without rooms.
    """
    rooms, imports = {}, set()
    for room in architecture.ROOMS:
        folder, _, name = room.partition("/")
        if folder == "__init__":
            continue
        if name != "__init__":
            rooms.setdefault(folder, []).extend([name] if name else [])
        others = {other.split("/")[0] for other in architecture._imported(architecture._tree(room))}
        imports |= {(folder, other) for other in others - {folder}}
    return {"rooms": rooms, "imports": sorted(map(list, imports))}


def drawn(svg):
    """The plan that a picture was drawn from."""
    text = svg.partition("<dc:description>")[2].partition("</dc:description>")[0]
    return json.loads(text.replace("&quot;", '"').replace("&gt;", ">"))


def _floors(house):
    """The folders of every floor, the lowest first; each stands just above all that it imports."""
    below = {folder: {b for a, b in house["imports"] if a == folder} for folder in house["rooms"]}
    rank = lambda folder: (_ORDER.index(folder) if folder in _ORDER else len(_ORDER), folder)
    floors, built = [], set()
    while built != set(below):
        floor = sorted((f for f in below if f not in built and below[f] <= built), key=rank)
        assert floor, "the folders import each other in a circle"
        floors.append(floor)
        built |= set(floor)
    return floors


def _needed(imports):
    """The imports that do not follow from others."""
    below = {}
    for folder, other in imports:
        below.setdefault(folder, set()).add(other)

    def reached(folder):
        return {x for other in below.get(folder, ()) for x in {other} | reached(other)}

    return [(a, b) for a, b in imports if not any(b in reached(c) for c in below[a] - {b})]


def _size(rooms):
    """Width and height of a folder, and how many rooms stand side by side."""
    columns = max(1, min(3 if len(rooms) > 4 else 2, len(rooms)))
    rows = -(-len(rooms) // columns)
    width = max(2.2, columns * (_ROOM_W + _PAD) + _PAD)
    return width, 0.72 + rows * (_ROOM_H + _PAD), columns


def _box(axes, x, y, width, height, fill, edge, radius):
    style = f"round,pad=0,rounding_size={radius}"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, fc=fill, ec=edge, lw=1.1, zorder=2)
    )


def _draw_folder(axes, folder, rooms, place, fill):
    x, y, width, height = place
    _box(axes, x, y, width, height, fill, _WALL, 0.12)
    title = f"{folder}/" if rooms else folder
    middle = x + width / 2
    axes.text(middle, y + height - 0.24, title, ha="center", va="center", size=11, weight="bold")
    axes.text(
        middle, y + height - 0.52, _MEANS.get(folder, ""), ha="center", va="center", size=7.5,
        style="italic", color="#546e7a",
    )  # fmt: skip
    columns = _size(rooms)[2]
    for number, room in enumerate(rooms):
        row, column = divmod(number, columns)
        in_row = min(columns, len(rooms) - row * columns)
        left = middle - (in_row * (_ROOM_W + _PAD) - _PAD) / 2 + column * (_ROOM_W + _PAD)
        bottom = y + height - 0.72 - (row + 1) * _ROOM_H - row * _PAD
        _box(axes, left, bottom, _ROOM_W, _ROOM_H, "white", _WALL, 0.06)
        axes.text(
            left + _ROOM_W / 2, bottom + _ROOM_H / 2 - 0.01, room, ha="center", va="center", size=8
        )


def _places(house):
    """Where every folder stands: left, bottom, width, height; the lowest floor at 0."""
    places, bottom = {}, 0.0
    for floor in _floors(house):
        sizes = [_size(house["rooms"][folder]) for folder in floor]
        height = max(size[1] for size in sizes)
        left = -(sum(size[0] for size in sizes) + _GAP * (len(floor) - 1)) / 2
        for folder, (width, own, _) in zip(floor, sizes, strict=True):
            places[folder] = left, bottom + height - own, width, own
            left += width + _GAP
        bottom += height + _STOREY
    return places, bottom - _STOREY


def draw(house):
    """The figure of a plan."""
    places, top = _places(house)
    half = max(-left for left, *_ in places.values()) + 0.45
    figure = Figure(figsize=(2 * half * 0.72 + 0.4, (top + 3.0) * 0.72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-half - 0.5, half + 0.5)
    axes.set_ylim(-0.75, top + 2.0)
    axes.set_aspect("equal")
    axes.axis("off")
    wall = [(-half, -0.4), (half, -0.4), (half, top + 0.4), (-half, top + 0.4)]
    roof = [(-half - 0.35, top + 0.4), (half + 0.35, top + 0.4), (0, top + 1.8)]
    axes.add_patch(Polygon(wall, fc="#fafafa", ec=_WALL, lw=1.3, zorder=0))
    axes.add_patch(Polygon(roof, fc="#c5cae9", ec=_WALL, lw=1.3, zorder=1))
    axes.text(0, top + 0.95, "import gapjax", ha="center", va="center", size=14, weight="bold")
    axes.text(0, top + 0.62, "the names of __init__.pyi", ha="center", va="center", size=8.5)
    for number, floor in enumerate(_floors(house)):
        for folder in floor:
            fill = _FILLS[number % len(_FILLS)]
            _draw_folder(axes, folder, house["rooms"][folder], places[folder], fill)
    arrows = _needed(house["imports"])
    ground = {f: min(places[g][1] for g in floor) for floor in _floors(house) for f in floor}
    middle = lambda folder: places[folder][0] + places[folder][2] / 2
    starts = _spread(arrows, places, middle)
    ends = _spread([(b, a) for a, b in arrows], places, middle)
    for a, b in arrows:
        end = ends[b, a], places[b][1] + places[b][3]
        path = _way(starts[a, b], places[a][1], ground[a], *end)
        style = {"arrowstyle": "-|>", "mutation_scale": 13, "color": _EDGE, "lw": 1.5}
        axes.add_patch(FancyArrowPatch(path=path, zorder=3, **style))
    for text in axes.texts:
        text.set_color(_INK if text.get_color() == "black" else text.get_color())
    return figure


def _way(start, bottom, ground, end, top):
    """Down to the ground of the floor, across in the gap below it, and down to the other folder."""
    across, middle = ground - 0.9 * _STOREY + 0.1, ground - 0.45 * _STOREY
    points = [(start, bottom), (start, ground), (start, middle), (end, middle), (end, across)]
    codes = [Path2D.MOVETO, Path2D.LINETO, Path2D.CURVE4, Path2D.CURVE4, Path2D.CURVE4]
    return Path2D([*points, (end, top + 0.02)], [*codes, Path2D.LINETO])


def _spread(arrows, places, middle):
    """Where each arrow touches its first folder: side by side, in the order of the other ends."""
    found = {}
    for folder in {a for a, _ in arrows}:
        others = sorted((b for a, b in arrows if a == folder), key=lambda b: (middle(b), b))
        left, _, width, _ = places[folder]
        for number, other in enumerate(others):
            found[folder, other] = left + width * (number + 1) / (len(others) + 1)
    return found


def save(path: Path):
    """Draws today's house; the same imports give the same file."""
    house = plan()
    settings = {"svg.hashsalt": "gapjax", "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        metadata = {"Date": None, "Description": json.dumps(house)} if path.suffix == ".svg" else {}
        draw(house).savefig(path, metadata=metadata, dpi=110)


if __name__ == "__main__":
    save(PICTURE)
    print(PICTURE)

"""Diagrams: every box and line in its place, every word in its box, and no image in git out of date."""

import dataclasses
import random
import re
from functools import lru_cache
from pathlib import Path

import pytest
from matplotlib import rc_context
from PIL import Image

from models import build_model, load_config
from show_structure import ROPE, THINKS, images
from structure.capture.blocks import Box, Edge, Shape, prepared
from structure.capture.capture import capture
from structure.facts import describe
from structure.picture import arrange, ink, legend, picture, place
from structure.picture.arrange import Grid
from structure.picture.sheet import count

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "structure_images"
OTHERS = re.compile(f"{ROPE}|{THINKS}|family-tree")
DIAGRAMS = [path for path in sorted(IMAGES.glob("*.[ps][nv]g")) if not OTHERS.search(path.stem)]
ZOO = [names[0] for names, dark, html in images() if len(names) == 1 and not dark and not html]


@lru_cache
def box_of(name, **changes):
    model_name, config = load_config(name)
    return capture(model_name, dataclasses.replace(config, **changes))


@lru_cache
def sheet_of(name):
    return place.lay_out(box_of(name))


def info_of(name):
    return {"name": name, "model": load_config(name)[0]}


every_model = pytest.mark.parametrize("name", ZOO)


def inside(inner, outer, slack=0.01):
    return (
        outer.x - slack <= inner.x
        and inner.right <= outer.right + slack
        and outer.y - slack <= inner.y
        and inner.top <= outer.top + slack
    )


def apart(one, other):
    return one.right <= other.x or other.right <= one.x or one.top <= other.y or other.top <= one.y


# ---------------------------------------------------------------------------- boxes


@every_model
def test_every_box_is_drawn_once_and_inside_of_the_box_around_it(name):
    tiles = sheet_of(name).tiles
    root = prepared(box_of(name))

    def check(box, around):
        [tile] = [tile for tile in tiles if tile.box.id == box.id]
        assert around is None or inside(tile, around), box.id
        for child in box.children:
            check(child, tile)

    for child in root.children:
        check(child, None)


@every_model
def test_no_two_boxes_overlap(name):
    def check(box):
        tiles = [sheet_of(name).tile(child.id) for child in box.children]
        for n, one in enumerate(tiles):
            for other in tiles[:n]:
                assert apart(one, other), (one.box.id, other.box.id)
        for child in box.children:
            check(child)

    check(prepared(box_of(name)))


# ---------------------------------------------------------------------------- words


def drawn_words(name):
    """(Word, left, bottom, right, top) as the renderer draws them, in the sheet's units."""
    sheet = sheet_of(name)
    drawing = ink.Ink(sheet.right + 2 * ink.MARGIN, sheet.top + 2 * ink.MARGIN, dark=False)
    with rc_context(picture.FILES):
        for word in sheet.words:
            drawing.word(word)
        renderer = drawing.figure.canvas.get_renderer()
        for word, text in zip(sheet.words, drawing.axes.texts):
            extent = text.get_window_extent(renderer)
            corner = ink.MARGIN
            yield word, extent.x0 - corner, extent.y0 - corner, extent.x1 - corner, extent.y1 - corner


@every_model
def test_words_stand_inside_their_boxes_and_apart_from_each_other(name):
    sheet, words = sheet_of(name), list(drawn_words(name))
    closed = [tile for tile in sheet.tiles if tile.kind in ("tile", "idle")]
    for word, left, bottom, right, top in words:
        assert left > -ink.MARGIN and right < sheet.right + ink.MARGIN, word
        assert bottom > -ink.MARGIN and top < sheet.top + ink.MARGIN, word
        for tile in closed:
            meets = left < tile.right and tile.x < right and bottom < tile.top and tile.y < top
            within = tile.x < left and right < tile.right and tile.y < bottom and top < tile.top
            assert within or not meets, (word, tile.box.id)
    for n, (word, left, bottom, right, top) in enumerate(words):
        for other, l, b, r, t in words[:n]:
            # A renderer's box for a line of text is as high as its tallest letters and signs.
            assert left >= r or l >= right or bottom + 2 >= t or b + 2 >= top, (word, other)


# ---------------------------------------------------------------------------- lines


def on_border(point, tile):
    (x, y), slack = point, 0.01
    beside = tile.x - slack <= x <= tile.right + slack and min(abs(y - tile.y), abs(y - tile.top)) < slack
    above = tile.y - slack <= y <= tile.top + slack and min(abs(x - tile.x), abs(x - tile.right)) < slack
    return beside or above


@every_model
def test_every_line_ends_on_its_boxes_and_turns_at_right_angles(name):
    sheet = sheet_of(name)
    tiles = {tile.box.id: tile for tile in sheet.tiles}
    for line in sheet.lines:
        for (x0, y0), (x1, y1) in zip(line.points, line.points[1:]):
            assert abs(x0 - x1) < 0.01 or abs(y0 - y1) < 0.01, line
        for id, point in ((line.source, line.points[0]), (line.target, line.points[-1])):
            tile = tiles.get(id)
            if tile is None or (tile.kind == "region" and not on_border(point, tile)):
                # From the name of an input, or to the answer.
                assert abs(point[1] - arrange.MOUTH) < 12 or point[1] > sheet.top - 2 * arrange.MOUTH, line
            elif tile.kind == "frame" and not on_border(point, tile):
                assert abs(point[1] - (tile.top - arrange.HEADER)) < 0.01, line  # below the frame's name
            else:
                assert on_border(point, tile), line


@every_model
def test_no_line_runs_through_a_box_that_has_nothing_to_do_with_it(name):
    sheet = sheet_of(name)
    closed = [tile for tile in sheet.tiles if tile.kind in ("tile", "idle", "junction")]
    readers = {}
    for line in sheet.lines:
        readers.setdefault((line.kind, line.source), set()).add(line.target)
    for line in sheet.lines:
        for (x0, y0), (x1, y1) in zip(line.points, line.points[1:]):
            for tile in closed:
                through = (
                    min(x0, x1) < tile.right - 0.5
                    and tile.x + 0.5 < max(x0, x1)
                    and min(y0, y1) < tile.top - 0.5
                    and tile.y + 0.5 < max(y0, y1)
                )
                assert not through or tile.box.id in readers[line.kind, line.source], (line, tile.box.id)


@every_model
def test_no_two_lines_lie_on_each_other_unless_they_come_from_or_lead_to_the_same(name):
    pieces = []
    for line in sheet_of(name).lines:
        pieces += [(line, *sorted(ends)) for ends in zip(line.points, line.points[1:])]
    for n, (line, (x0, y0), (x1, y1)) in enumerate(pieces):
        for other, (u0, v0), (u1, v1) in pieces[:n]:
            if line.source == other.source or line.target == other.target:
                continue
            wide, high = min(x1, u1) - max(x0, u0), min(y1, v1) - max(y0, v0)
            on_each_other = wide > 1 and abs(high) < 1 or high > 1 and abs(wide) < 1
            assert not on_each_other, (line, other)


def test_each_layer_of_gemma_turns_by_its_own_rope():
    """The fifth and the sixth layer read ropes of equal shape; no line confuses them."""
    lines = sheet_of("gemma-3-1b").lines
    readers = {}
    for line in lines:
        if line.source.startswith("model:rope"):
            readers.setdefault(line.source, set()).add(line.target.rpartition(".")[0])
    assert readers == {"model:rope": {"layers.0", "layers.24"}, "model:rope#2": {"layers.5"}}


@pytest.mark.parametrize("seed", range(20))
def test_no_line_of_any_grid_meets_a_box_or_another_line(seed):
    """Eight boxes, each of which reads a few of those before it, as chance has it."""
    chance, names, edges = random.Random(seed), [f"box {n}" for n in range(8)], []
    for n, name in enumerate(names):
        sources = chance.sample(["in", *names[:n]], k=min(n + 1, chance.choice([1, 1, 2, 2, 3])))
        edges += [Edge(source, name, Shape("", ())) for source in sources]
    boxes = [Box(name, "linear", name) for name in names]
    drawing, routes = place.build_grid(
        boxes, edges, 900.0, lambda box, wide, flat: place.build(box, wide / 2, wide / 2, 1, flat)
    )
    lines = [(line.source, line.target, line.points) for line in drawing.lines]
    lines += [("in", target, points) for target, points in routes.inputs(drawing).items()]
    assert len(lines) == len({(edge.source, edge.target) for edge in edges})
    pieces = [
        (source, target, *sorted(ends))
        for source, target, points in lines
        for ends in zip(points, points[1:])
    ]
    for n, (source, target, (x0, y0), (x1, y1)) in enumerate(pieces):
        for tile in drawing.tiles:
            beside = x1 < tile.x + 0.5 or tile.right - 0.5 < x0 or y1 < tile.y + 0.5 or tile.top - 0.5 < y0
            assert beside, (source, target, tile.box.id)
        for other, its_target, (u0, v0), (u1, v1) in pieces[:n]:
            wide, high = min(x1, u1) - max(x0, u0), min(y1, v1) - max(y0, v0)
            on_it = wide > 1 and abs(high) < 1 or high > 1 and abs(wide) < 1
            assert not on_it or source == other or target == its_target, (source, target, other, its_target)


@every_model
def test_every_box_that_reads_something_has_a_line_to_it(name):
    sheet = sheet_of(name)
    targets = {line.target for line in sheet.lines}

    def check(box):
        for edge in box.edges:
            child = next((child for child in box.children if child.id == edge.target), None)
            assert child is None or child.children or edge.target in targets, edge
        for child in box.children:
            check(child)

    check(prepared(box_of(name)))


@every_model
def test_the_residual_stream_is_straight(name):
    sheet = sheet_of(name)
    spines = {round(x, 3) for line in sheet.lines if line.kind == "spine" for x, _ in line.points}
    assert len(spines) == (2 if name.startswith("transformer-base") else 1)
    joined = {id for line in sheet.lines if line.kind == "spine" for id in (line.source, line.target)}
    assert joined & {tile.box.id for tile in sheet.tiles if tile.kind == "junction"}
    for tile in sheet.tiles:
        # Two branches of a feed-forward meet in a sum too: that one is not on the stream.
        if tile.kind == "junction" and tile.box.id in joined:
            assert round(tile.middle, 3) in spines


@pytest.mark.parametrize(
    "edges, spans",
    [
        # p is read by two: as wide as both
        ("in-p p-a p-b", {"p": [0, 1], "a": [0, 0], "b": [1, 1]}),
        # c reads p too, past a: the line has a column of its own
        ("in-p p-a a-c p-c", {"p": [0, 1], "a": [0, 0], ("p", "c", 1): [1, 1], "c": [0, 1]}),
        # q and a cache of k and v, which is read again above: the first reader leaves it room
        (
            "in-q in-k in-v k-c v-c q-s c-s s-o c-o",
            {"c": [1, 2], "s": [0, 1], ("c", "o", 2): [2, 2], "o": [0, 2]},
        ),
    ],
)
def test_boxes_are_as_wide_as_what_they_join(edges, spans):
    edges = [Edge(*ends.split("-"), Shape("", ())) for ends in edges.split()]
    names = dict.fromkeys(edge.target for edge in edges)
    grid = Grid([Box(name, "linear", name) for name in names], edges)
    assert {key: grid.spans[key] for key in spans} == spans


# ---------------------------------------------------------------------------- numbers


@every_model
def test_the_panel_counts_every_parameter_once(name):
    model = build_model(*load_config(name))
    by_role = legend.parameters_by_role(box_of(name))
    assert sum(by_role.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_a_layer_that_does_not_run_is_counted_with_all_its_experts():
    """And is no part of a token's work."""
    small = {
        "num_layers": 4,
        "num_experts": 16,
        "num_groups": 4,
        "num_active_groups": 2,
        "num_active_experts": 3,
    }
    name, config = load_config("deepseek-v3")
    with_it, without = (box_of("deepseek-v3", **small, multi_token=ahead) for ahead in (True, False))
    model = build_model(name, dataclasses.replace(config, **small))
    ahead = sum(parameter.numel() for parameter in model.ahead.parameters())
    assert with_it.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert legend.parameters_by_role(with_it) == legend.parameters_by_role(without) | {"group": ahead}
    assert with_it.used == without.used
    read, plain = (describe("", name, config, box)["read"] for box in (with_it, without))
    assert read == plain


def test_the_panel_knows_the_letters():
    letters = legend.letters_of(box_of("llama-3-8b"))
    assert letters == {"B": "B", "T": "T", "S": "S"} | {
        "D": 4096, "H": 32, "K": 8, "d": 128, "f": 14336, "V": 128256
    }  # fmt: skip


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (9_999, "9,999"),
        (10_000, "10 k"),
        (266_240, "266 k"),
        (999_600, "1,000 k"),
        (58_720_256, "58.7 M"),
    ],
)
def test_counts_are_short(number, text):
    assert count(number) == text


# ---------------------------------------------------------------------------- images


def test_every_model_file_has_an_image():
    drawn = {load_config(name)[0] for name in ZOO}
    assert drawn == {path.stem for path in (ROOT / "models").glob("*.py")} - {"__init__"}
    for path in set(IMAGES.glob("*.png")) - set(IMAGES.glob("family-tree*")):
        assert path.stat().st_size < 300_000
        # The page of a run has a picture taken of it, no drawing.
        assert THINKS in path.stem or path.with_suffix(".svg").stat().st_size < 225_000


@pytest.mark.parametrize("path", DIAGRAMS, ids=lambda path: path.name)
def test_an_image_shows_its_model_as_it_is(path):
    """Draw it again with: python show_structure.py --all"""
    [names] = [names for names, dark, html in images() if not html and path.stem == stem_of(names, dark)]
    shown = picture.facts_compared if len(names) > 1 else picture.facts_drawn
    assert picture.shown(path) == shown(*map(box_of, names))


def stem_of(names, dark):
    return "-".join(names) + "-dark" * dark


def test_an_image_of_another_model_is_found_out():
    shown = picture.shown(IMAGES / "llama-3-8b.png")
    assert shown != picture.facts_drawn(box_of("llama-3-8b", num_kv_heads=32))
    assert shown != picture.facts_drawn(box_of("llama-3-8b", num_layers=31))
    assert shown != picture.facts_drawn(box_of("llama-3-8b", qkv_bias=True))


def test_files_are_the_same_each_time_and_say_what_they_show(tmp_path):
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        picture.save(picture.draw(box_of("gpt2"), info_of("gpt2"), dark=True), tmp_path / run / "gpt2")
    for suffix in ("png", "svg"):
        one, two = (tmp_path / run / f"gpt2.{suffix}" for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
        assert picture.shown(one) == picture.facts_drawn(box_of("gpt2"))
        assert sorted(path.name for path in one.parent.iterdir()) == ["gpt2.png", "gpt2.svg"]
    with Image.open(tmp_path / "one" / "gpt2.png") as image:
        assert sum(image.convert("RGB").getpixel((0, 0))) < 150

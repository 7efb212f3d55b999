"""A model's diagram with matplotlib: what place.py has placed, in ink; no display and no Graphviz needed."""

import re
from io import BytesIO, StringIO
from pathlib import Path
from xml.etree import ElementTree

from matplotlib import rc_context
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from models.utils.files import write_atomically
from structure.capture.blocks import prepared
from structure.compare import compare as compare_models
from structure.picture.ink import MARGIN, Ink, draw_badge, draw_sheet
from structure.picture.legend import panel
from structure.picture.place import lay_out
from structure.picture.sheet import DETAIL, LEADING, SHAPE, Drawing, Word, wrapped

DIAGRAM = 590  # the least width of a diagram, so that with its panel it is as wide as a README
PANEL_GAP = 42
CAPTIONS = 224  # between two models
GROUND_GAP = 30  # between them and the sentences below
TITLE = 34  # above each
# Letters stand where their outlines say, at any size; the same picture has the same bytes.
FILES = {
    "text.hinting": "none",
    "text.hinting_factor": 1,
    "svg.fonttype": "none",
    "svg.hashsalt": "structure",
}


def draw(box, info, dark=False):
    """A Figure of the model: the diagram and the panel beside it.

    info: from facts.describe; its name and model stand in the panel.
    """
    sheet = compose(box, info)
    ink = Ink(sheet.right + 2 * MARGIN, sheet.top + 2 * MARGIN, dark)
    draw_sheet(ink, sheet)
    ink.figure.facts = facts_drawn(box)
    return ink.figure


def compose(box, info):
    """The diagram with the panel at its right, or in the empty corner above the smaller of two models."""
    sheet = lay_out(box, DIAGRAM)
    side = panel(box, info, sheet, columns=1 + sheet.two)
    whole = Drawing(0.0, 0.0, max(sheet.top, side.top))
    x = 0.0 if sheet.two else sheet.right + PANEL_GAP
    whole.add(sheet, 0.0, whole.top - sheet.top)
    whole.add(side, x, whole.top - side.top)
    whole.right = max(sheet.right, x + side.right)
    return whole


# ---------------------------------------------------------------------------- two models


def compare(box_a, info_a, box_b, info_b, dark=False):
    """A Figure of two models: what is the same is faded, what differs has a number and a caption."""
    comparison = compare_models(box_a, box_b)
    left, right = lay_out(box_a), lay_out(box_b)
    width, high = left.right + CAPTIONS + right.right, max(left.top, right.top)
    words = in_words(comparison, info_a, info_b, width)
    floor = words.top + GROUND_GAP * bool(words.words)
    height = floor + high + TITLE
    ink = Ink(width + 2 * MARGIN, height + 2 * MARGIN, dark)

    whole = Drawing(0.0, width, height)
    whole.add(words)
    draw_sheet(ink, whole)
    sides = []
    for sheet, x, side, box, info in (
        (left, 0.0, "left", box_a, info_a),
        (right, left.right + CAPTIONS, "right", box_b, info_b),
    ):
        placed = Drawing()
        placed.add(titled(sheet, high, box, info), x, floor)
        draw_sheet(ink, placed, numbers_of(comparison, side))
        sides.append({tile.box.id: tile for tile in placed.tiles})
    draw_captions(ink, comparison, *sides, left.right + CAPTIONS / 2)
    ink.figure.facts = facts_compared(box_a, box_b)
    return ink.figure


def titled(sheet, high, box, info):
    """The diagram with its name above it."""
    whole = Drawing(0.0, sheet.right, high + TITLE)
    whole.add(sheet)
    whole.words.append(Word(info["name"], 0, whole.top - 8, 20.0, "text", True, "left"))
    parameters = f"{box.parameters:,} parameters"
    whole.words.append(Word(parameters, sheet.right, whole.top - 8, 10.5, anchor="right"))
    return whole


def numbers_of(comparison, side):
    """Id of a box -> the numbers of the differences that it is part of."""
    marks = {}
    for number, difference in enumerate(comparison.differences, 1):
        for id in getattr(difference, side):
            marks.setdefault(id, []).append(number)
    return marks


def draw_captions(ink, comparison, ours, theirs, x):
    """Number and words of each difference, at the height of its boxes as far as there is room."""
    floor = 0.0
    for y, number, columns in sorted(captions(comparison, ours, theirs)):
        high = LEADING * max(map(len, columns))
        middle = max(y, floor + high / 2 + 9)
        floor = middle + high / 2
        draw_badge(ink, x, middle, number)
        for lines, side, anchor in zip(columns, (-14, 14), ("right", "left")):
            for n, (text, size, tone) in enumerate(lines):
                line = middle + LEADING * ((len(lines) - 1) / 2 - n)
                ink.word(Word(text, x + side, line, size, tone, False, anchor))


def captions(comparison, ours, theirs):
    """(height, number, (lines on the first model, lines on the second)) of each difference.

    lines: (text, size, tone); the last says where in the model's file it stands.
    """
    for number, difference in enumerate(comparison.differences, 1):
        tiles = [tiles[ids[0]] for tiles, ids in ((ours, difference.left), (theirs, difference.right)) if ids]
        y = sum(tile.y + tile.h / 2 for tile in tiles) / len(tiles)
        columns = []
        for text, sources in zip(difference.says, difference.sources):
            words = wrapped(text or "–", CAPTIONS / 2 - 32, DETAIL)
            columns.append([(word, DETAIL, "text") for word in words])
            if sources:
                columns[-1].append((numbers_text(sources), SHAPE, "muted"))
        yield y, number, columns


def numbers_text(sources):
    """Of the first lines: "line 92", "lines 161 to 176"."""
    numbers = sorted({source.first for source in sources})
    return f"line {numbers[0]}" if len(numbers) == 1 else f"lines {numbers[0]} to {numbers[-1]}"


def in_words(comparison, info_a, info_b, width):
    """What the pages say of their parts as a table, from (0, 0) upwards; nothing where they say nothing."""
    drawing, y, half = Drawing(0.0, width), 0.0, (width - 110) / 2
    if not comparison.sentences:
        return drawing
    rows = [("", f"models/{info_a['model']}.py", f"models/{info_b['model']}.py"), *comparison.sentences]
    for part, *sentences in reversed(rows):
        lines = [wrapped(sentence, half - 30, DETAIL) for sentence in sentences]
        high = LEADING * max(map(len, lines))
        drawing.words.append(Word(part, 0, y + high - 7, DETAIL, "text", True, "left"))
        for x, column in zip((110, 110 + half), lines):
            for n, line in enumerate(column):
                tone = "muted" if part else "text"
                drawing.words.append(
                    Word(line, x, y + high - 7 - LEADING * n, DETAIL, tone, not part, "left")
                )
        y += high + 9
    drawing.top = y
    return drawing


# ---------------------------------------------------------------------------- files


def facts_drawn(*boxes):
    """What a picture says of models, a line for each box and each edge that is drawn."""
    return [line for box in boxes for line in lines_on(prepared(box))]


def facts_compared(a, b):
    """What a picture says of two models; the lines of their files that differ are part of it."""
    differences = compare_models(a, b).differences
    lines = [[[source.first for source in side] for side in each.sources] for each in differences]
    return facts_drawn(a, b) + [f"{each.sentence} {where}" for each, where in zip(differences, lines)]


def lines_on(box, indent=""):
    tied = f" = {box.tied_to}" if box.tied_to else ""
    lines = [
        f"{indent}{box.id} {box.role} {box.label!r} {box.title!r} x {box.repeat}, {box.parameters}{tied}"
    ]
    for edge in box.edges:
        stream = " residual" if edge.residual else ""
        shape = f"{edge.shape.letters} {edge.shape.numbers}"
        lines.append(f"{indent} {edge.source} -> {edge.target} {shape}{stream}")
    for child in box.children:
        lines += lines_on(child, indent + " ")
    return lines


def save(figure, path):
    """Write path.png and path.svg, which carry the facts that they show: see shown."""
    said = {"Title": Path(path).name, "Description": "\n".join(figure.facts)}
    with rc_context(FILES), write_atomically(f"{path}.png") as beside:
        pixels = BytesIO()
        figure.savefig(pixels, format="png", dpi=200)
        # A palette is enough for so few colours, and a third of the size.
        image = Image.open(pixels).convert("RGB").quantize(128, dither=Image.Dither.NONE)
        image.save(beside, format="png", optimize=True, pnginfo=text_chunks(said))
    with rc_context(FILES), write_atomically(f"{path}.svg") as beside:
        text = StringIO()
        figure.savefig(text, format="svg", metadata=said | {"Date": None, "Creator": None})
        beside.write_text(shorter(text.getvalue()), encoding="utf-8")


def text_chunks(said):
    chunks = PngInfo()
    for name, text in said.items():
        chunks.add_itxt(name, text, zip=True)
    return chunks


def shorter(svg):
    """Two decimals are enough; where DejaVu Sans is missing, Verdana is as wide."""
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    return svg.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


def shown(path):
    """The facts behind a picture: lines as facts_drawn gives them; [] where the file holds none."""
    if Path(path).suffix == ".png":
        with Image.open(path) as image:
            said = image.info.get("Description", "")
    else:
        said = ElementTree.parse(path).findtext(".//{http://purl.org/dc/elements/1.1/}description", "")
    return said.splitlines()

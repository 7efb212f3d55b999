"""A model's diagram with matplotlib: what layout.py has placed, in ink; no display and no Graphviz needed."""

import re
from io import BytesIO, StringIO
from pathlib import Path
from xml.etree import ElementTree

from matplotlib import rc_context
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from models.utils.files import write_atomically
from structure.compare import compare as compare_models
from structure.drawn import prepared
from structure.picture.ink import MARGIN, Ink, draw_sheet
from structure.picture.layout import lay_out
from structure.picture.legend import panel
from structure.picture.sheet import Drawing
from structure.picture.side_by_side import draw_both

DIAGRAM = 590  # the least width of a diagram, so that with its panel it is as wide as a README
PANEL_GAP = 42
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


def compare(box_a, info_a, box_b, info_b, dark=False):
    """A Figure of two models side by side."""
    figure = draw_both(box_a, info_a, box_b, info_b, dark)
    figure.facts = facts_compared(box_a, box_b)
    return figure


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

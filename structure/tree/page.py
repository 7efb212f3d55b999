"""The family tree as a page: a name leads to the model's page, what is new leads to the comparison."""

from pathlib import Path

from structure.page.page import write_page
from structure.tree.draw import KINDS, SAID, TITLE
from structure.tree.place import AXIS, CARD, lay_out

HERE = Path(__file__).parent
CORNER = 7.0  # where a line turns
TIP = 6.0  # how long an arrow's head is


def write(found, links, path):
    """Write the page of relatives, as ancestry.relatives gives them.

    links: {"llama": where the page of a model is, "gpt2-llama": where the comparison with its parent is}.
    """
    kinds = {each.kind for each in found}
    write_page(
        "tree",
        path,
        ["theme.js", "tree.js"],
        ["page.css", "tree.css"],
        folders=[HERE],
        roles={kind: colours for kind, colours in KINDS.items() if kind in kinds},
        title=TITLE,
        summary=SAID,
        hint="A click on a name opens the model, a click on what is new shows it beside its parent.",
        trees=[lay_out(found, columns) for columns in (1, 2, 3)],
        links=links,
        width=CARD,
        axis_of=axis_of,
        paths_of=paths_of,
    )


def axis_of(tree):
    """The line of time, with a tick for each year."""
    ticks = [f"M{AXIS - 12} {y + 12}h8" for _, y in tree.years]
    return "".join([f"M{AXIS - 8} {tree.years[0][1]}V{tree.high}" if tree.years else "", *ticks])


def paths_of(line):
    """(class, path) of a line with round corners, and of its tip."""
    (x0, y0), (x, _), (_, y1), (x1, _) = line.points
    out, back, down = sign(x - x0), sign(x1 - x), sign(y1 - y0)
    turn = min(CORNER, abs(y1 - y0) / 2)
    path = f"M{x0} {y0}H{x - out * turn}Q{x} {y0} {x} {y0 + down * turn}"
    path += f"V{y1 - down * turn}Q{x} {y1} {x + back * turn} {y1}H{x1 - back * TIP}"
    tip = f"M{x1} {y1}l{-back * TIP} {-TIP / 2}v{TIP}z"
    return [("line", path), ("tip", tip)]


def sign(number):
    return (number > 0) - (number < 0)

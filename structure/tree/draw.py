"""The family tree as a picture: the cards and lines of place.py in ink, on a light or a dark ground."""

from structure.capture import blocks
from structure.picture.ink import MARGIN, Ink
from structure.picture.sheet import Word, width_of
from structure.tree.place import AXIS, CARD, lay_out

# The colours of what a model does, of those that diagrams have.
KINDS = {
    "encoder-decoder": blocks.LAVENDER,
    "decoder": blocks.BLUE,
    "encoder": blocks.GREEN,
    "vision": blocks.ORANGE,
}
TITLE = "The models by year"
SAID = "A line leads from a model to what was made of it; the list says what is new."
ABOVE = 58.0  # the tree, for the title
CORNER = 7.0


def draw(found, dark=False):
    """A Figure of relatives, as ancestry.relatives gives them."""
    tree = lay_out(found)
    high = tree.high + ABOVE
    ink = Ink(tree.width + 2 * MARGIN, high + 2 * MARGIN, dark)
    draw_title(ink, tree, high)
    draw_years(ink, tree)
    for line in tree.lines:
        draw_line(ink, [(x, tree.high - y) for x, y in line.points])
    for card in tree.cards:
        draw_card(ink, card, tree.high)
    ink.figure.facts = facts(found)
    return ink.figure


def draw_title(ink, tree, high):
    ink.word(Word(TITLE, 0, high - 12, 20.0, "text", True, "left"))
    ink.word(Word(SAID, 0, high - 36, 10.0, anchor="left"))
    x = tree.width
    kinds = {card.relative.kind for card in tree.cards}
    for kind, colours in reversed(KINDS.items()):
        if kind in kinds:
            ink.word(Word(kind, x, high - 12, 10.0, anchor="right"))
            x -= width_of(kind, 10.0) + 22
            ink.box(x, high - 17, 15, 11, *colours[ink.dark], 3)
            x -= 18


def draw_years(ink, tree):
    if not tree.years:
        return
    muted = blocks.MUTED[ink.dark]
    top, bottom = tree.high - tree.years[0][1], 0.0
    ink.line([(AXIS - 8, top), (AXIS - 8, bottom)], muted, 1.0, 1)
    for year, y in tree.years:
        y = tree.high - y - 12
        ink.word(Word(str(year), 0, y, 11.0, "muted", True, "left"))
        ink.line([(AXIS - 12, y), (AXIS - 4, y)], muted, 1.0, 1)


def draw_line(ink, points):
    ink.line(points, blocks.MUTED[ink.dark], 1.6, 2, arrow=True)


def draw_card(ink, card, high):
    fill, edge = KINDS[card.relative.kind][ink.dark]
    x, y, w = card.x, high - card.bottom, CARD
    ink.box(x, y, w, card.high, ink.ground, edge, CORNER, 1, 4)
    ink.box(x, y + card.high - card.head, w, card.head, fill, edge, CORNER, 1, 5)
    for word in card.words:
        anchor = "right" if word.anchor == "end" else "left"
        middle = high - card.y - word.y + 0.36 * word.size
        ink.word(Word(word.text, x + word.x, middle, word.size, word.tone, word.bold, anchor))


def facts(found):
    """What the picture says, a line for each model and one for each change: see picture.shown."""
    lines = []
    for each in found:
        lines.append(f"{each.year} {each.kind} {each.name}: {each.title}, new against {each.against}")
        lines += [f" {change}" for change in each.changes]
    return lines

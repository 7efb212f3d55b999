"""Where the cards of the family tree stand, and which way the lines between them go.

Time runs down the page. A card stands in one of a few columns, below where its year begins, and at most one
column away from its parent. So a line runs in the gutter between two columns, down, or up to a model that is
older than its parent, and ends at the side of a card: it crosses no card and no word.

Units are hundredths of an inch, x to the right, y down.
"""

from dataclasses import dataclass, field

from structure.picture.sheet import wrapped

CARD = 264.0  # the width of a card
PAD = 12.0  # inside it
GAP = 22.0  # between two cards of a column
STEP = 54.0  # the least height of a year
GUTTER = 30.0  # between two columns, with one line in it
TRACK = 10.0  # more for each line beside it
APART = 5.0  # the least between the ends of two lines
AXIS = 46.0  # what the years take
NAME, DETAIL, SMALL = 12.5, 9.6, 8.8  # sizes of type
LEADING = 13.4
BOLD = 1.14  # how much wider bold letters are
KEPT = 60  # arrangements that are followed at once


@dataclass
class Text:
    text: str
    x: float
    y: float  # of the baseline
    size: float
    tone: str = "text"  # or "muted"
    bold: bool = False
    anchor: str = "start"  # or "end"


@dataclass
class Card:
    relative: object  # a Relative
    high: float
    head: float  # how much of it is the head
    words: list  # Texts, from its own corner
    column: int = 0
    x: float = 0.0
    y: float = 0.0
    entry: float = 0.0  # from its top to where the line from its parent ends
    exit: float = 0.0  # and to where those to its children begin

    @property
    def names(self):
        """The words of its head."""
        return [word for word in self.words if word.y <= self.head]

    @property
    def news(self):
        return [word for word in self.words if word.y > self.head]

    @property
    def bottom(self):
        return self.y + self.high


@dataclass
class Line:
    parent: str
    child: str
    points: list  # (x, y) corners from the parent's side to the child's


@dataclass
class Tree:
    width: float
    high: float
    cards: list
    lines: list
    years: list = field(default_factory=list)  # (year, y where it begins)


def lay_out(found, columns=3):
    """The Tree of relatives, as ancestry.relatives gives them, in so many columns."""
    names = {each.name: each for each in found}
    cards = [card_of(each, names) for each in found]
    for card, column, y in zip(cards, *best(cards, columns)):
        card.column, card.y = column, y
    ways = [way for card in cards if (way := way_to(card, cards))]
    tracks = tracks_of(ways)
    rights, width = across(columns, tracks)
    for card in cards:
        card.x = rights[card.column] - CARD
    lines = [line_of(way, rights, tracks) for way in ways]
    return Tree(width, max(card.bottom for card in cards), cards, lines, years_of(cards))


# Cards ------------------------------------------------------------------------------------------------------


def card_of(relative, names):
    """A card with its words: name and year above, below them what is new."""
    year = str(relative.year or "")
    room = CARD - 2 * PAD
    y, words = PAD + NAME * 0.85, [Text(year, CARD - PAD, PAD + NAME * 0.85, DETAIL, "muted", anchor="end")]
    for line in wrapped(relative.title, (room - 40) / BOLD, NAME):
        words.append(Text(line, PAD, y, NAME, bold=True))
        y += LEADING + 2
    words.append(Text(f"models/{relative.name}.py", PAD, y - 1, SMALL, "muted"))
    head = y + 8
    y = head + LEADING + 2
    against = names[relative.parent].title if relative.parent else relative.against
    for line in wrapped(f"new against {against}", room, SMALL) if against else ():
        words.append(Text(line, PAD, y, SMALL, "muted"))
        y += LEADING
    for change in relative.changes:
        change = change.replace("`", "")
        y += 2
        words.append(Text("•", PAD, y, DETAIL, "muted"))
        for line in wrapped(change, room - 12, DETAIL):
            words.append(Text(line, PAD + 11, y, DETAIL))
            y += LEADING
    return Card(relative, y - LEADING + PAD, head, words, entry=PAD + NAME * 0.4, exit=head - PAD)


# Columns ----------------------------------------------------------------------------------------------------


def best(cards, columns):
    """(column of each card, y of each): of many arrangements, card after card, the lowest and tidiest."""
    kept = [((), (), (0.0,) * columns, 0.0)]
    for n in range(len(cards)):
        more = [next_to(one, cards, n, column) for one in kept for column in range(columns)]
        kept = sorted(filter(None, more), key=cost)[:KEPT]
    return kept[0][:2] if kept else best(cards, 1)  # where each line reaches its card


def cost(arrangement):
    _, _, bottoms, untidy = arrangement
    return max(bottoms) + 0.15 * sum(bottoms) + untidy


def next_to(arrangement, cards, n, column):
    """An arrangement of n cards with the next one in a column; None where a line could not reach it."""
    placed, ys, bottoms, untidy = arrangement
    relative, y = cards[n].relative, bottoms[column]
    for other in range(n):
        theirs, beside = cards[other].relative, abs(placed[other] - column)
        if theirs.year and relative.year and theirs.year != relative.year:
            # A new year begins below where the cards of the last one began.
            y = max(y, ys[other] + STEP)
        if relative.name == theirs.parent or theirs.name == relative.parent:
            if beside > 1:
                return None
            untidy += 20 * beside + 0.05 * abs(y - ys[other])
        if theirs.name == relative.parent and theirs.year == relative.year:
            y = max(y, ys[other] + GAP)
        elif theirs.year == relative.year and beside:
            y = max(y, ys[other])
    beside = [(card, top) for card, top, at in zip(cards, ys, placed) if at != column]
    y = lowered(y, cards[n], beside)
    after = bottoms[:column] + (y + cards[n].high + GAP,) + bottoms[column + 1 :]
    return (*placed, column), (*ys, y), after, untidy


def lowered(y, card, beside):
    """y, or so much more that no line ends or begins where one does in the next column.

    beside: (card, y) of those in other columns.
    """
    taken = [top + at for other, top in beside for at in (other.entry, other.exit)]
    while any(abs(y + at - mark) < APART for at in (card.entry, card.exit) for mark in taken):
        y += 1
    return y


def years_of(cards):
    """(year, y of its first card), from the top down."""
    first = {}
    for card in cards:
        if card.relative.year:
            first.setdefault(card.relative.year, card.y)
    return sorted(first.items())


# Lines ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A line before its place is known: it runs in a gutter, from y to y. Gutter 0 is left of column 0."""

    parent: str
    child: str
    gutter: int
    start: float
    end: float
    columns: tuple  # of the parent, of the child


def way_to(card, cards):
    """The Way from its parent to a card; None for the first."""
    parent = next((each for each in cards if each.relative.name == card.relative.parent), None)
    if parent is None:
        return None
    ends = parent.y + parent.exit, card.y + card.entry
    gutter = max(parent.column, card.column)
    return Way(parent.relative.name, card.relative.name, gutter, *ends, (parent.column, card.column))


def tracks_of(ways):
    """{(gutter, parent): track}: lines of one parent share a track, those of others keep apart."""
    spans, tracks = {}, {}
    for way in ways:
        low, high = spans.get((way.gutter, way.parent), (way.start, way.end))
        spans[way.gutter, way.parent] = min(low, way.start, way.end), max(high, way.start, way.end)
    for key, (low, high) in sorted(spans.items(), key=lambda item: item[1][0] - item[1][1]):
        taken = {
            tracks[other]
            for other, (from_y, to_y) in spans.items()
            if other[0] == key[0] and other in tracks and from_y <= high and low <= to_y
        }
        tracks[key] = next(n for n in range(len(spans)) if n not in taken)
    return tracks


def across(columns, tracks):
    """([the right edge of each column], the width of all); gutters are as wide as their lines ask for."""
    x, rights = AXIS, []
    for column in range(columns):
        x += gutter_width(column, tracks) + CARD
        rights.append(x)
    return rights, x


def gutter_width(gutter, tracks):
    most = max((track for (other, _), track in tracks.items() if other == gutter), default=-1)
    return GUTTER + TRACK * max(0, most) if most >= 0 or gutter else 0.0


def line_of(way, rights, tracks):
    width = gutter_width(way.gutter, tracks)
    right = rights[way.gutter] - CARD  # of the gutter, where the cards right of it begin
    left = right - width
    x = right - GUTTER / 2 - TRACK * tracks[way.gutter, way.parent]
    ends = [right if column == way.gutter else left for column in way.columns]
    points = [(ends[0], way.start), (x, way.start), (x, way.end), (ends[1], way.end)]
    return Line(way.parent, way.child, points)

"""Two models in one picture: what is the same is faded, what differs has a number and a caption."""

from structure.compare import compare as compare_models
from structure.picture.ink import MARGIN, Ink, draw_badge, draw_sheet
from structure.picture.layout import lay_out
from structure.picture.sheet import Drawing, Word
from structure.picture.words import DETAIL, LEADING, SHAPE, wrapped

CAPTIONS = 224  # between the two
GROUND_GAP = 30  # between them and the sentences below
TITLE = 34  # above each


def draw_both(box_a, info_a, box_b, info_b, dark=False):
    """A Figure of two models side by side: what is the same is faded, what differs has a number."""
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

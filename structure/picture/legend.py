"""The panel beside a diagram: where the parameters are, and what letters, colours and lines mean."""

from collections import Counter

from structure.capture.blocks import Box
from structure.facts import walk
from structure.picture.sheet import Drawing, Line, Tile, Word, count, width_of

WIDTH = 238.0
COLUMN = 26.0  # between two columns
ROW = 16.0
MOST_SQUARES = 512  # of heads, of experts; more are a number alone

ROLES = {
    "embedding": "embedding",
    "position": "positions",
    "norm": "norm",
    "attention": "attention",
    "recurrence": "recurrence",
    "feed_forward": "feed-forward",
    "head": "head",
    "linear": "linear map",
    "activation": "activation",
    "cache": "cache",
    "mask": "mask",
    "group": "not run here",
}

LETTERS = {
    "B": "batch",
    "T": "tokens in this call",
    "S": "tokens attended to",
    "N": "tokens of the source",
    "M": "positions in the table",
    "P": "patches",
    "C": "channels",
    "D": "features of the stream",
    "H": "query heads",
    "K": "key/value heads",
    "d": "features of a head",
    "R": "features that RoPE turns",
    "f": "features in the feed-forward",
    "V": "vocabulary",
    "Y": "labels",
    "E": "experts",
    "A": "experts that work for a token",
    "W": "tokens that a convolution sees",
    "w": "tokens in the window",
    "c": "tokens in a chunk",
    "r": "features of the latent",
}
STATE = "features of the state"  # what N is where it is a number


LINES = (
    ("spine", "", "the residual stream"),
    ("flow", "", "data"),
    ("memory", "", "the encoder's states"),
    ("side", "position", "the angles of the rotation"),
    ("side", "mask", "what may be attended to"),
)


def panel(box, info, sheet, columns=1):
    """For the diagram `sheet` of the box: a Drawing from (0, 0) to (its right, its top)."""
    drawing, letters = Drawing(), letters_of(box)
    size = min(24.0, 24.0 * WIDTH / width_of(info["name"], 24.0, True))
    drawing.words.append(Word(info["name"], 0, -12, size, "text", True, "left"))
    drawing.words.append(Word(f"models/{info['model']}.py", 0, -36, 10.5, anchor="left"))
    experts = next((each for each, _ in walk(box) if each.active), None)
    first, lines = [(draw_parameters, box)], [(draw_lines, sheet)]
    second = [(draw_letters, letters)]
    second += [(draw_heads, letters)] if "H" in letters else []
    second += [(draw_experts, experts)] if experts else []
    parts = [*first, *lines, None, *second] if columns == 2 else [*first, *second, *lines]
    y = bottom = -66.0
    for part in parts:
        if part is None:
            y, drawing = -66.0, shifted(drawing, -WIDTH - COLUMN)
            continue
        draw, what = part
        y = draw(drawing, what, y) - 26
        bottom = min(bottom, y + 18)
    drawing = shifted(drawing, (WIDTH + COLUMN) * (columns - 1), -bottom)
    drawing.right, drawing.top = WIDTH * columns + COLUMN * (columns - 1), -bottom
    return drawing


def shifted(drawing, dx, dy=0.0):
    other = Drawing()
    other.add(drawing, dx, dy)
    return other


# ---------------------------------------------------------------------------- parameters and colours


def parameters_by_role(box, times=1):
    """How many of the parameters are in attention, in embeddings, ...; their sum is the model's."""
    if box.role != "group" or not box.children:
        return Counter({box.role: box.parameters * times}) if box.parameters else Counter()
    total = Counter()
    for child in box.children:
        total += parameters_by_role(child, times * child.repeat)
    return total


def roles_of(box):
    found = {box.role}
    for child in box.children:
        found |= roles_of(child)
    return found


def draw_parameters(drawing, box, y):
    """A bar of shares, then a row for each colour."""
    by_role, total, x = parameters_by_role(box), box.parameters, 0.0
    shown = roles_of(box) - {"group"} | set(by_role)
    heading(drawing, "Parameters", f"{total:,}", y)
    if box.used < total:
        y -= ROW + 2
        row(drawing, 0, "active for a token", y)
        drawing.words.append(Word(f"{box.used:,}", WIDTH, y, anchor="right", tone="text"))
    y -= 24
    for role in ROLES:
        if by_role[role]:
            width = WIDTH * by_role[role] / total
            drawing.tiles.append(swatch(role, x, y - 5, width, 12))
            x += width
    y -= 9
    for role in ROLES:
        if role in shown:
            y -= ROW
            drawing.tiles.append(swatch(role, 0, y - 4.5, 15, 11))
            row(drawing, 24, ROLES[role], y)
            if by_role[role]:
                share = f"{by_role[role] / total:.1%}" if by_role[role] > total / 2000 else "< 0.1%"
                drawing.words.append(Word(count(by_role[role]), WIDTH - 52, y, anchor="right", tone="text"))
                drawing.words.append(Word(share, WIDTH, y, anchor="right"))
    return y


def swatch(role, x, y, w, h):
    return Tile(Box("", role, ""), "swatch", x, y, w, h)


def heading(drawing, text, right, y):
    drawing.words.append(Word(text, 0, y, 11.5, "text", True, "left"))
    drawing.words.append(Word(right, WIDTH, y, 11.5, "text", True, "right"))


def row(drawing, x, text, y):
    drawing.words.append(Word(text, x, y, tone="muted", anchor="left"))


# ---------------------------------------------------------------------------- letters and lines


def letters_of(box):
    """Letter -> its number, or None where that depends on the call, from all shapes in the tree."""
    found = {}
    for shape in shapes_of(box):
        letters = [letter.strip() for letter in shape.letters.strip("()").split(",")]
        if len(letters) == len(shape.numbers):
            for letter, number in zip(letters, shape.numbers):
                if letter in LETTERS and (isinstance(number, int) or number == letter):
                    found.setdefault(letter, number)
    return found


def shapes_of(box):
    shapes = [edge.shape for edge in box.edges]
    for child in box.children:
        shapes += shapes_of(child)
    return shapes


def draw_letters(drawing, found, y):
    heading(drawing, "Letters", "", y)
    y -= 6
    for letter, meaning in LETTERS.items():
        if letter in found:
            y -= ROW
            drawing.words.append(Word(letter, 0, y, tone="text", bold=True, anchor="left"))
            row(drawing, 24, STATE if letter == "N" and isinstance(found["N"], int) else meaning, y)
            if isinstance(found[letter], int):
                drawing.words.append(Word(f"{found[letter]:,}", WIDTH, y, anchor="right", tone="text"))
    return y


def draw_heads(drawing, letters, y):
    """A square for each query head; below those that share them, their keys and values."""
    H = letters["H"]
    K = letters.get("K", H)
    heading(drawing, "Heads", "", y)
    text = f"{H} query heads share {K} key/value heads" if K < H else f"{H} heads, each with keys and values"
    row(drawing, 0, text, y - ROW - 4)
    y -= 2 * ROW
    if H > MOST_SQUARES:
        return y + 4
    per_row = next(n for n in range(min(H, 32), 0, -1) if n % (H // K) == 0 or H // K > 32)
    cell = min(WIDTH / per_row, 15.0)
    for first in range(0, H, per_row):
        for n in range(min(per_row, H - first)):
            drawing.tiles.append(swatch("attention", n * cell, y - cell, cell - 2, cell - 3))
        share = min(H // K, per_row)
        for n in range(0, min(per_row, H - first), share):
            drawing.tiles.append(swatch("cache", n * cell, y - cell - 6, cell * share - 2, 4))
        y -= cell + 12
    return y + 4


def draw_experts(drawing, box, y):
    """A square for each expert, full for those that work for a token."""
    heading(drawing, "Experts", "", y)
    row(drawing, 0, f"{box.active} of {box.repeat} are active, chosen for each token", y - ROW - 4)
    y -= 2 * ROW
    if box.repeat > MOST_SQUARES:
        return y + 4
    per_row = next(n for n in range(min(box.repeat, 32), 0, -1) if box.repeat % n == 0 or box.repeat > 32)
    cell = min(WIDTH / per_row, 15.0)
    for n in range(box.repeat):
        role = "feed_forward" if n < box.active else "group"
        x, top = n % per_row * cell, y - n // per_row * cell
        drawing.tiles.append(swatch(role, x, top - cell, cell - 2, cell - 3))
    return y - cell * -(-box.repeat // per_row)


def draw_lines(drawing, sheet, y):
    heading(drawing, "Lines", "", y)
    y -= 6
    drawn = {(line.kind, line.role) for line in sheet.lines}
    for kind, role, meaning in LINES:
        if (kind, role) in drawn:
            y -= ROW
            drawing.lines.append(Line(kind, "", "", [(0, y), (16, y)], role=role))
            row(drawing, 24, meaning, y)
    return y

"""Two models side by side: which of their boxes stand for the same, and what differs between them.

Sizes do not count: a layer of 768 features and one of 4,096 are the same architecture.
"""

from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path

from structure.capture.blocks import is_region, is_stack, prepared
from structure.differences import part_at

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Difference:
    left: tuple  # ids of boxes of the first model, () where it has nothing of the kind
    right: tuple
    says: tuple  # of each model, "LayerNorm" and "RMSNorm"; "" where it has nothing
    part: str  # where in the model: "attn"
    sources: tuple  # of each model, the lines (blocks.Source) that make the difference

    @property
    def sentence(self):
        return " / ".join(text or "–" for text in self.says)


@dataclass(frozen=True)
class Comparison:
    differences: tuple
    pairs: tuple  # (id, id) of the boxes that stand for the same
    sentences: tuple  # (part, what the first model's docstring says of it, the second's), "" for nothing


def compare(a, b):
    """The Comparison of two captured models."""
    a, b = prepared(a), prepared(b)
    found, pairs, sentences = closest(parts(a), parts(b))
    orders = [{box.id: n for n, box in enumerate(boxes_of(model))} for model in (a, b)]

    def place(each):
        """How far through a model its data has come, from 0 to 1."""
        sides = zip((each.left, each.right), orders)
        return min(order[ids[0]] / len(order) for ids, order in sides if ids)

    return Comparison(tuple(sorted(merged(found), key=place)), tuple(pairs), tuple(sentences))


def parts(model):
    """An encoder and a decoder, or the model."""
    return [child for child in model.children if is_region(child)] or [model]


def closest(ours, theirs):
    """(differences, pairs, sentences) of an encoder and a decoder with their like.

    A model of one part is compared with the one that writes as it does, with a cache, or else without one.
    """
    pairs = list(zip(ours, theirs))
    if len(ours) != len(theirs):
        alike = [(a, b) for a in ours for b in theirs if writes(a) == writes(b)]
        pairs = alike[:1] or pairs
    found, same, sentences = [], [], []
    for a, b in pairs:
        compare_boxes(a, b, found, same, sentences)
    alone = [
        [part for part in parts if not any(part is pair[side] for pair in pairs)]
        for side, parts in enumerate((ours, theirs))
    ]
    if any(alone):
        found.append(difference(*alone, tuple(map(names, alone)), "model"))
    return found, same, sentences


def writes(part):
    return any(box.role == "cache" for box in boxes_of(part))


def boxes_of(box):
    return [box] + [each for child in box.children for each in boxes_of(child)]


def merged(differences):
    """One Difference for all boxes of which the same is to say."""
    found = {}
    for each in differences:
        key = (each.says, "" if all(each.says) else each.part)
        if key in found:
            old = found[key]
            sources = tuple(tuple(dict.fromkeys(o + e)) for o, e in zip(old.sources, each.sources))
            each = replace(old, left=old.left + each.left, right=old.right + each.right, sources=sources)
        found[key] = each
    return found.values()


# ---------------------------------------------------------------------------- one pair of boxes


def compare_boxes(a, b, found, same, sentences, around=(None, None)):
    """What differs between two boxes that stand for the same, and in them: added to the three lists."""
    same.append((a.id, b.id))
    before, outer = len(found), len(sentences)
    for says in zip(aspects(a, around[0]), aspects(b, around[1])):
        if all(says) and says[0] != says[1]:
            found.append(difference([a], [b], says, around[0].label))
    if a.children and b.children:
        pairs, left, right = aligned(a.children, b.children)
        for x, y in pairs:
            compare_boxes(x, y, found, same, sentences, (a, b))
        for kind in dict.fromkeys(kind_of(box, a) for box in left + right):
            ours, theirs = ([box for box in boxes if kind_of(box, a) == kind] for boxes in (left, right))
            if names(ours) or names(theirs):
                found.append(difference(ours, theirs, (names(ours), names(theirs)), a.label))
    said = differs(a), differs(b)
    if len(found) > before and any(said) and said[0] != said[1]:
        sentences.insert(outer, (a.label, *said))


def difference(left, right, says, part):
    ids = (tuple(box.id for box in left), tuple(box.id for box in right))
    sources = tuple(tuple(box.sources[0] for box in boxes if box.sources) for boxes in (left, right))
    return Difference(*ids, says, part, sources)


def names(boxes):
    """Each once, without additions, which say nothing of themselves."""
    labels = ["×" if box.role == "multiply" else box.label for box in boxes if box.role != "add"]
    return ", ".join(dict.fromkeys(labels))


def kind_of(box, around):
    """What is left over on both sides, and of one kind, stands for each other."""
    if box.role in ("position", "add"):
        return "position"
    if around.role in ("attention", "feed_forward"):
        return "compute"
    return "embedding" if box.role == "operation" else box.role


def aspects(box, around):
    """What may differ between two boxes, apart from sizes; a text for each aspect."""
    texts = dict.fromkeys(("norm", "place", "heads", "bias", "tied"), "")
    if box.role == "norm":
        texts["norm"] = box.title.split(",")[0]
        texts["place"] = place_of(box, around)
    elif box.role == "attention" and box.children:
        shares = "key/value" in box.title
        texts["heads"] = "query heads share key/value heads" if shares else "each head has keys and values"
    elif box.role in ("linear", "head") and not box.children:
        texts["bias"] = "bias" if "+ bias" in box.title else "no bias"
    if box.role == "head":
        tied = next((part.tied_to for part in (box, *box.children) if part.tied_to), None)
        texts["tied"] = f"tied to {tied.split('.')[-1].split('#')[0]}" if tied else "a matrix of its own"
    return list(texts.values())


def place_of(box, around):
    """Where a layer's norm stands: on the residual stream or before a sublayer."""
    if around is None or around.repeat == 1:
        return ""
    edges = [edge for edge in around.edges if edge.target == box.id]
    if any(edge.residual for edge in edges):
        return "norm after the addition (post-LN)"
    earlier = [child.role for child in around.children[: around.children.index(box)]]
    if "add" in earlier and any(edge.source == "in" for edge in edges):
        return "beside the sublayer before it"
    return "norm before the sublayer (pre-LN)"


# ---------------------------------------------------------------------------- alignment


def aligned(ours, theirs):
    """(pairs, left over of ours, of theirs): the same names in the same order, then in any order."""
    pairs = []
    keys = [
        [(box.role, box.label if not is_stack(box) else "stack") for box in boxes] for boxes in (ours, theirs)
    ]
    for block in SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks():
        pairs += [(ours[block.a + n], theirs[block.b + n]) for n in range(block.size)]
    for pairing in (lambda box: (box.role, box.label), lambda box: box.role == "head" and "head"):
        left = [box for box in ours if not any(box is x for x, _ in pairs)]
        for box in left:
            free = [other for other in theirs if not any(other is y for _, y in pairs)]
            twin = next((other for other in free if pairing(box) and pairing(other) == pairing(box)), None)
            pairs += [(box, twin)] if twin else []
    order = {id(box): n for n, box in enumerate(ours)}
    left = [box for box in ours if not any(box is x for x, _ in pairs)]
    right = [box for box in theirs if not any(box is y for _, y in pairs)]
    return sorted(pairs, key=lambda pair: order[id(pair[0])]), left, right


# ---------------------------------------------------------------------------- the pages' own sentences


def differs(box):
    """What the class or function of a box says of itself: "Differs from gpt2: ...", or "".

    A method has the sentence of its class.
    """
    part = box.definition and part_at(ROOT / box.definition.file, box.definition.first)
    return part.differs if part else ""

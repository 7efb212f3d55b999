"""One HTML file in which a text runs through a model: it opens from disk and needs no network.

watch.html.jinja is the page, the text first, then a section for each question; watch.css is its looks. The
scripts compute what can be computed there (softmax with another temperature, q . k of a pair) and draw the
rest. Diagram and source are those of structure/page, whose boxes and lines light each other.

What a page holds grows with the text: attention with its square. So `plan` says beforehand what fits.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from runs_ar.attention import Heads
from structure.page import page
from structure.watch.numbers import floats, halves, loudest, probabilities, signed, triangle, whole
from structure.watch.values import row_kind, rows_of, values_of

HERE = Path(__file__).parent
SCRIPTS = ("watch.js", "answers.js", "attention.js", "residual.js", "memory.js", "inside.js")
MOST_BYTES = 8_000_000  # of what a page holds of a run
MOST_TOKENS = 256
KEPT = 48  # answers whose logits a place keeps
BINS = 64  # in which the logits of the others are counted


class Plan(NamedTuple):
    num_tokens: int  # that fit
    columns: int  # of a picture of values; 0: none
    keeps_q_k: bool


def plan(num_tokens, heads, numbers, matrices):
    """What of a run fits into a page.

    heads: of all layers. numbers: of q and k, that all heads keep of a token. matrices: pictures of values.
    """
    for columns, keeps in ((64, True), (32, True), (32, False), (16, False), (0, False)):
        each = 2 * numbers * keeps + matrices * columns
        if (heads * num_tokens**2 + each * num_tokens) * 4 / 3 <= MOST_BYTES and num_tokens <= MOST_TOKENS:
            return Plan(num_tokens, columns, keeps)
    longest = math.isqrt(int(MOST_BYTES * 3 / 4 / max(1, heads)))
    return Plan(min(num_tokens, longest, MOST_TOKENS), 0, False)


def write(path, box, info, view, ways=()):
    """view: a View, which knows how tokens are called."""
    shown = page.model(box, info)
    shown["data"]["watch"] = view.data
    values = {"title": info["name"], "summary": shown["summary"], "panes": {}, "models": [shown]}
    page.render("watch", path, *SCRIPTS, folders=[HERE], watch=view.data, ways=ways, **values)


class View:
    """What the page is given of a run."""

    def __init__(self, thought, text, box, fits, *, names, rows, answers, given, rounds=(), source=()):
        """fits: a Plan. names: a function from an answer's id to its text. rows: what each place is called.

        answers: "token", or "label" where the head knows labels. given: how many places were not written.
        rounds: of generation, see writing.py. source: how an encoder-decoder's source tokens are called.
        """
        self.thought, self.plan, self.box = thought, fits, box
        self.source, self.dropped = list(source), [text.note] if text.note else []
        reach = [Heads(path, each[None], None, None, None) for path, each in thought.reach]
        self.data = {
            "tokens": text.tokens,
            "rows": rows,
            "source": self.source,
            "given": given,
            "answers": answers,
            "first": thought.logits is not None and thought.out.dim() == 2,
            "logits": self.logits(),
            "lens": [
                {
                    "layer": layer,
                    "count": ids.shape[1],
                    "ids": whole(ids),
                    "probs": floats(probs),
                    "final": floats(final),
                }
                for layer, ids, probs, final in thought.lens
            ],
            "attention": [self.attention(each) for each in (*thought.attention, *reach)],
            "reach": [path for path, _ in thought.reach],
            "steps": [self.step(step) for step in thought.steps],
            "parts": [
                {"ids": ids.tolist(), "names": list(parts), "values": floats(torch.stack([*parts.values()]))}
                for ids, parts in thought.parts
            ],
            "experts": [
                {
                    "path": each.path,
                    "count": each.num_experts,
                    "active": each.chosen.shape[1],
                    "chosen": whole(each.chosen),
                    "weights": floats(each.weights),
                }
                for each in thought.experts
            ],
            "caches": [vars(each) for each in thought.caches],
            "rounds": list(rounds),
            "values": self.values(),
            "broken": self.broken(),
        }
        self.data["names"] = {str(id): names(id) for id in sorted(self.ids(text, rounds))}
        self.data["dropped"] = self.dropped

    def ids(self, text, rounds):
        """Of everything that is called by its name."""
        found = set(text.tokens if self.data["answers"] == "token" else ())
        found.update(id for each in rounds for id in [*each["drafts"], *each["tokens"]])
        found.update(id for _, ids, *_ in self.thought.lens for id in ids.flatten().tolist())
        found.update(id for ids, _ in self.thought.parts for id in ids.tolist())
        return found | self.kept

    def logits(self):
        """Of each place the largest, and how the others lie: enough for any temperature."""
        logits, self.kept = self.thought.logits, set()
        if logits is None:
            return None
        count = min(KEPT, logits.shape[1])
        best = logits.nan_to_num(-1e30, 1e30, -1e30).topk(count, dim=1)
        self.kept = set(best.indices.flatten().tolist())
        counts, means = rest(logits, count)
        if logits.shape[1] > count:
            self.dropped.append(
                f"Of each place the {count} largest of {logits.shape[1]:,} logits are kept one by one, the "
                f"others as counts in {BINS} bins."
            )
        return {
            "count": count,
            "ids": whole(best.indices),
            "values": floats(best.values),
            "bins": BINS,
            "counts": whole(counts),
            "means": floats(means),
        }

    def attention(self, heads):
        probs = heads.probs
        H, T, S = probs.shape
        is_causal = T == S > 1 and bool((probs.triu(1) == 0).all())
        found = {"path": heads.path, "heads": H, "rows": T, "columns": S, "causal": is_causal}
        found["of"] = "source" if heads.path in self.thought.encoding else "rows"
        found["read"] = "source" if self.source and not is_causal else "rows"
        found["probs"] = (triangle if is_causal else probabilities)(probs)
        found["sink"] = bool((probs.sum(dim=-1) < 0.999).any())
        if self.plan.keeps_q_k and heads.q is not None:
            found |= {"q": halves(heads.q), "k": halves(heads.k), "keys": len(heads.k)}
            found |= {"width": heads.q.shape[-1], "scale": heads.scale}
        return found

    def step(self, step):
        found = {"kind": step.kind, "path": step.path, "layer": step.layer}
        found["after"] = lengths(step.after)
        if step.added is not None:
            found["added"] = lengths(step.added)
        return found

    def values(self):
        found, columns = {}, self.plan.columns
        if not columns:
            self.dropped.append("The boxes' values are left out: the text is too long for them.")
            return found
        if not self.plan.keeps_q_k:
            self.dropped.append("q and k are left out: the text is too long for them.")
        outputs = {box.id: box.output for box in page.inside(self.box)}
        for id, entries in values_of(self.box, self.thought.recording).items():
            found[id] = {"row": row_kind(outputs[id]), "width": entries[0][1].shape[1], "of": {}}
            for path, values in entries:
                small = loudest(values, columns)
                found[id]["columns"] = small.shape[1]
                found[id]["of"][path] = {**signed(small), "broken": int((~values.isfinite()).sum())}
        self.dropped.append(
            f"A picture of values has {columns} columns at most: each is the number furthest from 0 of its "
            "neighbours. Colours are in 8 bits, q and k in fp16."
        )
        return found

    def broken(self):
        """Where the first NaN or infinity of the residual stream is; "" where all is finite."""
        steps = [step for step in self.thought.steps if not step.after.isfinite().all()]
        return (steps[0].path or "embedding") if steps else ""


def lengths(x):
    """Of each token's vector; NaN and infinity as None, which JSON has a word for."""
    return [round(n, 5) if math.isfinite(n) else None for n in x.norm(dim=-1).tolist()]


def rest(logits, count):
    """Of each place: how many of the logits below the `count` largest lie in each of BINS bins, and where."""
    counts = torch.zeros(len(logits), BINS, dtype=torch.int32)
    means = torch.zeros(len(logits), BINS)
    for row, values in enumerate(logits.float()):
        others = values.sort(descending=True).values[count:]
        others = others[others.isfinite()]
        if others.numel() == 0:
            continue
        low, high = others.min(), others.max()
        bins = ((others - low) / (high - low).clamp(min=1e-9) * BINS).long().clamp(max=BINS - 1)
        counts[row] = torch.bincount(bins, minlength=BINS)
        # The logarithm of the mean of exp: exact at temperature 1, and near it elsewhere.
        weights = torch.zeros(BINS).index_add(0, bins, (others - high).exp())
        means[row] = (weights / counts[row].clamp(min=1)).clamp(min=1e-37).log() + high
    return counts, means


def matrices_of(box):
    """How many pictures of values a model has."""
    drawn = [each for each in page.inside(box) if rows_of(each.output)]
    return sum(len(each.members or (each.call and each.call[0]) or "1") for each in drawn)

"""The main way through a box: from its x, along the residual stream and its additions, to its result.

It is found backward, from the result: before an addition stands the operand that another operand was made
from (x in x + attn(norm(x))), before anything else the first tensor that it reads and that carries content.
"""


class Way:
    """into: {box: what it reads, in order}, of the boxes in one box; what is no key of it comes from outside.

    is_add, is_aside: of a box or an origin outside: adds two tensors; tells of positions or masks only.
    """

    def __init__(self, into, is_add, is_aside):
        self.into, self.is_add, self.is_aside = into, is_add, is_aside
        self.edges, at = set(), "out"
        while at in into and not any(target == at for _, target in self.edges):
            before = self.leading(at)
            self.edges.add((before, at))
            at = before
        self.start = at
        self.has_residual = any(self.is_add(at) and self.stream(at) is not None for at in into)

    def leading(self, at):
        """Of what a box reads, what leads on."""
        stream = self.stream(at) if self.is_add(at) else None
        if stream is not None:
            return stream
        content = [source for source in self.into[at] if not self.is_aside(source)]
        return (content or self.into[at])[0]

    def stream(self, at):
        """Of the operands of an addition, the one with what the others were made from; None if there is none.

        In (x + attention) + feed_forward that is the first sum, since both were made from the x in it.
        """
        terms = {operand: self.terms(operand) for operand in self.into[at]}
        everything = [term for several in terms.values() for term in several]
        # What depends on no other term; what was added to it, in another operand, depends on it.
        roots = [term for term in everything if not any(self.depends(term, other) for other in everything)]
        for operand, inner in terms.items():
            outer = [term for term in everything if term not in inner]
            if any(self.depends(term, root) for root in roots if root in inner for term in outer):
                return operand
        return None

    def terms(self, operand):
        """What a sum adds, sums in it opened; anything else is a term of its own."""
        if not self.is_add(operand):
            return [operand]
        return [term for inner in self.into[operand] for term in self.terms(inner)]

    def depends(self, late, early):
        waiting, seen = [late], set()
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            if early in self.into.get(at, []):
                return True
            waiting += self.into.get(at, [])
        return False

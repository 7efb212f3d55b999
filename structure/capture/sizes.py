"""Numbers back to letters: what a tensor's shape says of the batch, the prompt, and the cache.

A model is captured with sizes that nothing else in it has: large primes. Whatever dimension they divide
depends on the call, and how: 7 * B is seven numbers for each row of the batch.
"""

import ast
import dataclasses
import math
from fractions import Fraction

# N, the source's length, is 12 times a prime: a model that shortens it to a half or a third stays exact.
LETTERS = {"B": 10_007, "T": None, "S": 20_011, "N": 30_011}
SOURCE_MULTIPLE = 12


class Sizes:
    """What B, T, S and N are while a model is captured.

    B rows, T tokens in this call, S slots of the cache, N tokens of a source.
    """

    def __init__(self, config, dimensions):
        """dimensions: of all parameters, which no size may divide."""
        fields = dataclasses.asdict(config).values()
        self.taken = {abs(n) for n in (*dimensions, *fields) if type(n) is int and n not in (0, 1)}
        # A table of positions ends at max_seq_len.
        longest = min(getattr(config, "max_seq_len", 9_000), 9_000)
        self.primes = {letter: self.free(start or longest) for letter, start in LETTERS.items()}

    def free(self, start):
        return next(p for p in range(start, 1, -1) if is_prime(p) and not any(n % p == 0 for n in self.taken))

    def __getitem__(self, letter):
        return self.primes[letter] * (SOURCE_MULTIPLE if letter == "N" else 1)

    def term(self, number):
        """(coefficient, "B*T") of a number, for 7 * B * T; (number, "") of one that no size divides.

        The coefficient is a Fraction, which a number of the source's length may need: a third of N.
        """
        coefficient, letters = Fraction(number), []
        for letter, prime in self.primes.items():
            while number and number % prime == 0:
                number //= prime
                coefficient /= self[letter]
                letters.append(letter)
        return coefficient, "*".join(letters)

    def numbers(self, shape):
        """("B", "T", 4096) of a captured shape; "7*B" and "N/3" where it is no letter alone."""
        return tuple(spoken(*self.term(number)) for number in shape)


def spoken(coefficient, letters):
    if not letters:
        return int(coefficient)
    times = f"{coefficient.numerator}*" if coefficient.numerator > 1 else ""
    return times + letters + (f"/{coefficient.denominator}" if coefficient.denominator > 1 else "")


def is_prime(n):
    return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))


def letters_of_specs(specs, shape, numbers, known):
    """ "(B, T, D)" of the first spec that a shape fulfils, or ""; known: what the config's letters are.

    A free letter may be anything, as long as it is the same thing twice; where it is one of the call's sizes
    it goes by that name: the comment's T is N in the encoder.
    """
    for spec in specs:
        if spec[:1] == ("...",):
            lead = numbers[: len(numbers) - len(spec) + 1]
            spec = (*lead, *spec[1:]) if len(spec) > 1 and all(n in LETTERS for n in lead) else ()
        if spec and fulfils(spec, shape, dict(known)):
            named = (n if n in LETTERS and dim not in known else dim for dim, n in zip(spec, numbers))
            return f"({', '.join(named)})"
    return ""


def fulfils(spec, shape, known):
    if len(spec) != len(shape):
        return False
    for dim, size in zip(spec, shape):
        value = evaluate(dim, known)
        if value is None and dim.isidentifier():
            known[dim] = size
        elif value is not None and value != size:
            return False
    return True


def letters_of_numbers(numbers, known):
    """ "(B, T, f)" where every number has one letter that it can be, or ""; known: {letter: number}.

    No tensor is as long as the model has layers, L, but by chance; as the table of positions, M, few are.
    """
    letters = []
    for number in numbers:
        candidates = [letter for letter, value in known.items() if value == number and letter != "L"]
        candidates = [letter for letter in candidates if letter != "M"] or candidates
        if number == 1 or number in LETTERS:
            candidates = [str(number)]
        if len(candidates) != 1:
            return ""
        letters += candidates
    return f"({', '.join(letters)})"


def evaluate(dim, known):
    """A dimension such as "D // H" in numbers; None where a letter is free."""
    names = {node.id for node in ast.walk(ast.parse(dim, mode="eval")) if isinstance(node, ast.Name)}
    return eval(dim, {"__builtins__": {}}, known) if names <= known.keys() else None

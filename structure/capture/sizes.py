"""Numbers back to letters: what a tensor's shape says of the batch, the prompt, and the cache.

A model is captured with sizes that nothing else in it has: large primes. Whatever dimension they divide
depends on the call, and how: 7 * B is seven numbers for each row of the batch.
"""

import ast
import dataclasses
import math
from collections import defaultdict
from fractions import Fraction
from itertools import count

from structure.capture.blocks import Shape

# N, the source's length, is 12 times a prime: a model that shortens it to a half or a third stays exact.
LETTERS = {"B": 10_007, "T": None, "S": 20_011, "N": 30_011}
SOURCE_MULTIPLE = 12
FEW = 5  # tokens, where each is a round of a loop


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
        self.primes = {letter: self.free(start or longest, letter) for letter, start in LETTERS.items()}
        # What depends on data is as long as the tokens of one expert are on average.
        num_experts = getattr(config, "num_experts", 1)
        self.share = Fraction(getattr(config, "num_active_experts", num_experts), num_experts)
        self.chosen = self.free(40_009)

    def free(self, start, letter=""):
        """A prime that divides nothing else; of S + 1, which is even, the half is another one."""

        def is_free(p):
            return is_prime(p) and not any(n % p == 0 for n in self.taken)

        return next(p for p in range(start, 1, -1) if is_free(p) and (letter != "S" or is_free((p + 1) // 2)))

    def few_tokens(self):
        """Let T be small: a loop over time has as many rounds."""
        self.primes["T"] = next(
            p for p in count(FEW) if is_prime(p) and not any(n % p == 0 for n in self.taken)
        )

    def fixed(self, size):
        """A captured size as a number, of what depends on data too."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, self.chosen)))

    def __getitem__(self, letter):
        return self.primes[letter] * (SOURCE_MULTIPLE if letter == "N" else 1)

    def term(self, number):
        """(coefficient, "B*T") of a number, for 7 * B * T; (number, "") of one that no size divides.

        The coefficient is a Fraction, which a number of the source's length may need: a third of N.
        """
        coefficient, letters = Fraction(number), []
        while number and number % self.chosen == 0:
            number //= self.chosen
            coefficient *= self.share / self.chosen
            letters += ["B", "T"]
        for letter, prime in self.primes.items():
            while number and number % prime == 0:
                number //= prime
                coefficient /= self[letter]
                letters.append(letter)
        return coefficient, "*".join(sorted(letters, key=list(LETTERS).index))

    def terms(self, number):
        """The term()s whose sum a number is: two, where there are S + 1 slots, one of which is for pads."""
        factor, rest = divmod(number, self["S"] + 1)
        return [self.term(number)] if rest else [self.term(factor * self["S"]), self.term(factor)]

    def numbers(self, shape):
        """("B", "T", 4096) of a captured shape; "7*B", "N/3" and "S+1" where it is no letter alone."""
        more = {self["S"] + n: f"S+{n}" for n in (1, 2)}
        return tuple(more.get(number) or spoken(*self.term(number)) for number in shape)


class Shapes:
    """The Shape of each operation's result: numbers, and the letters that the page's comments give them."""

    def __init__(self, traced, places):
        self.model, self.sizes, self.known = traced.model, traced.sizes, traced.known
        self.places, self.page, self.ops = places, places.page, places.ops
        self.users = defaultdict(list)
        for op in self.ops:
            for argument in op.arguments:
                self.users[argument].append(op)
        self.letters = {}  # op: of its shape, as they were found
        self.fixed = self.known | self.numbers_of_letters()

    def shape(self, op):
        numbers = self.sizes.numbers(op.shape)
        letters = self.letters_of(op) or letters_of_numbers(numbers, self.fixed)
        return Shape(letters, numbers)

    def numbers_of_letters(self):
        """The letters of comments that are one number all over the model: T tokens of an image."""
        found = defaultdict(set)
        for op in self.ops:
            for letter, number in zip(self.letters_of(op).strip("()").split(", "), op.shape):
                if letter.isidentifier():
                    found[letter].add(number)
        numbers = {letter: self.sizes.numbers(sizes)[0] for letter, sizes in found.items() if len(sizes) == 1}
        return {letter: number for letter, number in numbers.items() if isinstance(number, int)}

    def letters_of(self, op):
        """From the comment of the statement whose value the tensor is, or from an equal shape before."""
        if op not in self.letters:
            specs = self.specs_of(op)
            equal = [other for other in self.before(op) if other.shape == op.shape]
            numbers = self.sizes.numbers(op.shape)
            self.letters[op] = letters_of_specs(specs, op.shape, numbers, self.known) or next(
                filter(None, map(self.letters_of, equal)), ""
            )
        return self.letters[op]

    def specs_of(self, op):
        if op.target == "input":
            return self.page.specs_of_input(type(self.model).__name__, op.path)
        specs = []
        for n in reversed(range(len(op.frames))):
            if not self.is_value(op, n):
                break
            specs += self.page.specs(op.frames[n].line)
        return specs

    def is_value(self, op, n):
        """Whether nothing in the statement of its n-th frame reads the op: it is the statement's value."""
        around, statement = op.frames[:n], self.page.source(op.frames[n].line)
        for user in self.users[op]:
            inside = user.frames[:n] == around and len(user.frames) > n
            if inside and self.page.source(user.frames[n].line) == statement:
                return False
        return True

    def before(self, op):
        """What an op reads; in a function also what that was made of, back to the function's arguments."""
        found, waiting, (depth, functions) = [], list(op.arguments), self.places.functions(op)
        while waiting:
            other = waiting.pop(0)
            if other in found:
                continue
            found.append(other)
            if functions and other.frames[: depth + 1] == op.frames[: depth + 1]:
                waiting += other.arguments
        return found


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

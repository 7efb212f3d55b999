"""What pages have in common and where they differ, read from their text."""

from structure.differences import part_at, parts_of, read_pages

PAGE = '''"""A page."""

import torch


# Differs from gpt2: keeps
# no keys. It has none.
Cache = tuple[int, ...]  # one per layer


@dataclass
class Config:
    """Sizes."""

    d_model: int


class Attention(nn.Module):
    """Softmax(q k).

    (After eq. 4.) Differs from gpt2.py: two heads share
    keys, as in eq. 5 and fig. 2. The cache is small.

    Differs from llama: is not read.
    """

    def forward(self):
        """Differs from gpt2: a method is no part of a page."""


def rope(x):
    return x
'''


def test_parts_have_their_lines_their_text_and_their_sentence():
    parts = parts_of(PAGE)
    assert list(parts) == ["Cache", "Config", "Attention", "rope"]
    assert [(part.first, part.last) for part in parts.values()] == [(6, 8), (11, 15), (18, 28), (31, 32)]
    assert parts["Cache"].text.startswith("# Differs") and parts["Cache"].text.endswith("# one per layer")
    assert parts["Config"].text.startswith("@dataclass\n")
    assert {name: part.differs for name, part in parts.items()} == {
        "Cache": "Differs from gpt2: keeps no keys.",
        "Config": "",
        "Attention": "Differs from gpt2.py: two heads share keys, as in eq. 5 and fig. 2.",
        "rope": "",
    }


def test_the_part_of_a_line(tmp_path):
    path = tmp_path / "page.py"
    path.write_text(PAGE)
    assert [getattr(part_at(path, line), "name", None) for line in (3, 6, 11, 27, 29, 32)] == [
        None, "Cache", "Config", "Attention", None, "rope",
    ]  # fmt: skip


def test_the_pages_are_those_of_the_folder():
    pages = read_pages()
    assert "llama.py" in pages and "__init__.py" not in pages
    assert "FeedForward" in parts_of(pages["llama.py"])

"""All pages as a folder that opens from disk and from any web server: links are relative, nothing is fetched.

index.html          the family tree
llama.html          a page for each model
llama-thinks.html   a text that runs through it, where there are weights
gpt2-llama.html     a comparison for each line of the tree
"""

from structure.page import page
from structure.tree import page as tree_page
from structure.tree.ancestry import relatives

TREE = ("family tree", "index.html")


def write(folder, load, names=None, run=None):
    """Write the pages of models, by name, or of all; yields the path of each.

    load: gives (box, info) of a model by its name in models/. run: writes the page of a text that runs
    through a model, and says whether it could; it is given the model's name, the page's path and its links.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = relatives()
    shown = [each for each in found if names is None or each.name in names]
    links, subjects = links_between(shown), {each.name: load(each.name) for each in shown}
    for each in shown:
        ways, path = ways_from(each, shown, links), folder / f"{each.name}-thinks.html"
        if run and run(each.name, path, [TREE, (each.title, links[each.name])]):
            ways.insert(1, ("a text in it", path.name))
            yield path
        path = folder / f"{each.name}.html"
        page.write(*subjects[each.name], path, ways=ways)
        yield path
        if each.pair in links:
            path = folder / links[each.pair]
            parent = next(other for other in shown if other.name == each.parent)
            ways = [TREE, *((one.title, links[one.name]) for one in (parent, each))]
            page.compare(*subjects[each.parent], *subjects[each.name], path, ways=ways)
            yield path
    tree_page.write(found, links, folder / "index.html")
    yield folder / "index.html"


def links_between(shown):
    """{what a page shows: its file}: a model, or a model beside its parent."""
    names = {each.name for each in shown}
    pairs = [each.pair for each in shown if each.parent in names]
    return {name: f"{name}.html" for name in [*sorted(names), *pairs]}


def ways_from(one, shown, links):
    """(words, file) of where the page of a model leads: the tree, its parent, and its children."""
    titles = {each.name: each.title for each in shown}
    ways = [TREE]
    if one.pair in links:
        ways.append((f"against {titles[one.parent]}", links[one.pair]))
    children = [each for each in shown if each.parent == one.name]
    return ways + [(f"beside {each.title}", links[each.pair]) for each in children]

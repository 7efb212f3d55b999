"""The lines of a stack whose boxes have their places: along the spine, to its branches, and to its frames."""

from dataclasses import replace

from structure.capture.blocks import side_key, side_name, side_names
from structure.picture.arrange import CARDS, GAP, RAIL, TURN
from structure.picture.sheet import LABEL, Line, Mouth, labelled, shape_words, straight


def draw_stack_lines(placed):
    """Add the lines to a PlacedStack (place.py), with ports and mouths for what goes on outside."""
    lines = StackLines(placed)
    for edge in placed.edges:
        lines.draw_edge(edge)


class StackLines:
    def __init__(self, placed):
        self.placed, self.drawing = placed, placed.drawing
        self.box, self.edges, self.stack = placed.box, placed.edges, placed.stack
        self.region, self.depth = placed.region, placed.depth
        self.detours = sorted(self.stack.detours(), key=self.port_of)

    def port_of(self, detour):
        """(place of the frame, x where the line enters it)"""
        xs = [port.x for port in self.placed.ports if (port.frame, port.key) == detour]
        return self.stack.place[detour[0]], max(xs, default=0.0)

    def draw_edge(self, edge):
        stack, source, target = self.stack, edge.source, edge.target
        from_branch, to_branch = stack.branch_of(source), stack.branch_of(target)
        if from_branch and from_branch is to_branch:
            return
        reader = stack.of.get(target)
        if reader and reader.children and not edge.residual and side_name(edge) in side_names(reader):
            self.draw_side(edge, from_branch)
        elif target in stack.place and (source in stack.place or edge.residual):
            self.draw_spine(edge)
        elif source in stack.place and not (source == "in" and self.region):
            self.draw_fork(edge)
        elif source.startswith("in"):
            self.draw_input(edge)
        elif target in stack.place:
            self.draw_join(edge)

    def end_of(self, id):
        """A tile, or the frame itself for what comes from outside or goes there."""
        return id if self.drawing.tile(id) else self.box.id

    def draw_spine(self, edge):
        source, target = self.drawing.tile(edge.source), self.drawing.tile(edge.target)
        if not source and self.enter(edge, target):
            return
        if not target and self.region and self.depth:
            return  # what is around goes on from here
        low = source.top if source else 0.0
        high = target.y if target else self.drawing.top + GAP * self.region
        if not target and self.region:
            self.drawing.mouths.append(Mouth("out", 0.0, edge.shape))
        arrow = target.kind in ("tile", "junction") if target else self.region
        points = [(0.0, low), (0.0, high)]
        self.drawing.lines.append(
            Line("spine", self.end_of(edge.source), self.end_of(edge.target), points, arrow)
        )
        if source and target and labelled(edge, self.edges):
            self.drawing.words += shape_words(edge.shape, 0.0, (low + high) / 2)

    def enter(self, edge, target):
        """Gives what comes in its name; True if it needs no line, since a region has drawn it."""
        name = edge.source.removeprefix("in:")
        if target and target.kind == "region":
            inner = name if name in side_names(target.box) else "in"
            for mouth in self.drawing.mouths:
                if mouth.name == inner and target.x <= mouth.x <= target.right:
                    mouth.name, mouth.shape = name, edge.shape
        elif self.region:
            self.drawing.mouths.append(Mouth(name, target.way_in, edge.shape))
        return target.kind == "region"

    def draw_fork(self, edge):
        source, target = self.drawing.tile(edge.source), self.drawing.tile(edge.target)
        low, turn = source.top if source else 0.0, target.y - 12
        points = [(0.0, low), (0.0, turn), (target.way_in, turn), (target.way_in, target.y)]
        self.drawing.lines.append(
            Line("flow", self.end_of(edge.source), edge.target, points, not target.box.children)
        )

    def draw_join(self, edge):
        source, target = self.drawing.tile(edge.source), self.drawing.tile(edge.target)
        x = source.middle
        if target.kind == "junction":
            y = target.y + target.h / 2
            points = [(x, source.top), (x, y), (target.right, y)]
        else:
            y, entry = target.y - GAP / 2, min(max(x, target.x + 14), target.right - 14)
            points = [(x, source.top), (x, y), (entry, y), (entry, target.y)]
        self.drawing.lines.append(Line("flow", edge.source, edge.target, straight(points)))
        if labelled(edge, self.edges):
            self.drawing.words += shape_words(edge.shape, x, source.top + LABEL / 2 + 4)

    def draw_input(self, edge):
        target = self.drawing.tile(edge.target)
        if not self.enter(edge, target):
            points = [(target.way_in, 0.0), (target.way_in, target.y)]
            self.drawing.lines.append(Line("flow", self.box.id, edge.target, points))

    def draw_side(self, edge, branch):
        if edge.source.startswith("in:") and self.drawing.tile(edge.target).kind == "region":
            self.enter(edge, self.drawing.tile(edge.target))
        for port in self.ports_of(edge):
            port = self.around(self.on_rail(port, edge), (edge.target, side_key(edge)))
            if edge.source.startswith("in:") and self.region and not self.depth:
                self.draw_from_outside(edge, port)
            elif edge.source.startswith("in:"):
                self.drawing.ports.append(replace(port, key=side_key(edge), frame=self.box.id))
            elif branch.kind == "wing":
                self.draw_from_wing(edge, port)
            else:
                self.draw_from_below(edge, port)

    def ports_of(self, edge):
        ports = self.placed.ports
        return [port for port in ports if (port.frame, port.key) == (edge.target, side_key(edge))]

    def draw_from_outside(self, edge, port):
        if not any(mouth.x == port.x for mouth in self.drawing.mouths):
            self.drawing.mouths.append(Mouth(edge.source.removeprefix("in:"), port.x, edge.shape))
        role = "mask" if "mask" in edge.source else "operation"
        points = straight([(port.x, 0.0), *port.path])
        self.drawing.lines.append(Line("side", self.box.id, port.tile, points, True, role))

    def on_rail(self, port, edge):
        for (x, width), lane in zip(self.placed.lane_at, self.stack.lanes):
            if any(edge.target in branch for branch in lane):
                x += width + RAIL * (self.stack.rails(lane).index(side_key(edge)) + 0.8)
                return replace(port, x=x, path=[(x, port.path[0][1]), *port.path])
        return port

    def around(self, port, detour):
        """The line to a frame above the first one runs up beside all of them, and turns in below its own."""
        if detour not in self.detours:
            return port
        number = self.detours.index(detour)
        above = sum(frame == detour[0] for frame, _ in self.detours[number + 1 :])
        x = self.placed.right + CARDS + RAIL * (number + 0.8)
        y = self.drawing.tile(detour[0]).y - 9 - TURN * above
        return replace(port, x=x, path=[(x, y), (port.x, y), *port.path])

    def draw_from_below(self, edge, port):
        tile, detour = self.drawing.tile(edge.source), (edge.target, side_key(edge)) in self.detours
        frame = self.drawing.tile(self.stack.frames()[0])
        x = min(max(port.x, tile.x + 10), tile.right - 10)
        level = self.level(tile, port.x < x) + detour * len(self.stack.senders())
        turn = frame.y - 9 - TURN * level
        points = [(x, tile.top), (x, turn), (port.x, turn), *port.path]
        self.drawing.lines.append(Line("side", edge.source, port.tile, straight(points), True, tile.box.role))

    def level(self, tile, to_the_left):
        """How many lines turn above this one: of those that go left, the last turns highest."""
        beside = [self.drawing.tile(box.id) for box in self.stack.senders()]
        return sum(
            other.x > tile.x if to_the_left else other.x < tile.x for other in beside if other.y == tile.y
        )

    def draw_from_wing(self, edge, port):
        tile, y = self.drawing.tile(edge.source), port.path[0][1]
        over, x = tile.top + GAP + CARDS + 8, self.placed.channel
        points = [(tile.entry, tile.top), (tile.entry, over), (x, over), (x, y), *port.path]
        if not any(line.kind == "memory" for line in self.drawing.lines):
            self.drawing.words += shape_words(edge.shape, (tile.entry + x) / 2, over)
        self.drawing.lines.append(Line("memory", edge.source, port.tile, straight(points)))

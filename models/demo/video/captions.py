"""What can happen in a clip of the demo model, and how it is said: a seeded sampler of clips and their captions.

A clip is one object that moves (in a quarter of them a second one stands still before or behind it) over a background,
seen by a camera. Lengths are in frame heights, y points down, time runs from 0 to 1.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from models.demo import photographs

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "pink", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "flower")
TEXTURES = ("plain", "striped", "checkered")
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")  # 45 degrees apart
PLACES = (*photographs.SAMPLES, "a wall", "a gradient", "waves")
CAMERAS = ("static", "pans right", "pans down", "pans left", "pans up", "zooms in", "zooms out")
VERBS = ("moves", "slides", "drifts", "flies")

ASPECT = 320 / 192


def is_held_out(colour: int, shape: int, direction: int) -> bool:
    """64 of the 512 triples are never seen in training: a Latin square, so every pair of their words is."""
    return (colour + shape + direction) % 8 == 0


@dataclass(frozen=True)
class Clips:
    """N clips as columns: the first axis of every field is N, and the 2 in `[N, 2, …]` are the two objects."""

    colour: Tensor  # int64 [N, 2], an index into COLOURS, and so on
    shape: Tensor
    texture: Tensor
    pair: Tensor  # int64 [N]: 0 one object, 1 the first is in front of the second, 2 behind it
    direction: Tensor  # int64 [N], of the first object; the second stands
    turning: Tensor  # int64 [N, 2]: 0 no, 1 turns
    place: Tensor  # int64 [N]
    camera: Tensor  # int64 [N]
    radius: Tensor  # float32 [N, 2]
    start: Tensor  # float32 [N, 2, 2], (x, y) of the centre at time 0
    travel: Tensor  # float32 [N, 2], (x, y) of the first object's way
    angle: Tensor  # float32 [N, 2], at time 0
    look: Tensor  # float32 [N, 8], uniform: which part of the place, how near, which light

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, rows: slice | Tensor) -> Clips:
        return Clips(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: str | torch.device) -> Clips:
        return Clips(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def sample(count: int, seed: int) -> Clips:
    """`count` training clips: no held-out triple among them."""
    g = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (count, *shape), generator=g)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=g)

    colour, shape, direction = integers(8, 2), integers(8, 2), integers(8)
    held_out = (colour[:, 0] + shape[:, 0] + direction) % 8 == 0
    direction = torch.where(held_out, (direction + 1 + integers(7)) % 8, direction)
    colour[:, 1] = (colour[:, 0] + 1 + integers(7)) % 8  # one colour twice would be hard to tell apart in words
    camera = torch.where(uniform() < 0.6, 0, 1 + integers(6))
    pair = torch.where(uniform() < 0.75, 0, 1 + integers(2))
    return _laid_out(colour, shape, direction, integers(3, 2), pair, integers(2, 2), integers(len(PLACES)), camera, g)


def held_out(seed: int) -> Clips:
    """The 64 held-out triples, one object each, the camera static, places in turn."""
    g = torch.Generator().manual_seed(seed)
    triples = torch.tensor([(c, s, d) for c in range(8) for s in range(8) for d in range(8) if is_held_out(c, s, d)])
    n = len(triples)
    colour, shape = (torch.stack((triples[:, i], triples[:, i]), 1) for i in (0, 1))
    none = torch.zeros(n, dtype=torch.int64)
    place = torch.arange(n) % len(PLACES)
    return _laid_out(colour, shape, triples[:, 2], torch.zeros(n, 2, dtype=torch.int64), none,
                     torch.zeros(n, 2, dtype=torch.int64), place, none, g)  # fmt: skip


def _laid_out(
    colour: Tensor, shape: Tensor, direction: Tensor, texture: Tensor, pair: Tensor, turning: Tensor, place: Tensor,
    camera: Tensor, g: torch.Generator,
) -> Clips:  # fmt: skip
    """Positions and sizes for what was chosen, so that the first object stays inside a static frame."""
    n = len(direction)
    radius = 0.105 + 0.035 * torch.rand(n, 2, generator=g)
    turn = direction * (torch.pi / 4)
    across = torch.stack((turn.cos(), turn.sin()), 1)
    across = torch.where(across.abs() < 1e-3, 0.0, across).sign()
    diagonal = (direction % 2 == 1)[:, None]
    reach = torch.tensor([0.62, 0.48]) * torch.where(diagonal, 0.85, 1.0) * (0.9 + 0.2 * torch.rand(n, 1, generator=g))
    travel = across * reach
    room = torch.tensor([ASPECT, 1.0]) - travel.abs() - 2 * radius[:, :1] - 0.02
    middle = torch.tensor([ASPECT, 1.0]) / 2 + (torch.rand(n, 2, generator=g) - 0.5) * room.clamp(min=0)
    other = middle + (torch.rand(n, 2, generator=g) - 0.5) * 0.2  # on the way of the first, so that one hides the other
    return Clips(
        colour=colour, shape=shape, texture=texture, pair=pair, direction=direction, turning=turning, place=place,
        camera=camera, radius=radius, start=torch.stack((middle - travel / 2, other), 1), travel=travel,
        angle=2 * torch.pi * torch.rand(n, 2, generator=g) * (turning > 0), look=torch.rand(n, 8, generator=g),
    )  # fmt: skip


def describe(clips: Clips, seed: int) -> list[str]:
    """One caption for each clip; `seed` chooses among the ways to say it."""
    say = random.Random(seed)
    columns = (
        clips.colour,
        clips.shape,
        clips.texture,
        clips.pair,
        clips.direction,
        clips.turning,
        clips.place,
        clips.camera,
    )
    lines = []
    for colour, shape, texture, pair, direction, turning, place, camera in zip(
        *(c.tolist() for c in columns), strict=True
    ):

        def thing(i: int, c: list[int] = colour, s: list[int] = shape, t: list[int] = texture) -> str:
            texture_word = "" if t[i] == 0 else f"{TEXTURES[t[i]]} "
            return f"{texture_word}{COLOURS[c[i]]} {SHAPES[s[i]]}"

        way = (
            DIRECTIONS[direction]
            if "-" in DIRECTIONS[direction] or say.random() < 0.5
            else _to_the(DIRECTIONS[direction])
        )
        line = f"a {thing(0)} {say.choice(VERBS)} {way}"
        if turning[0]:
            line += " while turning"
        if pair:
            line += f" {'in front of' if pair == 1 else 'behind'} a {'turning ' if turning[1] else ''}{thing(1)}"
        line += f" over {PLACES[place]}"
        if camera:
            line += f", camera {CAMERAS[camera]}"
        elif say.random() < 0.7:
            line += ", static camera"
        lines.append(line)
    return lines


def _to_the(direction: str) -> str:
    return {"right": "to the right", "left": "to the left", "up": "to the top", "down": "to the bottom"}[direction]

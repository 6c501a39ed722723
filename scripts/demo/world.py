"""The demo's world: tile pictures of 32 px, their captions, edits, and what is a right answer.

A picture is 4 x 4 tiles of 8 px: two rows of sky over two rows of ground. Sky and ground each have
one of three themes, and every tile is empty or holds one sprite. Text says which kinds of thing
there are and leaves open where, how many and in which colour, so that a picture has many random
details that do not depend on each other. An edit changes what its instruction says and keeps every
other tile. Because a picture is made of tiles, the set of all right answers is a product over the
tiles, and the distance to the nearest of them is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Of drawn edits: nothing is chosen on the test's.
TRAINING_SEED, VALIDATION_SEED, TEST_SEED = 1, 2, 3

TILE = 8  # px
GRID = 4  # tiles a side; the upper half is sky
SIZE = TILE * GRID  # px
SKIES = ("day", "night", "dusk")
GROUNDS = ("grass", "sand", "snow")

_SKY_RGB = ((120, 180, 240), (28, 32, 84), (244, 150, 110))
_GROUND_RGB = ((96, 168, 72), (226, 200, 128), (236, 240, 246))
_RED, _BLUE, _YELLOW, _VIOLET = (214, 48, 49), (52, 92, 210), (250, 214, 40), (150, 60, 190)

# Sprites, one letter a colour, '.' for the tile's own ground. Kinds in the order of their ids.
_CLOUD = """
........
..www...
.wwwwww.
wwwwwwww
wwwwwwww
.ssssss.
........
........
"""
_BALLOON = """
..ccc...
.ccccc..
.ccccc..
.ccccc..
..ccc...
...k....
..bbb...
........
"""
_BIRD = """
........
kk...kk.
wkk.kkw.
.wkkkw..
...k....
........
........
........
"""
_TREE = """
..ggg...
.ggggg..
ggggggg.
ggggggg.
.ggggg..
...b....
...b....
...b....
"""
_HOUSE = """
...cc...
..cccc..
.cccccc.
cccccccc
.oooooo.
.okkooo.
.okkoyo.
.okkooo.
"""
_FLOWER = """
........
..c.c...
.ccccc..
.ccycc..
..ccc...
...d....
.d.d....
..dd....
"""
_INK = {
    "w": (250, 250, 250),
    "s": (196, 204, 216),
    "k": (60, 44, 40),
    "b": (120, 78, 46),
    "g": (34, 104, 52),
    "o": (236, 218, 186),
    "y": (250, 224, 90),
    "d": (40, 120, 60),
}
_BALLOON_RGB = (_RED, _YELLOW, _VIOLET)
_HOUSE_RGB = (_RED, _BLUE, _YELLOW)
_FLOWER_RGB = (_RED, _YELLOW, _VIOLET)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of thing and the ids of its colours.

    Attributes:
        name: The word for several of them.
        in_sky: True in the two upper rows, False in the two lower.
        ids: What a tile holds when it holds one; several ids are several colours.
    """

    name: str
    in_sky: bool
    ids: tuple[int, ...]


CLOUDS = Kind("clouds", True, (1,))
BALLOONS = Kind("balloons", True, (2, 3, 4))
BIRDS = Kind("birds", True, (5,))
TREES = Kind("trees", False, (1,))
HOUSES = Kind("houses", False, (2, 3, 4))
FLOWERS = Kind("flowers", False, (5, 6, 7))
KINDS = (CLOUDS, BALLOONS, BIRDS, TREES, HOUSES, FLOWERS)
_IDS = 8  # ids a tile can have, 0 for empty


@dataclass(frozen=True, slots=True)
class Scenes:
    """A batch of pictures before they are drawn.

    Attributes:
        sky: Index into SKIES, shape `(n,)`.
        ground: Index into GROUNDS, shape `(n,)`.
        tiles: What each tile holds, 0 for nothing, shape `(n, 4, 4)`.
    """

    sky: np.ndarray
    ground: np.ndarray
    tiles: np.ndarray

    def __len__(self) -> int:
        return len(self.sky)

    def __getitem__(self, index: slice | np.ndarray) -> Scenes:
        return Scenes(self.sky[index], self.ground[index], self.tiles[index])


@dataclass(frozen=True, slots=True)
class Edits:
    """A batch of edits with their right answers.

    Attributes:
        source: The pictures to edit.
        outcome: One right answer for each, drawn at random among all.
        instructions: What to do.
        is_open: True where an instruction has many right answers, shape `(n,)`.
        valid: Which ids are right in each tile of the outcome, bool of shape `(n, 4, 4, 8)`.
    """

    source: Scenes
    outcome: Scenes
    instructions: list[str]
    is_open: np.ndarray
    valid: np.ndarray

    def __len__(self) -> int:
        return len(self.instructions)


def _draw_sprite(
    art: str, ground: tuple[int, int, int], colour: tuple[int, int, int]
) -> np.ndarray:
    rows = art.strip().splitlines()
    ink = _INK | {".": ground, "c": colour}
    return np.array([[ink[letter] for letter in row] for row in rows], dtype=np.float32) / 255


def _draw_all() -> np.ndarray:
    """Draw every tile there can be: `(sky or ground, theme, id, 8, 8, 3)`, values in 0 to 1."""
    blank = "\n".join(["." * TILE] * TILE)
    sky = [(blank, _RED), (_CLOUD, _RED), *((_BALLOON, c) for c in _BALLOON_RGB), (_BIRD, _RED)]
    sky += [(blank, _RED)] * (_IDS - len(sky))
    ground = [(blank, _RED), (_TREE, _RED), *((_HOUSE, c) for c in _HOUSE_RGB)]
    ground += [(_FLOWER, c) for c in _FLOWER_RGB]
    return np.stack(
        [
            np.stack([[_draw_sprite(art, theme, colour) for art, colour in arts] for theme in rgb])
            for arts, rgb in ((sky, _SKY_RGB), (ground, _GROUND_RGB))
        ]
    )


TILES = _draw_all()


def render(scenes: Scenes) -> np.ndarray:
    """Draw pictures: float32 of shape `(n, 32, 32, 3)`, values in 0 to 1."""
    half = GRID // 2
    sky = TILES[0][scenes.sky[:, None, None], scenes.tiles[:, :half]]
    ground = TILES[1][scenes.ground[:, None, None], scenes.tiles[:, half:]]
    tiles = np.concatenate([sky, ground], axis=1)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(len(scenes), SIZE, SIZE, 3)


def sample_scenes(rng: np.random.Generator, count: int) -> Scenes:
    """Draw scenes at random: each kind is there or not, each tile is empty or holds one of them."""
    present = rng.random((count, len(KINDS))) < 0.5
    tiles = np.zeros((count, GRID, GRID), dtype=np.int64)
    for in_sky, rows in ((True, slice(0, 2)), (False, slice(2, 4))):
        kinds = [(i, kind) for i, kind in enumerate(KINDS) if kind.in_sky == in_sky]
        shape = (count, GRID // 2, GRID)
        # The kind of a tile: the largest random number among the kinds that are there.
        lots = rng.random((*shape, len(kinds))) * present[:, None, None, [i for i, _ in kinds]]
        chosen = lots.argmax(-1)
        ids = np.stack([rng.choice(kind.ids, shape) for _, kind in kinds], axis=-1)
        taken = np.take_along_axis(ids, chosen[..., None], -1)[..., 0]
        filled = (rng.random(shape) < 0.55) & (lots.max(-1) > 0)
        tiles[:, rows] = np.where(filled, taken, 0)
    return Scenes(rng.integers(0, 3, count), rng.integers(0, 3, count), tiles)


def _has(tiles: np.ndarray, kind: Kind) -> np.ndarray:
    """Mark the tiles that hold a kind, shape of `tiles`."""
    rows = np.arange(GRID) < GRID // 2
    in_rows = rows if kind.in_sky else ~rows
    return np.isin(tiles, kind.ids) & in_rows[:, None]


def caption(scenes: Scenes) -> list[str]:
    """Say what each picture shows, not where: `night snow balloons trees flowers`."""
    there = np.stack([_has(scenes.tiles, kind).any((1, 2)) for kind in KINDS], axis=1)
    return [
        " ".join(
            [
                SKIES[sky],
                GROUNDS[ground],
                *(kind.name for kind, flag in zip(KINDS, flags, strict=True) if flag),
            ]
        )
        for sky, ground, flags in zip(scenes.sky, scenes.ground, there, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Rule:
    """One instruction and what it does to a tile.

    Attributes:
        instruction: The sentence.
        share: How often it is drawn, relative to the others.
        sky: The sky's new theme, or None.
        ground: The ground's new theme, or None.
        touches: A kind whose tiles change, `empty sky`, `empty ground`, or None.
        ids: What a touched tile may become.
        odds: How likely each of `ids` is in the answers that are drawn.
    """

    instruction: str
    share: float
    sky: int | None = None
    ground: int | None = None
    touches: tuple[Kind, ...] | str | None = None
    ids: tuple[int, ...] = ()
    odds: tuple[float, ...] = ()

    @property
    def is_open(self) -> bool:
        """Return True when there is more than one right answer."""
        return len(self.ids) > 1


def _scatter(instruction: str, kind: Kind) -> Rule:
    where = "empty sky" if kind.in_sky else "empty ground"
    ids = (0, *kind.ids)
    empty = 0.5 if len(kind.ids) == 1 else 0.4
    odds = (empty, *[(1 - empty) / len(kind.ids)] * len(kind.ids))
    return Rule(instruction, 2.0, touches=where, ids=ids, odds=odds)


def _repaint(kind: Kind) -> Rule:
    return Rule(
        f"repaint the {kind.name}", 2.0, touches=(kind,), ids=kind.ids, odds=(1 / 3, 1 / 3, 1 / 3)
    )


RULES = (
    *(Rule(f"make it {name}", 0.5, sky=i) for i, name in enumerate(SKIES)),
    *(Rule(f"turn the ground into {name}", 0.5, ground=i) for i, name in enumerate(GROUNDS)),
    *(
        Rule(f"paint the houses {name}", 0.5, touches=(HOUSES,), ids=(i,), odds=(1.0,))
        for i, name in zip(HOUSES.ids, ("red", "blue", "yellow"), strict=True)
    ),
    *(
        Rule(f"remove the {kind.name}", 0.4, touches=(kind,), ids=(0,), odds=(1.0,))
        for kind in KINDS
    ),
    _scatter("add clouds", CLOUDS),
    _scatter("add balloons", BALLOONS),
    _scatter("add birds", BIRDS),
    _scatter("plant trees", TREES),
    _scatter("build houses", HOUSES),
    _scatter("plant flowers", FLOWERS),
    _repaint(BALLOONS),
    _repaint(HOUSES),
    _repaint(FLOWERS),
)
INSTRUCTIONS = tuple(rule.instruction for rule in RULES)


def _touched(rule: Rule, tiles: np.ndarray) -> np.ndarray:
    if rule.touches is None:
        return np.zeros(tiles.shape, dtype=bool)
    if isinstance(rule.touches, tuple):
        return np.any([_has(tiles, kind) for kind in rule.touches], axis=0)
    in_sky = (np.arange(GRID) < GRID // 2)[:, None]
    return (tiles == 0) & (in_sky if rule.touches == "empty sky" else ~in_sky)


def _apply(rule: Rule, source: Scenes, rng: np.random.Generator) -> tuple[Scenes, np.ndarray]:
    """Return one random outcome and which ids are right in each tile, `(n, 4, 4, 8)`."""
    count = len(source)
    sky = source.sky if rule.sky is None else np.full(count, rule.sky)
    ground = source.ground if rule.ground is None else np.full(count, rule.ground)
    touched = _touched(rule, source.tiles)
    valid = np.arange(_IDS) == source.tiles[..., None]
    tiles = source.tiles
    if rule.ids:
        valid = np.where(touched[..., None], np.isin(np.arange(_IDS), rule.ids), valid)
        drawn = rng.choice(rule.ids, tiles.shape, p=rule.odds)
        tiles = np.where(touched, drawn, tiles)
    return Scenes(sky, ground, tiles), valid


def sample_edits(rng: np.random.Generator, count: int) -> Edits:
    """Draw edits at random, each of which changes its picture and leaves something to decide.

    An open instruction gets a source with at least three tiles to decide.
    """
    shares = np.array([rule.share for rule in RULES])
    wanted = rng.choice(len(RULES), count, p=shares / shares.sum())
    sky, ground = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    source = Scenes(sky, ground, np.empty((count, GRID, GRID), dtype=np.int64))
    outcome = Scenes(sky.copy(), ground.copy(), source.tiles.copy())
    valid = np.empty((count, GRID, GRID, _IDS), dtype=bool)
    for index, rule in enumerate(RULES):
        places = np.flatnonzero(wanted == index)
        while len(places):
            before = sample_scenes(rng, 8 * len(places) + 64)
            after, right = _apply(rule, before, rng)
            differs = (
                (before.tiles != after.tiles).any((1, 2))
                | (before.sky != after.sky)
                | (before.ground != after.ground)
            )
            enough = (right.sum(-1) > 1).sum((1, 2)) >= (3 if rule.is_open else 0)
            good = np.flatnonzero(differs & enough)[: len(places)]
            done, places = places[: len(good)], places[len(good) :]
            for scenes, drawn in ((source, before), (outcome, after)):
                scenes.sky[done] = drawn.sky[good]
                scenes.ground[done] = drawn.ground[good]
                scenes.tiles[done] = drawn.tiles[good]
            valid[done] = right[good]
    instructions = [RULES[i].instruction for i in wanted]
    is_open = np.array([RULES[i].is_open for i in wanted])
    return Edits(source, outcome, instructions, is_open, valid)


def _tile_distances(pictures: np.ndarray, sky: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Measure the RMS distance of every tile to every id: `(n, 4, 4, 8)`."""
    tiles = pictures.reshape(-1, GRID, TILE, GRID, TILE, 3).transpose(0, 1, 3, 2, 4, 5)
    half = GRID // 2
    parts = (
        tiles[:, :half, :, None] - TILES[0][sky][:, None, None],
        tiles[:, half:, :, None] - TILES[1][ground][:, None, None],
    )
    return np.concatenate([np.sqrt(np.square(part).mean((-3, -2, -1))) for part in parts], axis=1)


# A tile is right when its RMS distance to a right sprite is below this: less than half of the
# smallest distance between two different tiles of one theme, so no tile can pass for another.
RIGHT_BELOW = 0.07


@dataclass(frozen=True, slots=True)
class Scores:
    """How right a batch of edited pictures is.

    Attributes:
        distance: RMS distance to the nearest right answer over the picture, shape `(n,)`.
        worst_tile: The largest RMS distance of a tile to its nearest right sprite, `(n,)`.
        is_right: True where every tile is right and, if open, something changed, `(n,)`.
    """

    distance: np.ndarray
    worst_tile: np.ndarray
    is_right: np.ndarray


def score(edits: Edits, pictures: np.ndarray) -> Scores:
    """Score edited pictures exactly, against the nearest of all right answers.

    Args:
        edits: What was asked for.
        pictures: What came out, shape `(n, 32, 32, 3)`, values in 0 to 1.
    """
    distances = _tile_distances(pictures, edits.outcome.sky, edits.outcome.ground)
    allowed = np.where(edits.valid, distances, np.inf)
    tile = allowed.min(-1)
    changed = (allowed.argmin(-1) != edits.source.tiles).any((1, 2)) | ~edits.is_open
    worst = tile.max((1, 2))
    return Scores(np.sqrt(np.square(tile).mean((1, 2))), worst, (worst < RIGHT_BELOW) & changed)


def caption_distance(scenes: Scenes, pictures: np.ndarray) -> np.ndarray:
    """Measure how far text-to-image pictures are from the nearest that fits their caption.

    Args:
        scenes: The scenes whose captions were the prompts.
        pictures: What came out, shape `(n, 32, 32, 3)`.

    Returns:
        The largest RMS distance of a tile to the nearest sprite of a kind in the caption, `(n,)`.
    """
    distances = _tile_distances(pictures, scenes.sky, scenes.ground)
    fits = np.zeros((len(scenes), GRID, GRID, _IDS), dtype=bool)
    fits[..., 0] = True
    for kind in KINDS:
        there = _has(scenes.tiles, kind).any((1, 2))
        rows = slice(0, 2) if kind.in_sky else slice(2, 4)
        for i in kind.ids:
            fits[:, rows, :, i] = there[:, None, None]
    return np.where(fits, distances, np.inf).min(-1).max((1, 2))

"""The two tasks (C.2.1) and their trials, as data: the four regimes (C.2.2) and training scenes.

A trial's `scene` is JSON: `task`, `target` and `distractors` (name, position (x, y) in metres, yaw in radians),
`containers` (name, position), `goal` (name of a container), `tablecloth`, and `steamer` (position) in the steamer task.
Novel items of the evaluation never occur in a training scene.
"""

from collections.abc import Mapping, Sequence
from math import hypot
from typing import Any

import numpy as np

from agra.simulators.tabletop.models.catalogue import FURNITURE, ITEMS
from agra.simulators.tabletop.models.colours import DEFAULT_TABLECLOTH, TABLECLOTHS
from agra.simulators.tabletop.models.furniture import CONTAINERS, NOVEL_PLATES, PLATE, TRAINING_PLATES
from agra.simulators.tabletop.models.items import NOVEL, SEEN
from agra.simulators.tabletop.models.parts import Item
from agra.simulators.tabletop.models.steamer import NOVEL_BUNS, TRAINING_BUNS
from agra.types import REGIMES, Trial

PICK_AND_PLACE = "pick_and_place"
OPEN_STEAMER = "open_steamer_transfer_bun"
STEAMER_INSTRUCTION = "open the steamer and put the bun on the plate"

POSITIONS = ((0.0, -0.04), (-0.10, -0.07), (0.10, -0.07), (-0.10, 0.0), (0.10, 0.0))
"""The five pre-designed positions of an item, shared by the in-distribution and the instance regime."""
CONTAINER_AT = ((0.0, 0.125), (-0.11, 0.125), (0.11, 0.125), (0.06, 0.125), (-0.06, 0.125))
"""The position of the container for each of them."""
OBJECT_AREA = ((-0.115, 0.115), (-0.08, 0.005))
CONTAINER_AREA = ((-0.125, 0.125), (0.120, 0.128))
STEAMER_AT, STEAMER_PLATE_AT = (0.010, 0.058), (0.173, 0.030)

PICK_SCENARIOS = (
    ("banana", "apple", "can", "box"),
    ("ball", "peach", "carrot", "plate"),
    ("cup", "lemon", "bread", "bowl"),
    ("carrot", "egg", "apple", "basket"),
    ("bread", "can", "banana", "box"),
    ("apple", "ball", "egg", "bowl"),
    ("lemon", "carrot", "cup", "basket"),
    ("peach", "cup", "ball", "plate"),
)
"""Candidates a and b, a further distractor, and the container."""
PICK_SLOTS = (
    ((-0.10, -0.04), (0.10, -0.04), (0.0, -0.06)),
    ((-0.09, -0.07), (0.02, -0.02), (0.11, -0.07)),
    ((0.09, -0.07), (-0.02, -0.02), (-0.11, -0.06)),
    ((-0.10, -0.01), (0.01, -0.07), (0.10, 0.0)),
)
"""Positions of a, b and the distractor. Scenario i uses row i modulo their number."""
PLACE_SCENARIOS = (("apple", "box", "bowl"), ("lemon", "plate", "basket"))
"""The item, and containers a and b."""
CONTAINER_SLOTS = ((-0.105, 0.125), (0.105, 0.125))


def trials(regime: str, *, simulator: str = "tabletop") -> tuple[Trial, ...]:
    """The fixed trials of a regime: 50 in_distribution, 40 semantic, 50 instance, 40 attribute.

    Raises ValueError for another regime.
    """
    makers = {
        "in_distribution": lambda: _one_object(SEEN),
        "semantic": lambda: _pick_scenarios() + _place_scenarios(),
        "instance": lambda: _one_object(NOVEL),
        "attribute": _steamer_variations,
    }
    if regime not in makers:
        raise ValueError(f"unknown regime {regime!r}; available: {', '.join(makers)}")
    first = 1000 * (REGIMES.index(regime) + 1)
    return tuple(
        _trial(f"{regime}/{name}", simulator, regime, first + index, scene)
        for index, (name, scene) in enumerate(makers[regime]())
    )


def training_trials(
    count: int, seed: int, *, steamer_fraction: float = 0.25, simulator: str = "tabletop"
) -> tuple[Trial, ...]:
    """Random scenes for demonstrations. Trial i depends on `seed` and i alone.

    Seen items with 0 to 2 distractors and one or two containers, and a fraction `steamer_fraction` of steamer scenes
    with three kinds of bun and three plates (C.2.1). Raises ValueError for a negative count or seed, or a fraction
    outside [0, 1].
    """
    if count < 0 or seed < 0:
        raise ValueError(f"training_trials: expected count and seed of at least 0, got {count} and {seed}")
    if not 0 <= steamer_fraction <= 1:
        raise ValueError(f"steamer_fraction: expected a value in [0, 1], got {steamer_fraction}")
    trials = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = _random_steamer(rng) if rng.random() < steamer_fraction else _random_pick(rng)
        trials.append(_trial(f"training/{seed}/{index:05d}", simulator, "training", seed * 1_000_000 + index, scene))
    return tuple(trials)


def instruction(scene: Mapping[str, Any]) -> str:
    """The instruction of a scene, c of Eq. 1."""
    if scene["task"] == OPEN_STEAMER:
        return STEAMER_INSTRUCTION
    goal = FURNITURE[scene["goal"]]
    return f"put the {scene['target']['name']} {goal.preposition} the {goal.name}"


def tasks_of(scene: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tasks that a scene's objects offer: the scene with each task's target and goal, by instruction.

    In the steamer task it is that task alone.
    """
    if scene["task"] == OPEN_STEAMER:
        return {instruction(scene): dict(scene)}
    items = [scene["target"], *scene["distractors"]]
    tasks = [
        {**scene, "target": item, "distractors": [other for other in items if other is not item], "goal": goal["name"]}
        for item in items
        for goal in scene["containers"]
    ]
    return {instruction(task): task for task in tasks}


def _trial(name: str, simulator: str, regime: str, seed: int, scene: dict[str, Any]) -> Trial:
    return Trial(
        name=name,
        simulator=simulator,
        regime=regime,
        task=scene["task"],
        seed=seed,
        instruction=instruction(scene),
        scene=scene,
    )


def _placed(name: str, position: Sequence[float] | np.ndarray, yaw: float = 0.0) -> dict[str, Any]:
    return {"name": name, "position": [round(float(v), 5) for v in position], "yaw": round(float(yaw), 5)}


def _pick(target: dict, distractors: list[dict], containers: list[dict], goal: str) -> dict[str, Any]:
    return {
        "task": PICK_AND_PLACE,
        "target": target,
        "distractors": distractors,
        "containers": containers,
        "goal": goal,
        "tablecloth": DEFAULT_TABLECLOTH,
    }


def _yaw(index: int) -> float:
    """A fixed orientation, evenly spread over the indices (golden-ratio sequence over the circle)."""
    return 2 * np.pi * ((index * 0.6180339887) % 1) - np.pi


def _one_object(items: Sequence[Item]) -> list[tuple[str, dict[str, Any]]]:
    """Each item at each of the five positions, with the containers in turn."""
    scenes = []
    for i, item in enumerate(items):
        for k, position in enumerate(POSITIONS):
            container = CONTAINERS[(i + k) % len(CONTAINERS)].name
            target = _placed(item.name, position, _yaw(len(POSITIONS) * i + k))
            scenes.append((f"{item.name}-{k}", _pick(target, [], [_placed(container, CONTAINER_AT[k])], container)))
    return scenes


def _pick_scenarios() -> list[tuple[str, dict[str, Any]]]:
    """Items a and b, both instructions, positions as designed and swapped."""
    scenes = []
    for i, (a, b, other, container) in enumerate(PICK_SCENARIOS):
        slots = PICK_SLOTS[i % len(PICK_SLOTS)]
        bystander = _placed(other, slots[2], _yaw(3 * i + 2))
        holder = _placed(container, CONTAINER_AT[i % len(CONTAINER_AT)])
        for order, (at_a, at_b) in {"designed": slots[:2], "swapped": slots[1::-1]}.items():
            things = {a: _placed(a, at_a, _yaw(3 * i)), b: _placed(b, at_b, _yaw(3 * i + 1))}
            for named, rest in ((a, b), (b, a)):
                scene = _pick(things[named], [things[rest], bystander], [holder], container)
                scenes.append((f"pick-{a}-or-{b}/{named}-{order}", scene))
    return scenes


def _place_scenarios() -> list[tuple[str, dict[str, Any]]]:
    """Containers a and b, both instructions, positions as designed and swapped."""
    scenes = []
    for i, (name, a, b) in enumerate(PLACE_SCENARIOS):
        target = _placed(name, POSITIONS[0], _yaw(i))
        for order, (at_a, at_b) in {"designed": CONTAINER_SLOTS, "swapped": CONTAINER_SLOTS[::-1]}.items():
            holders = [_placed(a, at_a), _placed(b, at_b)]
            scenes += [(f"place-{name}-{a}-or-{b}/{goal}-{order}", _pick(target, [], holders, goal)) for goal in (a, b)]
    return scenes


def _steamer(rng: np.random.Generator, bun: str, plate: str, tablecloth: str) -> dict[str, Any]:
    steamer = np.array(STEAMER_AT) + rng.uniform(-1, 1, 2) * (0.010, 0.012)
    inside = rng.uniform(-0.008, 0.008, 2)
    plate_at = np.array(STEAMER_PLATE_AT) + rng.uniform(-1, 1, 2) * (0.006, 0.025)
    return {
        "task": OPEN_STEAMER,
        "target": _placed(bun, steamer + inside, rng.uniform(-np.pi, np.pi)),
        "distractors": [],
        "containers": [_placed(plate, plate_at)],
        "goal": plate,
        "tablecloth": tablecloth,
        "steamer": {"position": [round(float(v), 5) for v in steamer]},
    }


def _steamer_variations() -> list[tuple[str, dict[str, Any]]]:
    """Four novel plates on the training tablecloth, then the training plate on novel tablecloths, each with 8 novel
    buns.

    The novel tablecloths take turns over the buns.
    """
    cloths = [name for name in TABLECLOTHS if name != DEFAULT_TABLECLOTH]
    scenes = []
    for s, plate in enumerate((*NOVEL_PLATES, PLATE)):
        for b, bun in enumerate(NOVEL_BUNS):
            cloth = DEFAULT_TABLECLOTH if plate is not PLATE else cloths[b % len(cloths)]
            setting = plate.name if plate is not PLATE else "tablecloth"
            scene = _steamer(np.random.default_rng([4, s, b]), bun.name, plate.name, cloth)
            scenes.append((f"{setting}-{bun.name}".replace(" ", "-"), scene))
    return scenes


def _random_steamer(rng: np.random.Generator) -> dict[str, Any]:
    bun, plate = rng.integers(len(TRAINING_BUNS)), rng.integers(len(TRAINING_PLATES))
    return _steamer(rng, TRAINING_BUNS[bun].name, TRAINING_PLATES[plate].name, DEFAULT_TABLECLOTH)


def _random_pick(rng: np.random.Generator) -> dict[str, Any]:
    names = [SEEN[i].name for i in rng.permutation(len(SEEN))[: 1 + rng.integers(3)]]
    kinds = [CONTAINERS[i].name for i in rng.permutation(len(CONTAINERS))]
    if rng.random() < 0.25:
        jitter = rng.uniform(-0.012, 0.012, 2)
        holders = [
            _placed(kind, (x + dx, y)) for kind, (x, y), dx in zip(kinds[:2], CONTAINER_SLOTS, jitter, strict=True)
        ]
    else:
        holders = [_placed(kinds[0], [rng.uniform(*bound) for bound in CONTAINER_AREA])]
    things = [
        _placed(n, at, rng.uniform(-np.pi, np.pi)) for n, at in zip(names, _scatter(rng, names, holders), strict=True)
    ]
    return _pick(things[0], things[1:], holders, holders[0]["name"])


def _scatter(rng: np.random.Generator, names: Sequence[str], holders: list[dict]) -> list[tuple[float, float]]:
    """Positions in the object area, with room for fingers between them."""
    while True:
        spots = [(rng.uniform(*OBJECT_AREA[0]), rng.uniform(*OBJECT_AREA[1])) for _ in names]
        taken = [(*h["position"], FURNITURE[h["name"]].radius) for h in holders]
        for name, (x, y) in zip(names, spots, strict=True):
            radius = ITEMS[name].radius
            if any(hypot(x - u, y - v) < 0.056 + r for u, v, r in taken if (u, v) != (x, y)):
                break
            taken.append((x, y, radius))
        else:
            return spots

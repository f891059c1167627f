"""What others have published on the benchmarks that `agra` runs: averages, with the protocol behind each in words.

Numbers are copied from where `source` says and not measured here. Where the authors do not state how many episodes stand
behind a number, it has no interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published average: `average` in percent over `tasks`, `episodes` of each (None: not stated)."""

    benchmark: str
    regime: str
    system: str
    average: float
    tasks: int
    episodes: int | None
    protocol: str
    source: str


_LAST_OF_CHUNK = "16 of 16 actions executed, success looked for at the end of each chunk (--termination chunk)"
_EVERY_STEP = "8 actions executed, every step looked at for success (--termination step)"
_FULL = "1,000 demonstrations a task, 720 steps; "
_FEW = "100 demonstrations a task, 40,000 training steps; executed steps and accounting not stated"
_gr1 = partial(Published, benchmark="robocasa_gr1", regime="in_distribution", tasks=24)

_GR1 = (
    _gr1(
        system="AGRA",
        average=66.4,
        episodes=50,
        protocol="1,000 demonstrations a task, 80,000 training steps; step limit, executed steps and accounting not stated",
        source="arXiv 2606.12217, B.2.1, Fig. 9",
    ),
    _gr1(
        system="DIAL",
        average=70.2,
        episodes=50,
        protocol="all but 10 demonstrations a task, 720 steps; " + _LAST_OF_CHUNK,
        source="DIAL, full data",
    ),
    _gr1(
        system="DIAL, few-shot",
        average=58.3,
        episodes=50,
        protocol="100 demonstrations a task, 720 steps; " + _LAST_OF_CHUNK,
        source="DIAL, few-shot",
    ),
    _gr1(
        system="DiT4DiT (repository)",
        average=56.7,
        episodes=50,
        protocol=_FULL + "12 actions executed, success looked for at the end of each chunk, resets without a seed; "
        "five evaluations of one checkpoint gave 56.3 to 57.4",
        source="DiT4DiT README",
    ),
    _gr1(
        system="DiT4DiT (paper)",
        average=50.8,
        episodes=None,
        protocol="protocol not stated beside the number",
        source="DiT4DiT, abstract",
    ),
    _gr1(
        system="GR00T-N1.5",
        average=48.0,
        episodes=50,
        protocol=_FULL + _LAST_OF_CHUNK,
        source="Isaac-GR00T, examples/RoboCasa",
    ),
    _gr1(
        system="GR00T-N1.6",
        average=47.6,
        episodes=None,
        protocol=_FULL + _EVERY_STEP,
        source="Isaac-GR00T, examples/robocasa-gr1-tabletop-tasks",
    ),
    _gr1(
        system="LDA-1B",
        average=55.4,
        episodes=None,
        protocol="protocol not stated beside the number",
        source="arXiv 2602.12215",
    ),
    _gr1(
        system="FLARE",
        average=55.0,
        episodes=None,
        protocol="protocol not stated beside the number",
        source="as the AGRA paper's margins imply",
    ),
    _gr1(
        system="UniT",
        average=66.7,
        episodes=None,
        protocol="full data; protocol not stated beside the number",
        source="arXiv 2604.19734",
    ),
    _gr1(
        system="UniT, few-shot",
        average=45.5,
        episodes=None,
        protocol="few-shot; protocol not stated beside the number",
        source="arXiv 2604.19734",
    ),
)

_GR1_REGIMES = {"in_distribution": 24, "unseen_appearance": 18, "unseen_object_types": 32, "unseen_combinations": 14}
_TABLE_2 = {
    "Freeze backbone": (52.89, 49.33, 43.87, 51.42),
    "WAM": (58.41, 53.77, 43.18, 59.57),
    "AGRA-SharedDenoisingPass": (58.24, 57.77, 41.87, 58.57),
    "AGRA-VideoPass": (60.41, 55.33, 44.56, 60.14),
    "AGRA-ActionCondPass": (61.75, 56.55, 45.31, 66.28),
}
_GR1 += tuple(
    Published(
        benchmark="robocasa_gr1",
        regime=regime,
        system=f"{variant}, few-shot",
        average=average,
        tasks=tasks,
        episodes=50,
        protocol=_FEW,
        source="arXiv 2606.12217, Table 2",
    )
    for variant, averages in _TABLE_2.items()
    for (regime, tasks), average in zip(_GR1_REGIMES.items(), averages, strict=True)
)

_LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
_LIBERO = tuple(
    Published(
        benchmark=suite,
        regime="in_distribution",
        system=system,
        average=average,
        tasks=10,
        episodes=50,
        protocol=protocol,
        source=source,
    )
    for system, averages, protocol, source in (
        ("DiT4DiT", (98.6, 100.0, 99.2, 96.6), "chunks of 8", "DiT4DiT, examples/LIBERO"),
        (
            "pi0.5",
            (98.8, 98.2, 98.0, 92.4),
            "asked again every 5 steps, two cameras, 224 x 224",
            "openpi, examples/libero",
        ),
        ("Cosmos-Policy", (98.1, 100.0, 98.2, 97.6), "chunks of 16, seeds 195 to 197", "Cosmos-Policy, model card"),
    )
    for suite, average in zip(_LIBERO_SUITES, averages, strict=True)
)

PUBLISHED: tuple[Published, ...] = _GR1 + _LIBERO
"""Facts of the RoboCasa GR1 tabletop benchmark (the paper's Table 2 and Fig. 9) and of LIBERO."""


def published(benchmark: str) -> Sequence[Published]:
    """The published averages of one benchmark. Raises ValueError where none are known."""
    found = tuple(row for row in PUBLISHED if row.benchmark == benchmark)
    if not found:
        known = ", ".join(dict.fromkeys(row.benchmark for row in PUBLISHED))
        raise ValueError(f"no published results of {benchmark!r} are known here; there are some of {known}")
    return found

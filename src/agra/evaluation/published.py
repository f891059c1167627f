"""Published averages on the benchmarks that agra runs, each with its protocol in words.

The numbers are quoted from `source` and not measured here. Averages over an unstated number of episodes have no
interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published average in percent, over `tasks` with `episodes` of each (None: not stated).

    With `by_group`, it is the mean of the means of the benchmark's task groups instead of the mean over tasks.
    """

    benchmark: str
    regime: str
    system: str
    average: float
    tasks: int
    episodes: int | None
    protocol: str
    source: str
    by_group: bool = False


_LAST_OF_CHUNK = "16 of 16 actions executed, success checked at the end of each chunk (--termination chunk)"
_EVERY_STEP = "8 actions executed, success checked after every step (--termination step)"
_FULL = "1,000 demonstrations a task, 720 steps; "
_FEW = "100 demonstrations a task, 40,000 training steps; executed steps and accounting not stated"
_gr1 = partial(Published, benchmark="robocasa_gr1", regime="in_distribution", tasks=24)

_GR1 = (
    _gr1(
        system="AGRA",
        average=66.4,
        episodes=50,
        protocol="1,000 demonstrations a task, 80,000 training steps; "
        "step limit, executed steps and accounting not stated",
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
        protocol=_FULL + "12 actions executed, success checked at the end of each chunk, resets without a seed; "
        "five evaluations of one checkpoint gave 56.3 to 57.4",
        source="DiT4DiT README",
    ),
    _gr1(
        system="DiT4DiT (paper)",
        average=50.8,
        episodes=None,
        protocol="protocol not stated with the number",
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
        protocol="protocol not stated with the number",
        source="arXiv 2602.12215",
    ),
    _gr1(
        system="FLARE",
        average=55.0,
        episodes=None,
        protocol="protocol not stated with the number",
        source="as the AGRA paper's margins imply",
    ),
    _gr1(
        system="UniT",
        average=66.7,
        episodes=None,
        protocol="full data; protocol not stated with the number",
        source="arXiv 2604.19734",
    ),
    _gr1(
        system="UniT, few-shot",
        average=45.5,
        episodes=None,
        protocol="few-shot; protocol not stated with the number",
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
            "5 actions executed, two cameras, 224 x 224",
            "openpi, examples/libero",
        ),
        ("Cosmos-Policy", (98.1, 100.0, 98.2, 97.6), "chunks of 16, seeds 195 to 197", "Cosmos-Policy, model card"),
    )
    for suite, average in zip(_LIBERO_SUITES, averages, strict=True)
)

_SMOLVLA = "50 demonstrations a task, camera corner2, at most 500 steps; "
_METAWORLD = tuple(
    Published(
        benchmark="metaworld",
        regime="in_distribution",
        system=system,
        average=average,
        tasks=50,
        episodes=10,
        protocol=f"{_SMOLVLA}easy {easy}, medium {medium}, hard {hard}, very hard {very_hard}; "
        f"{by_task} over tasks{note}",
        source="arXiv 2506.01844, Table 2",
        by_group=True,
    )
    for system, easy, medium, hard, very_hard, average, by_task, note in (
        ("Diffusion Policy", 23.1, 10.7, 1.9, 6.1, 10.5, 16.1, ""),
        ("TinyVLA", 77.6, 21.5, 11.4, 15.8, 31.6, 51.1, ""),
        ("pi0 3.5B, from PaliGemma", 80.4, 40.9, 36.7, 44.0, 50.5, 62.8, ""),
        ("pi0 3.5B, robot-pretrained", 71.8, 48.2, 41.7, 30.0, 47.9, 58.8, ""),
        (
            *("SmolVLA 0.45B", 82.5, 41.8, 45.0, 60.0, 57.3, 66.8),
            "; a reproduction with the released weights solved 16 of 50, one episode a task",
        ),
        ("SmolVLA 2.25B", 87.1, 51.8, 70.0, 64.0, 68.2, 75.0, ""),
    )
)
_METAWORLD += (
    Published(
        benchmark="metaworld",
        regime="in_distribution",
        system="Evo-1 0.77B",
        average=80.6,
        tasks=50,
        episodes=10,
        protocol="at most 400 steps, 448 x 448, 15 actions executed; reproductions print 75.8 and 76.2",
        source="MINT-SJTU/Evo-1, issue 34",
        by_group=True,
    ),
)

PUBLISHED: tuple[Published, ...] = _GR1 + _LIBERO + _METAWORLD
"""RoboCasa GR1 tabletop (the paper's Table 2 and Fig. 9), LIBERO and Meta-World."""


def published(benchmark: str) -> Sequence[Published]:
    """The published averages of one benchmark. Raises ValueError for a benchmark without any."""
    averages = tuple(row for row in PUBLISHED if row.benchmark == benchmark)
    if not averages:
        benchmarks = ", ".join(dict.fromkeys(row.benchmark for row in PUBLISHED))
        raise ValueError(f"no published results of {benchmark!r}; available: {benchmarks}")
    return averages

"""Fields that are equal in two runs of one evaluation."""

from dataclasses import asdict
from typing import Any

from agra.evaluation.results import TrialResult


def reproducible(trial: TrialResult) -> dict[str, Any]:
    """The reproducible fields: all but times, video and the simulator's failures."""
    return {k: v for k, v in asdict(trial).items() if k not in ("wall_s", "policy_ms", "video", "failures")}

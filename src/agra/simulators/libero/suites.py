"""Numbers of LIBERO's suites, and the perturbations of LIBERO-PRO."""

MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Control steps of an episode, by suite."""
SETTLE_STEPS = 10
EPISODES = 50
ENVIRONMENT_SEED = 7

PERTURBATIONS = {
    "in_distribution": "",
    "language": "_lan",
    "object": "_object",
    "position": "_swap",
    "task": "_task",
}
"""Regime -> suffix of the package's suite. The resources of a fifth perturbation, the environment, are missing
there."""


def regimes(suite: str) -> tuple[str, ...]:
    """The regimes of a suite. libero_90 has no perturbed variants."""
    return ("in_distribution",) if suite == "libero_90" else tuple(PERTURBATIONS)

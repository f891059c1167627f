"""Success and smoothness of the four ways to execute chunks, under latency, in the tabletop that does not wait.

    python -m benchmarks.control CHECKPOINT [--trials 20] [--latencies 0 50 100 200 400] [--output outputs/control]

Simulated time: an answer arrives the latency after its question, rounded up to the next control step (a tenth of a
second in this world, so that 50 and 100 ms are the same), and the world moves on meanwhile, however busy the machine is.
Each episode is one line of OUTPUT.jsonl; what is there is not played again. OUTPUT.png is the plot.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from agra.evaluation.protocols import regime_trials
from agra.evaluation.results import wilson_interval
from agra.policies.load import load_policy
from agra.serving.robot.control import control
from agra.serving.robot.executors import EXECUTORS, DelayedInference, make_executor
from agra.serving.robot.robots import SimulatedRobot
from agra.simulators.registry import make
from agra.types import Simulator, Trial
from benchmarks.side_by_side import finish

JUDGED_AT = 200  # ms, where the last line compares


def play(policy: MethodPolicy, world: Simulator, trial: Trial, executor: str, delay: int, execute_steps: int) -> dict:
    """One episode: whether it succeeded, after how long, and how smoothly the hands moved until then."""
    robot = SimulatedRobot(world, trial)
    robot.connect()
    report = control(
        robot,
        make_executor(executor, DelayedInference(policy, delay), execute_steps=execute_steps),
        fps=world.fps,
        steps=world.max_steps,
        seed=trial.seed,
        real_time=False,
        until=lambda: robot.succeeded,
    )
    moving = [i for i, name in enumerate(world.embodiment.state_names) if name.rpartition("_")[2] in ("x", "y", "z")]
    positions = np.stack(robot.states)[:, moving]
    jerk = np.diff(positions, n=3, axis=0) * world.fps**3
    return {
        "success": robot.succeeded,
        "seconds": report.steps / world.fps,
        "held": report.held,
        "calls": len(report.delays),
        "jerk": float(np.sqrt((jerk**2).sum(1).mean())) if len(jerk) else 0.0,
    }


def mean_interval(values: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval (2,000 draws)."""
    found = np.array(values)
    draws = np.random.default_rng(seed).choice(found, (2000, len(found))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(found.mean()), float(low), float(high)


def summarise(rows: list[dict], executors: list[str], latencies: list[int], steps: dict[int, int]) -> list[dict]:
    """One entry an executor and latency."""
    found = []
    for executor in executors:
        for latency in latencies:
            own = [row for row in rows if row["executor"] == executor and row["delay"] == steps[latency]]
            successes = sum(row["success"] for row in own)
            solved = [row["seconds"] for row in own if row["success"]]
            found.append(
                {
                    "executor": executor,
                    "latency_ms": latency,
                    "trials": len(own),
                    "success": [successes / len(own), *wilson_interval(successes, len(own))],
                    "jerk": mean_interval([row["jerk"] for row in own]),
                    "seconds": float(np.median(solved)) if solved else math.nan,
                    "held": float(np.mean([row["held"] / (row["seconds"] * 10) for row in own])),
                }
            )
    return found


def print_table(summary: list[dict]) -> None:
    table = Table(title="success, jerk of the hands and time to success, with 95 % intervals")
    for heading in ("executor", "latency", "trials", "success", "jerk (m/s³)", "seconds", "held"):
        table.add_column(heading, justify="left" if heading == "executor" else "right", no_wrap=True)
    for one in summary:
        rate, low, high = (100 * value for value in one["success"])
        jerk = "{:.2f} ({:.2f}-{:.2f})".format(*one["jerk"])
        figures = (f"{rate:.0f} % ({low:.0f}-{high:.0f})", jerk, f"{one['seconds']:.1f}", f"{one['held']:.0%}")
        table.add_row(one["executor"], f"{one['latency_ms']} ms", f"{one['trials']}", *figures)
    Console(width=110).print(table)


def plot(summary: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, executor in enumerate(dict.fromkeys(one["executor"] for one in summary)):
        own = [one for one in summary if one["executor"] == executor]
        at = np.array([one["latency_ms"] for one in own]) + 6 * (index - 1.5)  # side by side, to be seen
        for axis, name, scale in ((axes[0], "success", 100), (axes[1], "jerk", 1)):
            middle, low, high = scale * np.array([one[name] for one in own]).T
            axis.errorbar(at, middle, [middle - low, high - middle], marker="o", capsize=3, label=executor)
    axes[0].set(xlabel="latency (ms)", ylabel="success (%)", ylim=(0, 105))
    axes[1].set(xlabel="latency (ms)", ylabel="jerk of the hands (m/s³), RMS", ylim=(0, None))
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--latencies", type=int, nargs="+", default=[0, 50, 100, 200, 400], help="milliseconds")
    parser.add_argument("--executors", nargs="+", default=list(EXECUTORS), choices=EXECUTORS)
    parser.add_argument("--execute-steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("outputs/control"))
    parser.add_argument("--quick", action="store_true", help="2 trials, latencies 0 and 200 ms")
    options = parser.parse_args()
    if options.quick:
        options.trials, options.latencies = 2, [0, 200]
    policy, world = load_policy(options.checkpoint), make("tabletop")
    trials = regime_trials(world, ("in_distribution",), limit=options.trials)
    steps = {latency: math.ceil(latency * world.fps / 1000) for latency in options.latencies}
    path = options.output.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"policy": policy.name, "execute_steps": options.execute_steps}
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if settings.items() <= row.items()]
    known = {(row["trial"], row["executor"], row["delay"]) for row in rows}
    with path.open("a") as file:
        for trial in trials:
            for executor in options.executors:
                for delay in dict.fromkeys(steps.values()):
                    if (trial.name, executor, delay) in known:
                        continue
                    played = play(policy, world, trial, executor, delay, options.execute_steps)
                    row = {**settings, "trial": trial.name, "executor": executor, "delay": delay, **played}
                    rows.append(row)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    world.close()
    names = {trial.name for trial in trials}
    rows = [row for row in rows if row["trial"] in names]
    summary = summarise(rows, options.executors, options.latencies, steps)
    print_table(summary)
    plot(summary, options.output.with_suffix(".png"))
    judged = {one["executor"]: one for one in summary if one["latency_ms"] == JUDGED_AT}
    ours, other = judged["rtc"]["jerk"], judged["asynchronous"]["jerk"]
    finish(
        {
            "name": "control",
            "ratio": round(other[0] / ours[0], 3),
            "ours": round(ours[0], 3),
            "alternative": round(other[0], 3),
            "unit": f"jerk of the hands, m/s^3, rtc against asynchronous at {JUDGED_AT} ms",
            "spread": [round(other[1] / ours[2], 3), round(other[2] / ours[1], 3)],
            "machine": "simulated time",
            "summary": summary,
        }
    )


if __name__ == "__main__":
    main()

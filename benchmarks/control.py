"""Success and smoothness of the four executors under latency, in a tabletop that does not wait for the policy.

    python -m benchmarks.control [CHECKPOINT] [--trials 20] [--latencies 0 50 100 200 400] [--output outputs/control]

Time is simulated: a chunk arrives the latency after its request, rounded up to the next control step, and the simulator moves on
meanwhile, however busy the machine is. A control step takes a tenth of a second, so 50 and 100 ms are the same. Each episode is
one line of OUTPUT.jsonl and is not played again. OUTPUT.png is the plot.
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
from agra.policies.policy import MethodPolicy
from agra.serving.robot.control import control
from agra.serving.robot.executors import EXECUTORS, DelayedInference, make_executor
from agra.serving.robot.robots import SimulatedRobot
from agra.simulators.registry import make
from agra.types import Simulator, Trial
from benchmarks.side_by_side import finish

COMPARED: tuple[str, ...] = ("asynchronous", "rtc")
COMPARED_AT = 200  # ms


def play(policy: MethodPolicy, env: Simulator, trial: Trial, executor: str, delay: int, execute_steps: int) -> dict:
    """Play an episode. Returns its success, duration, and root mean square jerk of the hands."""
    robot = SimulatedRobot(env, trial)
    robot.connect()
    report = control(
        robot,
        make_executor(executor, DelayedInference(policy, delay), execute_steps=execute_steps),
        fps=env.fps,
        steps=env.max_steps,
        seed=trial.seed,
        real_time=False,
        until=lambda: robot.succeeded,
    )
    moving = [i for i, name in enumerate(env.embodiment.state_names) if name.rpartition("_")[2] in ("x", "y", "z")]
    positions = np.stack(robot.states)[:, moving]
    jerk = np.diff(positions, n=3, axis=0) * env.fps**3
    return {
        "success": robot.succeeded,
        "seconds": report.steps / env.fps,
        "held": report.held,
        "calls": len(report.delays),
        "jerk": float(np.sqrt((jerk**2).sum(1).mean())) if len(jerk) else 0.0,
    }


def mean_interval(values: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Return the mean and its 95 % bootstrap interval (2,000 resamples)."""
    means = np.random.default_rng(seed).choice(values, (2000, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.mean(values)), float(low), float(high)


def summarise(rows: list[dict], executors: list[str], latencies: list[int], steps: dict[int, int]) -> list[dict]:
    """Return an entry for each executor and latency."""
    summary = []
    for executor in executors:
        for latency in latencies:
            played = [row for row in rows if row["executor"] == executor and row["delay"] == steps[latency]]
            successes = sum(row["success"] for row in played)
            solved = [row["seconds"] for row in played if row["success"]]
            summary.append(
                {
                    "executor": executor,
                    "latency_ms": latency,
                    "trials": len(played),
                    "success": [successes / len(played), *wilson_interval(successes, len(played))],
                    "jerk": mean_interval([row["jerk"] for row in played]),
                    "seconds": float(np.median(solved)) if solved else math.nan,
                    "held": float(np.mean([row["held"] / (row["seconds"] * 10) for row in played])),
                }
            )
    return summary


def print_table(summary: list[dict]) -> None:
    table = Table(title="success, jerk of the hands and time to success, with 95 % intervals")
    for heading in ("executor", "latency", "trials", "success", "jerk (m/s³)", "seconds", "held"):
        table.add_column(heading, justify="left" if heading == "executor" else "right", no_wrap=True)
    for cell in summary:
        rate, low, high = (100 * value for value in cell["success"])
        jerk = "{:.2f} ({:.2f}-{:.2f})".format(*cell["jerk"])
        figures = (f"{rate:.0f} % ({low:.0f}-{high:.0f})", jerk, f"{cell['seconds']:.1f}", f"{cell['held']:.0%}")
        table.add_row(cell["executor"], f"{cell['latency_ms']} ms", f"{cell['trials']}", *figures)
    Console(width=110).print(table)


def plot(summary: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, executor in enumerate(dict.fromkeys(cell["executor"] for cell in summary)):
        cells = [cell for cell in summary if cell["executor"] == executor]
        x = np.array([cell["latency_ms"] for cell in cells]) + 6 * (index - 1.5)  # side by side
        for axis, name, scale in ((axes[0], "success", 100), (axes[1], "jerk", 1)):
            middle, low, high = scale * np.array([cell[name] for cell in cells]).T
            axis.errorbar(x, middle, [middle - low, high - middle], marker="o", capsize=3, label=executor)
    axes[0].set(xlabel="latency (ms)", ylabel="success (%)", ylim=(0, 105))
    axes[1].set(xlabel="latency (ms)", ylabel="jerk of the hands (m/s³), RMS", ylim=(0, None))
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="tabletop-agra")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--latencies", type=int, nargs="+", default=[0, 50, 100, 200, 400], help="milliseconds")
    parser.add_argument("--executors", nargs="+", default=list(EXECUTORS), choices=EXECUTORS)
    parser.add_argument("--execute-steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("outputs/control"))
    parser.add_argument(
        "--quick", action="store_true", help="1 trial, asynchronous and rtc at 200 ms, in a file of its own"
    )
    options = parser.parse_args()
    if options.quick:
        options.trials, options.latencies, options.executors = 1, [COMPARED_AT], list(COMPARED)
        options.output = options.output.with_name(f"{options.output.name}_quick")
    if not set(COMPARED) <= set(options.executors) or COMPARED_AT not in options.latencies:
        parser.error(
            f"the result compares {' and '.join(COMPARED)} at {COMPARED_AT} ms, got --executors "
            f"{' '.join(options.executors)} --latencies {' '.join(map(str, options.latencies))}; add the missing ones"
        )
    policy, env = load_policy(options.checkpoint), make("tabletop")
    trials = regime_trials(env, ("in_distribution",), limit=options.trials)
    steps = {latency: math.ceil(latency * env.fps / 1000) for latency in options.latencies}
    path = options.output.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"policy": policy.name, "execute_steps": options.execute_steps}
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if settings.items() <= row.items()]
    finished = {(row["trial"], row["executor"], row["delay"]) for row in rows}
    with path.open("a") as file:
        for trial in trials:
            for executor in options.executors:
                for delay in dict.fromkeys(steps.values()):
                    if (trial.name, executor, delay) in finished:
                        continue
                    played = play(policy, env, trial, executor, delay, options.execute_steps)
                    row = {**settings, "trial": trial.name, "executor": executor, "delay": delay, **played}
                    rows.append(row)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    env.close()
    names = {trial.name for trial in trials}
    rows = [row for row in rows if row["trial"] in names]
    summary = summarise(rows, options.executors, options.latencies, steps)
    print_table(summary)
    plot(summary, options.output.with_suffix(".png"))
    compared = {cell["executor"]: cell for cell in summary if cell["latency_ms"] == COMPARED_AT}
    ours, other = compared["rtc"]["jerk"], compared["asynchronous"]["jerk"]
    finish(
        {
            "name": "control",
            "ratio": round(other[0] / ours[0], 3),
            "ours": round(ours[0], 3),
            "alternative": round(other[0], 3),
            "unit": f"jerk of the hands, m/s^3, rtc against asynchronous at {COMPARED_AT} ms",
            "spread": [round(other[1] / ours[2], 3), round(other[2] / ours[1], 3)],
            "machine": "simulated time",
            "summary": summary,
        }
    )


if __name__ == "__main__":
    main()

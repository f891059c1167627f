"""Steps of runs/methods.sh that are no commands of agra: learning rates, finished rows, the table. runs/metaworld.py shares them.

python runs/methods.py rates RECIPE          the three learning rates of the grid
python runs/methods.py choose GRID           the rate with the lowest held-out action loss, of runs GRID/RATE
python runs/methods.py steps RECIPE START    the steps in which a method has the FLOPs of the WAM's training
python runs/methods.py chosen ROW            the rate of a finished row, nothing without one
python runs/methods.py record RUN ROW ...    write a finished row: row.json and the two results files
python runs/methods.py table                 write the table of all finished rows into docs/methods.md
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from agra import files
from agra.checkpoints.folder import resolve
from agra.checkpoints.lineage import lineage
from agra.checkpoints.read import read_config
from agra.config import RunConfig
from agra.data.lerobot.checksums import Seal
from agra.data.lerobot.dataset import LeRobotDataset
from agra.diagnostics.metrics import paired_difference
from agra.diagnostics.visual_reliance import VisualReliance
from agra.evaluation.measured import MeasuredRow, measured
from agra.evaluation.results import compare, read_results, summarise
from agra.evaluation.statistics import McNemar, p_text
from agra.evaluation.tables import REFERENCES
from agra.policies.load import load_policy
from agra.policies.policy import MethodPolicy
from agra.recipes import RECIPES
from agra.simulation import make_simulator
from agra.stages import Stage
from agra.training.memory_estimate import flops_per_sample
from agra.types import Observation

ROOT = Path(__file__).parent.parent
WAM_STEPS = {Stage.ADAPT: 500, Stage.JOINT: 2400}
"""Training steps of the row `wam`."""
ADAPT_SHARE = WAM_STEPS[Stage.ADAPT] / sum(WAM_STEPS.values())
"""Share of the adapt stage in the steps of a method that has one."""
COMPUTE = "_compute"
"""End of the name of a row with the WAM's FLOPs instead of its windows."""
RATE_MULTIPLES = (1 / 3, 1, 3)
"""Multiples of the recipe's learning rate."""
CHOSEN_BY = "validation/action_loss"
"""Figure that chooses the rate: the loss of the actions on the held-out demonstrations, in every method's own terms."""
CURVE = (CHOSEN_BY, "validation/loss", "visual_reliance/error", "visual_reliance/image_swap_shift")
GRID = "grid.json"
"""File of a row of seed 0: the runs of the grid. It outlives an unfinished row."""
BEGIN, END = "<!-- measured rows: python runs/methods.py table -->", "<!-- end of measured rows -->"


def rates(recipe: tyro.conf.Positional[str]) -> None:
    """Print the learning rates of the grid."""
    stage = RECIPES[recipe](Stage.JOINT).stage
    if stage.learning_rate_by_part:
        raise SystemExit(f"{recipe}: has rates by part, and the grid scales one rate alone")
    print(*(f"{multiple * stage.learning_rate:.3g}" for multiple in RATE_MULTIPLES))


def steps(recipe: tyro.conf.Positional[str], start: tyro.conf.Positional[Literal["adapt", "scratch"]]) -> None:
    """Print the steps in which a method has the FLOPs of the row `wam`, forward and backward, adapt stage included.

    The features of frozen networks come from the cache and do not count.
    """
    budget = sum(count * flops_per_sample(RECIPES["tiny_wam"](stage)) for stage, count in WAM_STEPS.items())
    step = flops_per_sample(RECIPES[recipe](Stage.JOINT))
    if start == "adapt":
        step = ADAPT_SHARE * flops_per_sample(RECIPES[recipe](Stage.ADAPT)) + (1 - ADAPT_SHARE) * step
    print(round(budget / step))


def choose(grid: tyro.conf.Positional[Path], row: tyro.conf.Positional[Path]) -> None:
    """Print the rate of the grid's best run, and keep the grid in the folder of the row."""
    row.mkdir(parents=True, exist_ok=True)
    files.write_text(row / GRID, json.dumps(_grid(grid), indent=1) + "\n")
    chosen(row)


def chosen(row: tyro.conf.Positional[Path]) -> None:
    """Print the rate that a row's grid chose, nothing before there is one."""
    if (row / GRID).is_file():
        print(min(json.loads((row / GRID).read_text()), key=lambda run: run["held_out_action_loss"])["learning_rate"])


def finished(run: tyro.conf.Positional[Path]) -> None:
    """Fail where a run has not reached its last step, as after SIGTERM, which `agra train` answers with success."""
    _check_finished(run)


def record(
    run: tyro.conf.Positional[Path],
    row: tyro.conf.Positional[Path],
    *,
    recipe: str,
    data: Path | None = None,
) -> None:
    """Write a finished row. A policy that was trained before has no `data`."""
    content = trained(run, row, recipe=recipe, data=data) | {
        "cpu_ms_per_answer": cpu_milliseconds(load_policy(run), _first_observation()),
        "visual_reliance": _visual_reliance(run),
        "grounding": grounding(run),
    }
    write_row(row, content, {"random": run / "results.jsonl", "zero": run / "zero.jsonl"})


def trained(run: Path, row: Path, *, recipe: str, data: Path | None) -> dict[str, Any]:
    """Describe the training of a finished run for its row: config, checksums, parameters, speed, losses."""
    _check_finished(run)
    stages = lineage(run)
    config = _portable(stages[-1].config)
    name = row.name.rpartition("_")[0]
    grid = row.with_name(f"{name.removesuffix(COMPUTE)}_0") / GRID
    log = [] if stages[-1].metrics is None else _lines(stages[-1].metrics)
    return {
        "name": name,
        "seed": config.stage.seed,
        "kind": config.method.kind,
        "method": config.method.describe(),
        "recipe": recipe,
        "commit": _commit(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "demonstrations_sha256": None if data is None else Seal(data).fingerprint(),
        "numbers_sha256": None if data is None else numbers_sha256(config, data),
        "config_sha256": hashlib.sha256(config.to_json().encode()).hexdigest(),
        "config": json.loads(config.to_json()),
        "pre_training": _pre_training(config),
        "parameters": _parameters(config),
        "stages": [{"stage": s.config.stage.name, "steps": s.config.stage.steps} for s in stages],
        "windows": sum(s.config.stage.steps * s.config.stage.batch_size for s in stages),
        "learning_rate": config.stage.learning_rate,
        "grid": json.loads(grid.read_text()) if grid.is_file() else None,
        "training": {
            "windows_per_second": float(np.median([line["samples_per_second"] for line in _having(log, "loss")])),
            "cpu_seconds": cpu_seconds(run.with_name(run.name + ".seconds")),
            "losses": [[line["step"], round(line["loss"], 5)] for line in _having(log, "loss")[9::10]],
            "held_out": [
                {"step": line["step"]} | {name: round(line[name], 5) for name in CURVE if name in line}
                for line in _having(log, CHOSEN_BY)
            ],
        },
    }


def numbers_sha256(config: RunConfig, data: Path) -> str:
    """The checksum of all instructions, states and actions of the demonstrations in the folder `data`.

    It does not depend on the machine that collected them. Their frames do, by rounding of the renderer, and with them the
    checksum of the files.
    """
    dataset, digest = LeRobotDataset.of(replace(config.data, path=str(data))), hashlib.sha256()
    for episode in range(dataset.num_episodes):
        digest.update(dataset.instruction(episode).encode())
        for values in (dataset.states(episode), dataset.actions(episode)):
            digest.update(np.ascontiguousarray(values, dtype="<f4").tobytes())
    return digest.hexdigest()


def write_row(row: Path, content: Mapping[str, Any], results: Mapping[str, Path]) -> None:
    """Write a row: the complete results file of each kind of noise, and last row.json, which marks the row as finished."""
    row.mkdir(parents=True, exist_ok=True)
    for noise, source in results.items():
        read_results(source)  # complete
        shutil.copyfile(source, row / f"{noise}.jsonl")
    files.write_text(row / "row.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(row)


def table() -> None:
    """Write the table into docs/methods.md, between its two marks."""
    replace_between(ROOT / "docs" / "methods.md", BEGIN, END, markdown(measured("tabletop")))


def replace_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page."""
    before, rest = page.read_text().split(begin)
    _, after = rest.split(end)
    files.write_text(page, f"{before}{begin}\n\n{text}\n{end}{after}")


def in_markdown(tables: Iterable[Sequence[Sequence[str]]]) -> str:
    """Write tables, each a list of lines of cells."""
    return "\n".join("".join(f"| {' | '.join(line)} |\n" for line in table) for table in tables)


def markdown(rows: Sequence[MeasuredRow]) -> str:
    """The rows of equal windows as three tables: training and visual reliance, success, and tests against the references.

    Then those of equal compute, where there are some.
    """
    text = _tables([row for row in rows if not row.name.endswith(COMPUTE)])
    if compute := [row for row in rows if row.name.endswith(COMPUTE)]:
        shown = [*(row for row in rows if row.name in REFERENCES), *compute]
        text += f"\nWith the WAM's FLOPs of training instead of its windows:\n\n{_tables(shown)}"
    return text


def _tables(rows: Sequence[MeasuredRow]) -> str:
    tests, count = _tests_table(rows)
    return (
        f"{in_markdown([_training_table(rows), _success_table(rows), tests])}\n"
        f"The last table holds {count} different tests. The first p is not corrected for their number. The one in brackets is, by "
        "Holm's method over all of them.\n"
    )


def _training_table(rows: Sequence[MeasuredRow]) -> list[list[str]]:
    heads = [
        "method",
        "seed",
        "pre-training",
        "parameters",
        "windows",
        "rates: held-out action loss of the grid",
        "held-out action loss",
    ]
    heads += [
        "windows/s",
        "ms an answer",
        "error / constant, cm",
        "blind",
        "image swapped / demonstrated, cm",
        "sensitivity ratio, mean",
    ]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        info, reliance = row.info, row.info["visual_reliance"]["all"]
        tried = [f"{run['learning_rate']:.3g}: {run['held_out_action_loss']:.3f}" for run in info["grid"] or ()]
        ratio = info["grounding"]["summary"]["sensitivity_mean"]["ratio"]
        cells = [
            *(row.name, f"{row.seed}", info["pre_training"], f"{sum(info['parameters'].values()):,}"),
            f"{info['windows']:,}",
            f"{', '.join(tried)}. Chosen: {info['learning_rate']:.3g}"
            if tried
            else f"{info['learning_rate']:.3g}, chosen before",
            f"{info['training']['held_out'][-1][CHOSEN_BY]:.3f}",
            *(windows_per_second(info), f"{info['cpu_ms_per_answer']:.0f}"),
            *_reliance_cells(reliance),
            f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio["count"] else "not applicable",
        ]
        lines.append(cells)
    return lines


def _reliance_cells(reliance: Mapping[str, Any]) -> tuple[str, str, str]:
    """Error beside a constant's, blindness, and the shift under another image beside the demonstrations'.

    A star marks the earlier instrument, which had no demonstrated shift (docs/diagnosis.md).
    """
    demonstrated = reliance.get("demonstrated_swap_shift")
    star = "*" if demonstrated is None else ""
    return (
        f"{100 * reliance['error']:.1f} / {100 * reliance['constant_error']:.1f}{star}",
        ("yes" if reliance["error_minus_constant"][2] >= 0 else "no") + star,
        f"{100 * reliance['image_swap_shift']:.1f}" + (star or f" / {100 * demonstrated:.1f}"),
    )


def _success_table(rows: Sequence[MeasuredRow]) -> list[list[str]]:
    heads = ["method", "seed", "noise", "in distribution", "semantic", "instance", "attribute", "all"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        for noise, results in row.results.items():
            cells = [
                f"{s.successes} of {s.trials}: {100 * s.rate:.0f} % [{100 * s.interval[0]:.0f}, {100 * s.interval[1]:.0f}]"
                for s in summarise(results)
            ]
            lines.append([row.name, f"{row.seed}", noise, *cells])
    return lines


def _tests_table(rows: Sequence[MeasuredRow]) -> tuple[list[list[str]], int]:
    """All trials of every row against those of the references of its seed, under the same kind of noise.

    Returns the number of different tests too: those of two references against each other stand in the table twice.
    """
    references = {(row.name, row.seed): row for row in rows if row.name in REFERENCES}
    names = list(dict.fromkeys(name for name, _ in references))
    of_seed = " of its seed" if len({row.seed for row in rows}) > 1 else ""
    heads = ["method", "seed", "noise", *(f"method alone / {name}{of_seed} alone, p (Holm)" for name in names)]
    lines, tests = [heads, ["---"] * len(heads)], dict[tuple[str, str, int, str], McNemar]()
    for row in rows:
        for name in names:
            other = references.get((name, row.seed))
            if other is not None and other is not row:
                for noise, results in row.results.items():
                    tests[row.name, name, row.seed, noise] = compare(results, other.results[noise]).pairs[-1].test
    different = {(frozenset((row, name)), *rest): test.p_value for (row, name, *rest), test in tests.items()}
    corrected = dict(zip(different, holm([*different.values()]), strict=True))

    def cell(row: MeasuredRow, name: str, noise: str) -> str:
        test = tests.get((row.name, name, row.seed, noise))
        if test is None:
            return ""
        adjusted = corrected[frozenset((row.name, name)), row.seed, noise]
        return f"{test.only_a} / {test.only_b}, {p_text(test.p_value)} ({p_text(adjusted)})"

    for row in rows:
        lines += [
            [row.name, f"{row.seed}", noise, *(cell(row, name, noise) for name in names)] for noise in row.results
        ]
    return lines, len(different)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), which control the chance of any false positive in the family."""
    order, adjusted, largest = np.argsort(p_values), [1.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _grid(folder: Path) -> list[dict[str, float]]:
    """The runs of the grid, lowest rate first. An unfinished one ends the program."""
    runs = []
    for run in sorted(folder.iterdir(), key=lambda path: float(path.name)):
        _check_finished(run)
        last = _having(_lines(run / "metrics.jsonl"), CHOSEN_BY)[-1]
        runs.append(
            {
                "learning_rate": float(run.name),
                "steps": last["step"],
                "held_out_action_loss": last[CHOSEN_BY],
                "held_out_error": last["visual_reliance/error"],
            }
        )
    return runs


def _check_finished(run: Path) -> None:
    checkpoint = resolve(run)
    step, steps = json.loads((checkpoint / "trainer.json").read_text())["step"], read_config(checkpoint).stage.steps
    if step < steps:
        raise SystemExit(f"{run}: stopped at step {step} of {steps}; run the script again to continue")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _having(lines: Iterable[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [line for line in lines if name in line]


def _portable(config: RunConfig) -> RunConfig:
    """Reduce the folders of the demonstrations and of the cache to their names, which mean something elsewhere."""
    data = config.data
    return replace(config, data=replace(data, path=Path(data.path).name, cache=Path(data.cache).name))


def _parameters(config: RunConfig) -> dict[str, int]:
    with torch.device("meta"):
        parts = config.method.build().parts()
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def _pre_training(config: RunConfig) -> str:
    """The pre-trained networks that the training used. All of them are frozen, and all trained weights start fresh."""
    needs, text, teacher = config.method.needs(), config.method.text, config.method.teacher
    used = [f"{text.kind} (instruction)"] if needs.instruction and text is not None else []
    if teacher is not None and (needs.targets or needs.features):
        role = "image features" if needs.features else "teacher"
        used.append(f"{teacher.kind.replace('_', ' ')} ({role})")
    return ", ".join(used) or "none"


def cpu_seconds(file: Path) -> float | None:
    """The sum over all starts of a run. None where a start was killed before its time was written.

    A line with a shell's message, such as `Killed`, is no time.
    """
    lines = file.read_text().splitlines() if file.is_file() else []
    seconds = [sum(map(float, line.split())) for line in lines if re.fullmatch(r"[\d.]+ [\d.]+", line)]
    return round(sum(seconds), 1) if seconds and len(seconds) == lines.count("start") else None


def _first_observation() -> Observation:
    """The first observation of the tabletop's first trial."""
    env = make_simulator("tabletop")
    try:
        return env.reset(env.trials("in_distribution")[0])
    finally:
        env.close()


def cpu_milliseconds(policy: MethodPolicy, observation: Observation, *, answers: int = 20) -> float:
    """The median CPU time of an answer on one thread, which other processes of the machine lengthen less than its wall
    time.
    """
    torch.set_num_threads(1)
    policy.reset(0)
    times = []
    for _ in range(answers + 3):
        start = time.process_time()
        policy.act(observation)
        times.append(1000 * (time.process_time() - start))
    return round(float(np.median(times[3:])), 1)


def windows_per_second(info: Mapping[str, Any]) -> str:
    """Windows of the joint stage in a second of CPU time, or of wall time where that was not recorded."""
    training, stage = info["training"], info["config"]["stage"]
    if training["cpu_seconds"] is None:
        return f"{training['windows_per_second']:.0f} (wall)"
    return f"{stage['steps'] * stage['batch_size'] / training['cpu_seconds']:.0f}"


def _visual_reliance(run: Path) -> dict[str, dict[str, Any]]:
    """Means of every measure, of all initial observations and of each group of them, with their number."""
    whole = VisualReliance.load(run / "diagnosis" / "visual_reliance.json")
    parts = {"all": whole} | {group: whole.group(group) for group in dict.fromkeys(whole.groups)}
    return {
        name: {"observations": len(part.trials)}
        | {k: round(v, 5) for k, v in part.means().items()}
        | {"error_minus_constant": _difference(part.values["error"], part.values["constant_error"], part.trials)}
        for name, part in parts.items()
    }


def _difference(ours: np.ndarray, theirs: np.ndarray, trials: Sequence[str]) -> list[float]:
    """The mean paired difference with its 95 % interval."""
    estimate = paired_difference(ours, theirs, statistic=np.mean, groups=list(trials))
    return [round(value, 5) for value in (estimate.value, estimate.low, estimate.high)]


def grounding(run: Path) -> dict[str, Any]:
    """The summary of a run's diagnosis, and the instruments that do not apply."""
    header = json.loads((run / "diagnosis" / "diagnosis.json").read_text())
    return {name: header[name] for name in ("not_applicable", "summary")}


def _commit() -> str:
    """The commit of this checkout, with a plus sign where files of the package differ from it."""
    commit, changed = (
        subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "src"])
    )
    return commit + "+" * bool(changed)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {function.__name__: function for function in (rates, steps, choose, chosen, finished, record, table)}
    )

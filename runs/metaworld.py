"""Steps of runs/metaworld.sh that are no commands of agra: finished rows and the tables.

python -m runs.metaworld record RUN ROW ...    write a finished row: row.json and a results file for each kind of noise
python -m runs.metaworld table [FOLDER]        write the tables of the finished rows into the page, or print those of FOLDER
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.source import held_out
from agra.diagnostics.record import estimate
from agra.diagnostics.visual_reliance import InitialObservation, VisualReliance, measure_visual_reliance
from agra.evaluation.measured import FOLDER, MeasuredRow, measured
from agra.evaluation.results import Results, Summary, compare, summarise
from agra.evaluation.statistics import Average, p_text, wilson_interval
from agra.evaluation.task_groups import task_groups
from agra.policies.load import load_policy
from agra.policies.policy import MethodPolicy
from agra.types import ActionNoise, Observation
from runs import methods

PAGE = methods.ROOT / "docs" / "reproductions" / "metaworld.md"
BEGIN, END = "<!-- measured rows: python -m runs.metaworld table -->", "<!-- end of measured rows -->"
MEASURES = ("error", "constant_error", "image_swap_shift", "demonstrated_swap_shift")
Table = list[list[str]]


def record(
    run: tyro.conf.Positional[Path],
    row: tyro.conf.Positional[Path],
    *,
    recipe: str,
    data: Path,
    action_noises: tuple[ActionNoise, ...],
) -> None:
    """Write a finished row of a run whose averaged weights lie in its folder `average`, and results in NOISE.jsonl."""
    policy = load_policy(run / "average", action_noise="zero")
    dataset, initial = first_looks(policy, data)
    assert policy.config.visual_reliance is not None
    reliance = measure_visual_reliance(
        policy,
        initial,
        dataset.action_names,
        policy.config.visual_reliance,
        reads_instruction=policy.config.method.needs_to_act().instruction,
    )
    results = {noise: run / f"{noise}.jsonl" for noise in action_noises}
    content = methods.trained(run, row, recipe=recipe, data=data) | {
        "noises": list(action_noises),
        "demonstrations": {"set": data.name, "episodes": dataset.num_episodes, "held_out": len(initial)},
        "cpu_ms_per_answer": methods.cpu_milliseconds(policy, initial[0].observation),
        "first_looks": by_instruction(reliance),
        "grounding": methods.grounding(run / "average") if (run / "average" / "diagnosis").is_dir() else None,
        "cpu_seconds": {
            "collection": methods.cpu_seconds(data.with_name(f"{data.name}.collect.seconds")),
            "preparation": methods.cpu_seconds(data.with_name(f"{data.name}.prepare.seconds")),
            "evaluation": {noise: methods.cpu_seconds(run / f"{noise}.seconds") for noise in action_noises},
        },
    }
    methods.write_row(row, content, results)


def first_looks(policy: MethodPolicy, data: Path) -> tuple[LeRobotDataset, list[InitialObservation]]:
    """Open the demonstrations, and read the first observations of the held-out ones, which the policy crops itself."""
    config = replace(policy.config.data, path=str(data), crop_rows=None, crop_columns=None)
    dataset = LeRobotDataset.of(config)
    initial = [
        InitialObservation(
            trial=str(episode),
            group=dataset.instruction(episode),
            observation=Observation(
                frame=dataset.clip(episode, np.array([0]))[0],
                state=dataset.states(episode)[0],
                instruction=dataset.instruction(episode),
                embodiment=dataset.embodiment,
            ),
            actions=dataset.actions(episode),
        )
        for episode in held_out(dataset.num_episodes, config.validation_fraction)
    ]
    return dataset, initial


def by_instruction(reliance: VisualReliance) -> dict[str, dict[str, float]]:
    """Mean error, error of a constant and shift by another scene's image, of all and by instruction, in metres.

    The last two need several scenes of an instruction.
    """
    parts = {"all": reliance} | {group: reliance.group(group) for group in dict.fromkeys(reliance.groups)}
    return {
        name: {"scenes": len(part.trials)} | {k: round(v, 5) for k, v in part.means().items() if k in MEASURES}
        for name, part in parts.items()
    }


def table(folder: tyro.conf.Positional[Path] = FOLDER / "metaworld") -> None:
    """Write the tables of the package's rows into the page. Print the tables of rows in another folder."""
    text = markdown(measured(folder.name, folder.parent))
    if folder.resolve() == (FOLDER / "metaworld").resolve():
        methods.replace_between(PAGE, BEGIN, END, text)
        print(PAGE)
    else:
        print(text)


def markdown(rows: Sequence[MeasuredRow]) -> str:
    """Success by group, paired differences, training and cost, first looks, grounding, and success by task."""
    if not rows:
        return "No row is measured yet.\n"
    return methods.in_markdown(
        [_success(rows), _differences(rows), _training(rows), _first_looks(rows), _grounding(rows), _tasks(rows)]
    )


def _success(rows: Sequence[MeasuredRow]) -> Table:
    """Intervals of averages draw tasks, those of all trials together are Wilson's."""
    groups = list(dict.fromkeys(task_groups("metaworld").values()))
    table = _head("success, %", "seed", "noise", *groups, "mean of groups", "mean of tasks", "trials")
    for row, noise, results in _played(rows):
        (summary,) = summarise(results)
        by_group = {group.group: group for group in summary.groups}
        cells = [
            "" if (found := by_group.get(group)) is None else _average(found.average) or f"{100 * found.rate:.0f}"
            for group in groups
        ]
        averages = [_average(summary.group_average), _average(summary.average)]
        table.append([row.name, f"{row.seed}", noise, *cells, *averages, _all_trials(summary)])
    return table


def _differences(rows: Sequence[MeasuredRow]) -> Table:
    """AGRA against WAM, and both against Diffusion Policy, on the same trials."""
    table = _head("difference of success, points", "seed", "noise", "difference", "solved by one alone", "p")
    by_name = {(row.name, row.seed): row for row in rows}
    for row in rows:
        names = [row.name.replace("agra", "wam"), *(["diffusion_policy"] if row.name in ("agra", "wam") else [])]
        others = [by_name[name, row.seed] for name in names if name != row.name and (name, row.seed) in by_name]
        for other, (_, noise, results) in product(others, _played([row])):
            if noise not in other.results:
                continue
            pair = compare(results, other.results[noise]).pairs[-1]
            alone = f"{pair.test.only_a} and {pair.test.only_b} of {pair.a.trials}"
            cells = [_average(pair.difference, sign="+"), alone, p_text(pair.test.p_value)]
            table.append([f"{row.name} minus {other.name}", f"{row.seed}", noise, *cells])
    return table


def _training(rows: Sequence[MeasuredRow]) -> Table:
    table = _head(
        *("training and cost", "seed", "demonstrations", "pre-training", "parameters", "windows", "windows/CPU s"),
        *("held-out action loss", "ms an answer"),
        *("CPU h: collection", "preparation", "training", "evaluation"),
    )
    for row in rows:
        info, seconds = row.info, row.info["cpu_seconds"]
        data = info["demonstrations"]
        hours = [
            seconds["collection"],
            seconds["preparation"],
            info["training"]["cpu_seconds"],
            _total(seconds["evaluation"].values()),
        ]
        table.append(
            [
                *(row.name, f"{row.seed}", f"{data['set']}: {data['episodes'] - data['held_out']:,}"),
                *(info["pre_training"], f"{sum(info['parameters'].values()):,}", f"{info['windows']:,}"),
                methods.windows_per_second(info),
                f"{info['training']['held_out'][-1][methods.CHOSEN_BY]:.3f}",
                f"{info['cpu_ms_per_answer']:.0f}",
                *("unknown" if value is None else f"{value / 3600:.2f}" for value in hours),
            ]
        )
    return table


def _grounding(rows: Sequence[MeasuredRow]) -> Table:
    """Attention (means) and sensitivity ratios (medians) on the masks of the experts' moments, with 95 % intervals."""
    kinds = ("mean", "zero", "shuffle", "swap")
    table = _head("grounding", "seed", "attention in mask, %", "centroid error", *(f"ratio, {kind}" for kind in kinds))
    for row in rows:
        if (grounding := row.info.get("grounding")) is None:
            continue
        summary = grounding["summary"]
        shown = [(summary["in_mask_ratio"], 100), (summary["centroid_error"], 1)]
        shown += [(summary[f"sensitivity_{kind}"]["ratio"], 1) for kind in kinds]
        cells = [
            f"{scale * e.value:.3g} [{scale * e.low:.3g}, {scale * e.high:.3g}]" if e.count else "-"
            for e, scale in ((estimate(entry), scale) for entry, scale in shown)
        ]
        table.append([row.name, f"{row.seed}", *cells])
    return table


def _first_looks(rows: Sequence[MeasuredRow]) -> Table:
    """Error of the displacement that the first chunk asks for, and of a constant.

    Then its shift under another scene's image, of the demonstrations'.
    """
    table = _head("first look at held-out scenes, cm", *(f"{row.name}, seed {row.seed}" for row in rows))
    for name in dict.fromkeys(name for row in rows for name in row.info["first_looks"]):
        cells = []
        for row in rows:
            found: Mapping[str, float] = row.info["first_looks"].get(name, {})
            values = [f"{100 * found[measure]:.1f}" if measure in found else "-" for measure in MEASURES]
            cells.append("{} / {}, swap {} of {}".format(*values))
        table.append([name, *cells])
    return table


def _tasks(rows: Sequence[MeasuredRow]) -> Table:
    """Successes by task with Wilson's interval in per cent, tasks by difficulty."""
    played = list(_played(rows))
    table = _head("task", "group", *(f"{row.name}, seed {row.seed}, {noise}" for row, noise, _ in played))
    present = {trial.task for _, _, results in played for trial in results.trials}
    for task, group in task_groups("metaworld").items():
        if task not in present:
            continue
        cells = []
        for _, _, results in played:
            outcomes = [trial.success for trial in results.trials if trial.task == task]
            cells.append(_wilson(sum(outcomes), len(outcomes)) if outcomes else "")
        table.append([task.removesuffix("-v3"), group, *cells])
    return table


def _played(rows: Sequence[MeasuredRow]) -> list[tuple[MeasuredRow, ActionNoise, Results]]:
    return [(row, noise, results) for row in rows for noise, results in row.results.items()]


def _head(*names: str) -> Table:
    return [list(names), ["---"] * len(names)]


def _average(average: Average | None, *, sign: str = "") -> str:
    if average is None:
        return ""
    value, low, high = (f"{100 * v:{sign}.0f}" for v in average[:3])
    return f"{value} [{low}, {high}]"


def _all_trials(summary: Summary) -> str:
    return _wilson(summary.successes, summary.trials)


def _wilson(successes: int, trials: int) -> str:
    low, high = (f"{100 * value:.0f}" for value in wilson_interval(successes, trials))
    return f"{successes} of {trials} [{low}, {high}]"


def _total(values: Any) -> float | None:
    """The sum, None where a part is unknown."""
    parts = list(values)
    return None if None in parts else sum(parts)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({function.__name__: function for function in (record, table)})

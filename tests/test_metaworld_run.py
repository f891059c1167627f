"""The recipes and the script of runs/metaworld.sh, and the tables of its page."""

import json
import os
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from agra.cli.arguments import recipe_arguments
from agra.diagnostics.visual_reliance import VisualReliance
from agra.evaluation.measured import measured
from agra.evaluation.task_groups import task_groups
from agra.recipes import RECIPES, metaworld, metaworld_diffusion_policy, metaworld_wam
from runs import metaworld as page
from runs.methods import ROOT
from tests.evaluation.test_results import make_results, write
from tests.test_runs import NoOptions

# --- recipes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metaworld", "metaworld_wam", "metaworld_diffusion_policy"])
def test_a_recipe_reads_the_workspace_and_answers_rows_of_four_actions(name):
    """Rows 72 to 408 and columns 144 to 480 of 480, on frames of 320."""
    config = RECIPES[name]()
    assert config.data.crop_rows == (72 * 320 // 480, 408 * 320 // 480)
    assert config.data.crop_columns == (144 * 320 // 480, 480 * 320 // 480)
    shapes = config.method.shapes
    assert (shapes.frame_size, shapes.horizon, shapes.state_dim, shapes.action_dim) == ((112, 112), 8, 4, 4 * 4)
    assert (config.data.early_window_fraction, config.data.early_window_steps) == (0.4, 3)
    assert (config.stage.ema_decay, config.stage.batch_size, config.data.shift) == (0.999, 32, 0)


def test_chunk_and_latent_frames_end_at_the_same_time():
    config = metaworld()
    assert config.method.needs().last_frame * config.data.frame_stride == config.method.shapes.horizon
    assert config.method.model.latent_shape == (32, 2, 14, 14)


def test_the_target_is_the_displacement_of_a_chunk():
    names = [f"{name}_step{step}" for step in range(4) for name in ("hand_dx", "hand_dy", "hand_dz", "gripper_effort")]
    actions = np.zeros((8, 16))
    actions[:, 0::4], actions[:, 1::4], actions[:, 3::4] = 1, -0.5, 1
    assert metaworld().visual_reliance.target(actions, names) == pytest.approx([0.32, -0.16, 0])


def test_the_arms_differ_in_what_their_names_say():
    agra, wam, diffusion = metaworld(), metaworld_wam(), metaworld_diffusion_policy()
    assert agra.method.model == wam.method.model
    assert agra.stage == wam.stage
    assert agra.method.aligns
    assert not wam.method.aligns
    assert wam.method.objective.video_weight == agra.method.objective.video_weight == 0.1
    assert (diffusion.stage.steps, diffusion.stage.batch_size) == (wam.stage.steps, wam.stage.batch_size)
    assert diffusion.method.acts_on_average


# --- the script ---------------------------------------------------------------------------------------------------------

RECORDS = """#!/usr/bin/env bash
# Stands in for agra, for python and for the simulator's python: records its command line and makes what the next steps read.
echo "$(basename "$0") $*" >> "$CALLS"
if [ -n "$FAIL" ] && [[ "$*" == *"$FAIL"* ]]; then exit 1; fi
while [ $# -gt 0 ]; do
  case "$1" in
    collect) set="$4"; mkdir -p "$set" && touch "$set/collection.json" ;;
    export) mkdir -p "$4" ;;
    probes) probes=1 ;;
    --output) if [ -n "${probes:-}" ]; then mkdir -p "$2" && touch "$2/samples.json"; fi ;;
    record) mkdir -p "$3" && touch "$3/row.json" ;;
  esac
  shift
done
"""


@pytest.fixture
def play(tmp_path):
    """Run the script with stand-ins. Returns the exit code and the commands."""
    (tmp_path / "runs").mkdir()
    for script in ("metaworld.sh", "rows.sh"):
        shutil.copy(ROOT / "runs" / script, tmp_path / "runs")
    for name in ("agra", "python", "simulator"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(RECORDS)
        path.chmod(0o755)
    calls = tmp_path / "calls"

    def run(**options):
        calls.write_text("")
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "FAIL": "",
        }
        environment |= {"SIMULATOR": str(tmp_path / "bin" / "simulator"), "LANES": "1"} | options
        command = ["bash", str(tmp_path / "runs" / "metaworld.sh")]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        return done.returncode, calls.read_text().splitlines()

    return run


def test_the_script_goes_on_after_a_failure_and_skips_finished_rows(play):
    code, said = play(ROWS="wam_0", FAIL="evaluate")
    assert code != 0
    assert said[-1].startswith("agra evaluate outputs/metaworld/runs/wam_0/average")
    (probed,) = [line for line in said if line.startswith("agra probes")]
    assert "--simulator metaworld_20hz " in probed
    assert probed.endswith("--samples 100 --output outputs/metaworld/probes")
    code, said = play(ROWS="wam_0", DEVICE="cuda")
    assert code == 0
    # The set and the samples of the diagnosis are there.
    prepared, trained, finished, exported, diagnosed, zero, random, recorded, table, leaderboard = said
    assert prepared.startswith("agra prepare metaworld_wam --data.path outputs/metaworld/clean")
    assert "--output outputs/metaworld/runs/wam_0 --stage.steps 12000 --stage.seed 0 " in trained
    assert "--device cuda --data.validation-fraction 0.137931" in trained  # 8 of 58
    assert finished == "python runs/methods.py finished outputs/metaworld/runs/wam_0"
    assert exported.endswith("--output outputs/metaworld/runs/wam_0/average --ema")
    assert diagnosed.startswith("agra diagnose outputs/metaworld/runs/wam_0/average --probes outputs/metaworld/probes ")
    assert "--limit 500 --execute-steps 4 --action-noise zero " in zero
    assert zero.endswith("--output outputs/metaworld/runs/wam_0/zero.jsonl")
    assert "--action-noise random" in random
    assert recorded.endswith("--recipe metaworld_wam --data outputs/metaworld/clean --action-noises zero random")
    assert table == "python -m runs.metaworld table src/agra/evaluation/measured/metaworld"
    assert leaderboard == "agra leaderboard --benchmark metaworld"
    assert len(play(ROWS="wam_0")[1]) == 2


def test_a_few_tasks_have_data_and_rows_of_their_own(play):
    budget = {
        "PER_TASK": "3",
        "HELD_OUT": "1",
        "STEPS": "7",
        "TRIALS": "2",
        "NOISES": "zero",
        "FLAGS": "--data.shift 2",
    }
    code, said = play(TASKS="reach-v3 push-v3", ROWS="diffusion_policy_0 wam_noisy_0", **budget)
    assert code == 0
    clean, noisy = (line for line in said if line.startswith("simulator"))
    assert clean.endswith("--output outputs/metaworld-tasks/clean --tasks reach-v3 push-v3 --per-task 4 --workers 1")
    assert noisy.endswith("--noise hand_d* 0.25")
    flags = "--data.validation-fraction 0.250000 --data.shift 2"
    assert all(flags in line for line in said if line.startswith(("agra prepare", "agra train")))
    (probed,) = [line for line in said if line.startswith("agra probes")]
    assert "--tasks reach-v3 push-v3 --samples 4 " in probed
    diagnosed = [line for line in said if line.startswith("agra diagnose")]
    assert len(diagnosed) == 1  # Diffusion Policy has no token grid
    evaluated = [line for line in said if line.startswith("agra evaluate")]
    assert all("--tasks reach-v3 push-v3 --limit 4 " in line for line in evaluated)
    assert len(evaluated) == 2
    assert said[-1] == "python -m runs.metaworld table outputs/metaworld-tasks/runs/rows"


def test_the_rows_of_the_script_are_what_their_names_say():
    script = (ROOT / "runs" / "metaworld.sh").read_text()
    function = script[script.index("rows() {") : script.index("source runs/rows.sh")]
    said = subprocess.run(
        ["bash", "-c", f"{function}\nrows"],
        env={**os.environ, "STEPS": "9", "SHORT_STEPS": "5"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = {}
    for line in said.splitlines():
        name, seed, steps, data, *arguments = line.split()
        assert (name, seed) not in rows
        assert int(steps) == (5 if "short" in name else 9)
        assert data == ("noisy" if "noisy" in name else "clean")
        rows[name, seed] = recipe_arguments("train", arguments, NoOptions)[1]
    assert len(rows) == 3 + 6 + 1 + 2
    for (name, _), config in rows.items():
        assert config.method.kind == ("diffusion_policy" if name == "diffusion_policy" else "wam")
        assert getattr(config.method, "aligns", False) == name.startswith("agra")
        assert (config.data.shift > 0) == ("shift" in name)


# --- the page -----------------------------------------------------------------------------------------------------------


def results(policy, solved, **header):
    """Two trials of each task: both solved, the first one, or none."""
    outcomes = "".join({2: "11", 1: "10", 0: "00"}[solved.get(task, 0)] for task in task_groups("metaworld"))
    made = make_results(policy, {"in_distribution": outcomes}, simulator="metaworld", **header)
    named = zip(made.trials, [task for task in task_groups("metaworld") for _ in range(2)], strict=True)
    return replace(made, trials=tuple(replace(trial, task=task) for trial, task in named))


def estimate(value, low, high):
    return {"value": value, "low": low, "high": high, "count": 0 if value is None else 40, "groups": 40}


GROUNDING = {
    "summary": {
        "in_mask_ratio": estimate(0.25, 0.2, 0.3),
        "centroid_error": estimate(0.8, 0.7, 0.9),
        **{f"sensitivity_{kind}": {"ratio": estimate(2.0, 1.5, 2.5)} for kind in ("mean", "zero", "shuffle")},
        "sensitivity_swap": {"ratio": estimate(None, None, None)},
    }
}


@pytest.fixture
def rows(tmp_path):
    easy = {task: 2 for task, group in task_groups("metaworld").items() if group == "easy"}
    for name, solved in (("agra", easy | {"push-v3": 1}), ("wam", easy)):
        folder = tmp_path / "metaworld" / f"{name}_0"
        folder.mkdir(parents=True)
        info = {
            "name": name,
            "seed": 0,
            "noises": ["zero"],
            "pre_training": "text",
            "parameters": {"a": 1000, "b": 500},
            "windows": 64,
            "config": {"stage": {"steps": 2, "batch_size": 32}},
            "training": {"cpu_seconds": 16.0, "held_out": [{"validation/action_loss": 0.5}]},
            "demonstrations": {"set": "clean", "episodes": 2750, "held_out": 250},
            "cpu_ms_per_answer": 28.4,
            "first_looks": {
                "all": {
                    "scenes": 5,
                    "error": 0.02,
                    "constant_error": 0.05,
                    "image_swap_shift": 0.03,
                    "demonstrated_swap_shift": 0.04,
                }
            },
            "grounding": GROUNDING if name == "agra" else None,
            "cpu_seconds": {"collection": 3600.0, "preparation": None, "evaluation": {"zero": 1800.0}},
        }
        (folder / "row.json").write_text(json.dumps(info))
        write(folder / "zero.jsonl", results(f"{name}_0", solved, policy_settings={"action_noise": "zero"}))
    return measured("metaworld", tmp_path)


def test_the_tables(rows):
    """56 of 100 trials: 28 of 50 tasks, one of four groups."""
    success, difference, training, looks, grounding, tasks = page.markdown(rows).split("\n\n")
    wam = success.splitlines()[3].split(" | ")
    assert wam[:4] == ["| wam", "0", "zero", "100 [88, 100]"]
    assert wam[7].startswith("25 [22, 41]")
    assert wam[8].startswith("56 [")
    assert wam[9].startswith("56 of 100 [46, 65]")  # Wilson's
    assert "| agra minus wam | 0 | zero | +1 [" in difference
    assert "| 1 and 0 of 100 | 1.000 |" in difference
    assert "| clean: 2,500 | text | 1,500 | 64 | 4 | 0.500 | 28 | 1.00 | unknown | 0.00 | 0.50 |" in training
    assert "| all | 2.0 / 5.0, swap 3.0 of 4.0 | 2.0 / 5.0, swap 3.0 of 4.0 |" in looks
    assert grounding.splitlines()[2:] == [
        "| agra | 0 | 25 [20, 30] | 0.8 [0.7, 0.9] |" + " 2 [1.5, 2.5] |" * 3 + " - |"
    ]
    assert "| push | hard | 1 of 2 [9, 91] | 0 of 2 [0, 66] |" in tasks
    assert len(tasks.strip().splitlines()) == 2 + 50


def test_first_looks_by_instruction():
    values = {"error": np.array([1.0, 3.0, 5.0]), "constant_error": np.array([2.0, 2.0, np.nan])}
    nothing = {
        name: np.full(3, np.nan) for name in ("image_mask_shift", "instruction_swap_shift", "follows_instruction")
    }
    swaps = {"image_swap_shift": np.array([0.5, 1.5, np.nan])}
    looks = page.by_instruction(
        VisualReliance(trials=("0", "1", "2"), groups=("a", "a", "b"), values=values | nothing | swaps)
    )
    assert looks["all"] == {"scenes": 3, "error": 3.0, "constant_error": 2.0, "image_swap_shift": 1.0}
    assert looks["a"] == {"scenes": 2, "error": 2.0, "constant_error": 2.0, "image_swap_shift": 1.0}
    assert looks["b"] == {"scenes": 1, "error": 5.0}


def test_the_page_holds_the_tables_of_the_rows():
    text = page.PAGE.read_text()
    assert text.split(page.BEGIN)[1].split(page.END)[0].strip() == page.markdown(measured("metaworld")).strip()

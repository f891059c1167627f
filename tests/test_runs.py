"""The scripts under runs/ parse, and use commands, recipes and flags that exist."""

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from agra.checkpoints.folder import BUNDLED
from agra.cli.arguments import recipe_arguments
from agra.cli.main import COMMANDS
from agra.cli.renamed import _CONFIG, _FLAGS
from agra.data.lerobot.checksums import Seal
from agra.data.lerobot.writer import write_dataset
from agra.evaluation.measured import measured
from agra.evaluation.tables import methods_tables
from agra.methods.wam import Pass
from agra.policies.load import load_policy
from agra.recipes import RECIPES
from agra.simulation import make_simulator
from agra.stages import Stage
from agra.training.memory_estimate import flops_per_sample
from agra.training.parallelize import ParallelConfig
from agra.types import Embodiment, Episode
from runs import methods, noise

RUNS = sorted(path for path in (Path(__file__).parent.parent / "runs").iterdir() if path.is_file())


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """Remove the scripts' settings, such as BASE and OUT, from the environment: they name folders of the user."""
    for name in {name for path in RUNS for name in re.findall(r"\$\{([A-Z_]+):-", path.read_text())}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_a_script_parses_and_names_what_exists(path):
    text = path.read_text()
    if path.suffix == ".py":
        compile(text, path, "exec")
        scripts = "".join(script.read_text() for script in RUNS if script.suffix == ".sh")
        assert path.name in scripts or f"-m runs.{path.stem}" in scripts
        return
    if path.suffix == ".yaml":
        kinds = [document["kind"] for document in yaml.safe_load_all(text)]
        assert kinds == ["Service", "Job"]
    else:
        subprocess.run(["bash", "-n", str(path)], check=True)
    commands = re.findall(r"(?:^\s*|exec |-m |\|\| )agra(?:\.cli)? ([a-z]\w*)(?! \d)", text, re.M)
    assert commands or path.name == "rows.sh"  # which other scripts source
    assert set(commands) <= COMMANDS.keys()
    assert set(re.findall(r"\b(?:train|prepare|plan) (agra_\w+|wam\w*|tiny\w*)", text)) <= RECIPES.keys()
    renamed = {*_CONFIG, *(flag for flags in _FLAGS.values() for flag in flags)}
    assert not set(re.findall(r"--[\w.-]+", text)) & renamed
    known = {f"--parallel.{field.name.replace('_', '-')}" for field in fields(ParallelConfig)}
    assert set(re.findall(r"--parallel\.[\w-]+", text)) <= known


def job():
    """The pod of the Kubernetes Job and its container."""
    _, described = yaml.safe_load_all((methods.ROOT / "runs" / "kubernetes.yaml").read_text())
    pod = described["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


@pytest.fixture
def start_pod(tmp_path):
    """Start the container's command with a shell script in torchrun's place. Its folder is `tmp_path`/shared."""
    _, container = job()
    (tmp_path / "shared" / "joint").mkdir(parents=True)
    pods = []

    def start(torchrun):
        script = tmp_path / "torchrun"
        script.write_text(f"#!/usr/bin/env bash\ncd {tmp_path}\n{torchrun}\n")
        script.chmod(0o755)
        text = container["args"][0].replace("/shared", str(tmp_path / "shared"))
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "0"}
        pods.append(subprocess.Popen([*container["command"], text], env=environment))
        return pods[-1]

    yield start
    for pod in pods:
        pod.kill()
        pod.wait()


def test_a_pod_is_finished_with_the_last_step_alone(start_pod, tmp_path):
    """torchrun exits with code 0 after SIGTERM too. A finished pod of an indexed Job is never restarted."""
    assert start_pod("exit 0").wait(timeout=30) != 0
    assert start_pod("mkdir shared/joint/step_080000").wait(timeout=30) == 0
    assert start_pod("touch started").wait(timeout=30) == 0
    assert not (tmp_path / "started").exists(), "a restarted pod would wait for the finished ones"


def test_an_evicted_pod_waits_until_its_processes_have_saved(start_pod, tmp_path):
    pod = start_pod("trap 'sleep 0.3; touch saved; exit 0' TERM\ntouch started\nwhile true; do sleep 0.05; done")
    until = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.01)
    pod.terminate()
    assert pod.wait(timeout=30) != 0
    assert (tmp_path / "saved").exists()


def test_torchrun_leaves_time_for_a_checkpoint():
    pod, container = job()
    (seconds,) = [int(v["value"]) for v in container["env"] if v["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert pod["terminationGracePeriodSeconds"] - 30 <= seconds < pod["terminationGracePeriodSeconds"]
    assert f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={seconds}" in (methods.ROOT / "runs" / "gr1.sh").read_text()


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The flags of the config alone."""


def test_the_arms_of_the_comparison_are_what_their_names_say():
    """Every line of comparison.sh: NAME SEED RECIPE [flags of the config]."""
    script = next(path for path in RUNS if path.name == "comparison.sh").read_text()
    lines = [line.split() for line in script.split("<<'ARMS'\n")[1].split("\nARMS")[0].splitlines()]
    arms = {f"{name}_{seed}": recipe_arguments("train", arguments, NoOptions)[1] for name, seed, *arguments in lines}
    assert {name for name, config in arms.items() if config.method.alignment is None} == {
        "wam_0", "wam_1", "wam_2", "freeze_backbone_0"
    }  # fmt: skip
    frozen, video = arms["freeze_backbone_0"], arms["agra_video_pass_0"].method.objective
    assert (frozen.stage.frozen, frozen.method.objective.video_weight) == (("video_dit",), 0)
    assert (video.guidance_pass, video.aligned_pass) == (Pass.CONDITIONING, Pass.DENOISING)
    shared = arms["agra_shared_denoising_pass_0"].method.objective
    assert (shared.guidance_pass, shared.aligned_pass) == (Pass.DENOISING, Pass.DENOISING)
    assert video.video_batch_fraction == shared.video_batch_fraction == 1


def test_the_arms_of_the_study_are_what_their_names_say():
    """Every line of study.sh: NAME SEED STEPS DATA RECIPE [flags of the config]."""
    script = next(path for path in RUNS if path.name == "study.sh").read_text()
    rows = re.search(r"^rows\(\) \{.*?^\}", script, re.S | re.M)
    assert rows is not None
    said = subprocess.run(["bash", "-c", f"{rows.group(0)}\nrows"], capture_output=True, text=True, check=True).stdout
    arms = {}
    for line in said.splitlines():
        name, seed, steps, data, *arguments = line.split()
        assert (name, seed) not in arms
        assert data in ("robot", "few", "both")
        assert int(steps) == (2400 if name in ("wam", "agra") else 1600)
        arms[name, seed] = recipe_arguments("train", arguments, NoOptions)[1]
    assert len(arms) == 8 + 12 + 12 + 3 + 15
    for (name, _), config in arms.items():
        alignment, objective = config.method.alignment, config.method.objective
        assert (alignment is None) == name.startswith(("wam", "freeze"))
        assert (objective.video_weight == 0) == ("no_video_loss" in name or name.startswith("freeze"))
        assert (config.data.target_steps is None) == ("whole_episode" in name)
        if "aligns_layer" in name:
            assert alignment.layers == (int(name[-1]),)
        if "reads_layer" in name:
            assert set(config.method.model.bridge.layers) == {int(name[-1])}
    assert not arms["agra_short_observation", "0"].method.alignment.include_future
    assert arms["agra_short_irepa", "0"].method.alignment.spatial_normalization
    assert arms["agra_short_class_token", "0"].method.alignment.teacher.token == "class"
    assert arms["agra_short_video_pass", "0"].method.objective.guidance_pass is Pass.CONDITIONING
    assert arms["agra_short_shared_pass", "0"].method.objective.guidance_pass is Pass.DENOISING


STAND_IN = """#!/usr/bin/env bash
# Records its command line and makes the files that the next steps read.
echo "$*" >> "$CALLS"
if [ -n "$FAIL" ] && [[ "$*" = "$FAIL"* ]]; then exit 1; fi
case "$1" in
  diagnose)
    case "$2" in tabletop-*) folder="outputs/$2" ;; *) folder="$2" ;; esac
    mkdir -p "$folder/diagnosis" && echo demonstrated_swap_shift >"$folder/diagnosis/visual_reliance.json" ;;
  export) mkdir -p "$4" ;;
esac
"""


HELPER = """#!/usr/bin/env bash
# Stands in for python runs/methods.py.
shift
echo "$*" >> "$CALLS"
if [ -n "$FAIL" ] && [[ "$*" = "$FAIL"* ]]; then exit 1; fi
case "$1" in
  rates) echo 0.1 0.3 0.9 ;;
  steps) echo 5800 ;;
  choose) echo 0.3 ;;
  chosen) if [ -f "$2/row.json" ]; then echo 0.9; fi ;; # a row has its grid
  record) mkdir -p "$3" && touch "$3/row.json" ;;
esac
"""


@pytest.mark.parametrize("script", ["quickstart.sh", "tabletop.sh"])
def test_a_script_goes_on_after_a_failure_and_repeats_nothing_costly_when_finished(script, tmp_path):
    """With a stand-in for `agra`. Its commands resume by themselves. The script must let them."""
    (tmp_path / "runs").mkdir()
    shutil.copy(RUNS[0].parent / script, tmp_path / "runs" / script)
    for name, content in (("agra", STAND_IN), ("python", HELPER)):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(content)
        command.chmod(0o755)
    calls = tmp_path / "calls"

    def play(fail=""):
        calls.write_text("")
        environment = {
            **os.environ,
            "PATH": f"{command.parent}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "FAIL": fail,
        }
        done = subprocess.run(["bash", str(tmp_path / "runs" / script)], env=environment, check=False)
        return done.returncode, calls.read_text().splitlines()

    # `finished` fails after a training that SIGTERM stopped.
    for step in ("collect", "prepare", "train", "finished", "evaluate", "diagnose", "report"):
        code, said = play(fail=step)
        assert code != 0
        assert said[-1].startswith(step)
    code, said = play()
    assert code == 0
    again, repeated = play()
    assert again == 0
    assert not [line for line in repeated if line.startswith(("diagnose", "export"))]
    assert repeated[-1].startswith("report")


@pytest.fixture
def play(tmp_path):
    """Run methods.sh with stand-ins for `agra` and the helper script. Returns its exit status, their calls and its errors."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "outputs/tabletop/demonstrations").mkdir(parents=True)
    for script in ("methods.sh", "rows.sh"):
        shutil.copy(RUNS[0].parent / script, tmp_path / "runs")
    for name, content in (("agra", STAND_IN), ("python", HELPER)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)
    calls = tmp_path / "calls"

    def play(**options):
        calls.write_text("")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "CALLS": str(calls), "FAIL": "", "LANES": "1", **options}
        command = ["bash", str(tmp_path / "runs" / "methods.sh")]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        return done.returncode, calls.read_text().splitlines(), done.stderr

    return play


def test_the_comparison_of_methods_goes_on_after_a_failure_and_skips_finished_rows(play, tmp_path):
    measured = tmp_path / "src/agra/evaluation/measured/tabletop"
    code, said, _ = play(ROWS="diffusion_policy_0", FAIL="evaluate")
    assert code != 0
    assert said[-1].startswith("evaluate outputs/methods/diffusion_policy_0")
    code, said, _ = play(ROWS="diffusion_policy_0", DEVICE="cuda")
    assert code == 0
    trainings = [line for line in said if line.startswith("train tiny_diffusion_policy")]
    rates = [line.split("--stage.learning-rate ")[1].split()[0] for line in trainings]
    assert rates == ["0.1", "0.3", "0.9", "0.3"]
    assert "--stage.steps 300 " in trainings[0]
    assert "--stage.steps 2900 --stage.seed 0 " in trainings[-1]
    assert all("--device cuda" in line for line in trainings)
    assert [line.split("--output ")[1].split()[0] for line in said if line.startswith("evaluate")] == [
        "outputs/methods/diffusion_policy_0/results.jsonl",
        "outputs/methods/diffusion_policy_0/zero.jsonl",
    ]
    start, used = (tmp_path / "outputs/methods/diffusion_policy_0.seconds").read_text().splitlines()[-2:]
    assert start == "start"
    assert len([float(part) for part in used.split()]) == 2
    assert [path.parent.name for path in measured.glob("*/row.json")] == ["diffusion_policy_0"]
    assert play(ROWS="diffusion_policy_0")[1] == ["table", "leaderboard --benchmark tabletop"]

    code, said, _ = play()  # all rows that are left
    assert code == 0
    assert not [line for line in said if "outputs/methods/diffusion_policy_0" in line]
    adapted = [line for line in said if line.startswith("train tiny_dit4dit ")]
    assert "--stage adapt" in adapted[0]
    equal, compute = [[line for line in adapted if ("_compute" in line) == kind] for kind in (False, True)]
    assert "--stage.steps 500 " in equal[0]
    assert all("--init-from outputs/methods/dit4dit_adapt" in line for line in equal[1:])
    assert "--stage.steps 2400 " in equal[-1]
    assert adapted == equal + compute  # the rates are those of the first ones, without a grid of their own
    assert [line.split("--stage.steps ")[1].split()[0] for line in compute] == ["1000", "4800"]
    assert "--stage.learning-rate 0.9 " in compute[-1]
    assert "export tabletop-wam --output outputs/methods/wam_0" in said
    assert not [line for line in said if line.startswith("train tiny ")]  # the bundled pair is not trained again


@pytest.mark.parametrize("script", ["methods.sh", "study.sh", "metaworld.sh"])
def test_an_unknown_row_is_refused(script, tmp_path):
    """A name without its seed too. Nothing is played and no page is written: no command of the script is there."""
    (tmp_path / "runs").mkdir()
    for name in (script, "rows.sh"):
        shutil.copy(RUNS[0].parent / name, tmp_path / "runs")
    environment = {**os.environ, "ROWS": "wam", "SIMULATOR": shutil.which("true")}
    command = ["bash", str(tmp_path / "runs" / script)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "ROWS: expected names of rows with their seed, got wam; available: wam_" in done.stderr
    assert done.stdout == ""


def test_a_row_that_fails_does_not_stop_the_others(play, tmp_path):
    code, _, _ = play(FAIL="train tiny_vla ")
    assert code != 0
    finished = {path.parent.name for path in (tmp_path / "src/agra/evaluation/measured/tabletop").glob("*/row.json")}
    assert {"uwm_0", "lda_scratch_0", "dit4dit_compute_0", "lda_scratch_compute_0"} <= finished
    assert not finished & {"vla_0", "vla_compute_0"}


def test_a_row_of_equal_compute_needs_the_rate_of_its_method(play):
    code, said, errors = play(ROWS="flare_compute_0")
    assert code != 0
    assert "flare_compute_0: its learning rate is that of row flare_0, whose grid of rates is not finished" in errors
    assert not [line for line in said if line.startswith("train")]


def test_a_further_seed_takes_the_rate_of_seed_0_and_has_an_adapt_stage_of_its_own(play, tmp_path):
    code, _, errors = play(SEEDS="1", ROWS="dit4dit_1")
    assert code != 0
    assert "dit4dit_1: its learning rate is that of row dit4dit_0, whose grid of rates is not finished" in errors
    code, said, _ = play(SEEDS="0 1", ROWS="dit4dit_0 dit4dit_1 wam_1")
    assert code == 0
    adapted = [line for line in said if "--stage adapt" in line]
    assert [(line.split("--output ")[1].split()[0], line.split("--stage.seed ")[1].split()[0]) for line in adapted] == [
        ("outputs/methods/dit4dit_adapt", "0"),
        ("outputs/methods/wam_adapt_1", "1"),
        ("outputs/methods/dit4dit_adapt_1", "1"),
    ]
    first, second = (
        [line for line in said if f"--output outputs/methods/{row} " in line] for row in ("wam_1", "dit4dit_1")
    )
    assert "--init-from outputs/methods/wam_adapt_1" in first[0]
    assert "--stage.learning-rate 0.3 " in first[0]  # the recipe's
    assert "--stage.seed 1 --stage.learning-rate 0.9 " in second[0]
    assert len([line for line in said if "_grid/" in line and line.startswith("train")]) == 3  # of dit4dit_0 alone


def test_a_row_is_tested_against_the_references_of_its_own_seed():
    rows = [row for row in measured("tabletop") if row.seed == 0 and row.name in ("wam", "agra", "uwm")]
    several = [*rows, *(replace(row, seed=1) for row in rows if row.name != "agra")]
    (heads, _, *lines), count = methods._tests_table(several)
    assert heads[3:] == [f"method alone / {name} of its seed alone, p (Holm)" for name in ("agra", "wam")]
    assert count == 2 * 3 + 2 * 1  # three pairs of seed 0 and one of seed 1, under two kinds of noise
    shown = {tuple(line[:3]): line[3:] for line in lines}
    assert shown["uwm", "1", "zero"] == ["", shown["uwm", "0", "zero"][1]]
    assert shown["wam", "1", "zero"] == ["", ""]
    assert [len(line) for line in lines] == [5] * 2 * len(several)
    (second,) = [table for table in methods_tables(several) if str(table.title).startswith("against wam, seed 1")]
    assert second.row_count == 2  # uwm of seed 1


def test_holm():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    values = [0.04, 0.001, 0.03, 0.9, 0.03, 0.2]
    assert methods.holm(values) == pytest.approx(multitest.multipletests(values, method="holm")[1])
    assert methods.holm([0.02]) == [0.02]
    assert methods.holm([]) == []


def test_the_table_of_tests_says_how_many_it_holds():
    rows = [row for row in measured("tabletop") if row.seed == 0 and row.name in ("wam", "agra", "uwm")]
    text = methods.markdown(rows)
    assert "The last table holds 6 different tests." in text
    (line,) = re.findall(r"^\| wam \| 0 \| zero \| (\d.*)$", text, re.M)[-1:]
    assert line.startswith("13 / 29, 0.020 (0.020)")  # the largest p of all, which stands in AGRA's line too


def test_equal_compute(capsys):
    """The WAM's adapt stage costs a twelfth of its joint stage, so other methods have fewer steps than 2,900 of its joint steps allow."""
    flops = {
        (name, stage): flops_per_sample(RECIPES[name](stage))
        for name, stage in (("tiny_wam", Stage.ADAPT), ("tiny_wam", Stage.JOINT), ("tiny_vla", Stage.JOINT))
    }
    budget = 500 * flops["tiny_wam", Stage.ADAPT] + 2400 * flops["tiny_wam", Stage.JOINT]
    assert budget < 0.86 * 2900 * flops["tiny_wam", Stage.JOINT]
    methods.steps("tiny_vla", "scratch")
    methods.steps("tiny_wam", "adapt")
    vla, wam = map(int, capsys.readouterr().out.split())
    assert vla * flops["tiny_vla", Stage.JOINT] == pytest.approx(budget, rel=1e-3)
    assert wam == 2900


def test_every_row_of_the_comparison_names_a_recipe_and_a_start():
    """Rows of seed 0 and of another one, which trains what is bundled for seed 0."""
    script = next(path for path in RUNS if path.name == "methods.sh").read_text()
    function = re.search(r"^rows\(\) \{.*?^\}", script, re.S | re.M)
    assert function is not None
    command = ["bash", "-c", f"SEEDS='0 2'\n{function.group(0)}\nrows"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in said.splitlines()]
    assert len(rows) == 2 * len({name for name, *_ in rows}) == 2 * 22
    assert {seed for _, seed, *_ in rows} == {"0", "2"}
    for _, seed, recipe, start in rows:
        stages = {Stage.ADAPT, Stage.JOINT} if start == "adapt" else {Stage.JOINT}
        assert start in ("adapt", "scratch") or (seed == "0" and (BUNDLED / start).is_dir())
        assert all(RECIPES[recipe](stage).stage.batch_size == 32 for stage in stages)


def test_the_grid_of_rates(tmp_path, capsys):
    """The lowest held-out action loss wins. An unfinished run ends the program."""
    config = RECIPES["tiny_wam"](Stage.JOINT)
    stage = replace(config.stage, steps=300)

    def write(rate, loss, step=300):
        run = tmp_path / "grid" / rate
        (run / "step_000300").mkdir(parents=True, exist_ok=True)
        rows = [{"step": 10, "loss": 1.0}, {"step": 300, methods.CHOSEN_BY: loss, "visual_reliance/error": 0.1}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "step_000300" / "config.json").write_text(replace(config, stage=stage).to_json())
        (run / "step_000300" / "trainer.json").write_text(json.dumps({"step": step}))

    for rate, loss in (("0.0045", 0.5), ("0.0015", 0.4), ("0.0005", 0.6)):
        write(rate, loss)
    row = tmp_path / "wam_0"
    methods.chosen(row)
    assert capsys.readouterr().out == ""
    methods.choose(tmp_path / "grid", row)
    methods.chosen(row)
    assert capsys.readouterr().out.split() == ["0.0015", "0.0015"]
    assert [run["learning_rate"] for run in json.loads((row / methods.GRID).read_text())] == [0.0005, 0.0015, 0.0045]
    write("0.0005", 0.1, step=290)
    with pytest.raises(SystemExit, match="stopped at step 290 of 300"):
        methods.choose(tmp_path / "grid", row)
    methods.rates("tiny_wam")
    assert capsys.readouterr().out.split() == ["0.0005", "0.0015", "0.0045"]


def test_the_checksum_of_numbers_ignores_the_pixels(tmp_path):
    robot = Embodiment(name="tabletop", state_names=("s",), action_names=("a",))

    def checksums(name, brightness, action):
        episode = Episode(
            frames=np.full((3, 32, 48, 3), brightness, np.uint8),
            states=np.zeros((3, 1), np.float32),
            actions=np.full((3, 1), action, np.float32),
            instruction="go",
            embodiment="tabletop",
            fps=10,
        )
        write_dataset(tmp_path / name, [episode], embodiment=robot, fps=10)
        config = RECIPES["tiny_vla"](Stage.JOINT)
        return methods.numbers_sha256(config, tmp_path / name), Seal(tmp_path / name).fingerprint()

    dark, bright, moved = checksums("dark", 10, 0.0), checksums("bright", 200, 0.0), checksums("moved", 10, 0.5)
    assert dark[0] == bright[0] != moved[0]
    assert dark[1] != bright[1]


def test_the_documented_table_is_that_of_the_rows():
    page = (methods.ROOT / "docs" / "methods.md").read_text()
    assert page.split(methods.BEGIN)[1].split(methods.END)[0].strip() == methods.markdown(measured("tabletop")).strip()


def test_the_cpu_time_of_a_run_is_known_if_every_start_has_an_end(tmp_path):
    file = tmp_path / "run.seconds"
    assert methods.cpu_seconds(file) is None
    file.write_text("start\n10.5 2.0\nstart\n1.0 0.5\n")
    assert methods.cpu_seconds(file) == 14.0
    file.write_text("start\nenvironment: line 1: 32578 Killed  agra train\n10.5 2.0\nstart\n1.0 0.5\n")
    assert methods.cpu_seconds(file) == 14.0
    file.write_text("start\nstart\n1.0 0.5\n")  # the first one was killed
    assert methods.cpu_seconds(file) is None


def test_answers_differ_in_the_action_noise_alone():
    """The last answer is the policy's own from zero noise, for the video noise of the seed."""
    simulator = make_simulator("tabletop")
    trial = noise.scenes(simulator)[0]
    left, right, both = noise.variants(trial)
    assert [len(scene.scene["distractors"]) for scene in (left, right, both)] == [0, 0, 1]
    observation = simulator.reset(both)
    name = trial.scene["target"]["name"]
    sides = [simulator.scene.position(item)[0] for item in (name, noise.TWIN)]
    assert sides == pytest.approx([-0.1, 0.1], abs=0.01)
    policy, names = load_policy("tabletop-agra", action_noise="random"), simulator.embodiment.action_names
    rows = noise.answers(policy, observation, names, draws=3, seed=5)
    simulator.close()
    assert rows.shape == (4, 4)
    assert len(np.unique(rows.round(6), axis=0)) == 4
    zero = load_policy("tabletop-agra", action_noise="zero")
    zero.reset(5)
    chunk = zero.act(observation).actions
    assert np.allclose(rows[-1], chunk[7, [0, 1, 5, 6]], atol=1e-5)


def test_answers_differ_in_the_video_noise_alone():
    """The one of zero video noise is the policy's own. With four draws, the mean of hidden states is another answer."""
    simulator = make_simulator("tabletop")
    observation, names = simulator.reset(noise.scenes(simulator)[0]), simulator.embodiment.action_names
    simulator.close()
    rows = noise.video_answers(load_policy("tabletop-agra", action_noise="random"), observation, names, draws=4, seed=5)
    assert rows.shape == (6, 4)
    assert len(np.unique(rows.round(6), axis=0)) == 6
    zero = load_policy("tabletop-agra", action_noise="zero", video_noise="zero")
    assert np.allclose(rows[4], zero.act(observation).actions[7, [0, 1, 5, 6]], atol=1e-5)

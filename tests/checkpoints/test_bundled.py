"""The bundled policies: their weights, training, results and cards."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from agra.checkpoints.folder import BUNDLED, resolve
from agra.checkpoints.lineage import lineage
from agra.cli.main import main
from agra.evaluation.results import read_results, summarise
from agra.methods.wam_actor import FastActor, TrainingActor
from agra.policies.load import load_policy
from agra.stages import Stage
from agra.types import REGIMES, Observation
from tests.support.small import with_objective

NAMES = ("tabletop-wam", "tabletop-agra")


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_by_name_and_reads_the_image(name, tmp_path, monkeypatch):
    """The same seed and observation give the same chunk, and another image gives another one."""
    monkeypatch.chdir(tmp_path)
    folder = resolve(name)
    assert folder.parent == BUNDLED
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert weights <= 10e6
    policy = load_policy(name)
    generator = np.random.default_rng(0)
    observation = Observation(
        frame=generator.integers(0, 256, (128, 224, 3), dtype=np.uint8),
        state=np.zeros(10, dtype=np.float32),
        instruction="put the banana on the plate",
        embodiment="tabletop",
    )
    chunks = []
    for shown in (observation, observation, replace(observation, frame=255 - observation.frame)):
        policy.reset(3)
        chunks.append(policy.act(shown).actions)
    assert np.array_equal(chunks[0], chunks[1])
    assert np.abs(chunks[2] - chunks[0]).max() > 0.01


def test_the_two_differ_in_the_alignment_alone():
    wam, agra = ([stage.config for stage in lineage(name)] for name in NAMES)
    assert [config.stage.name for config in agra] == [Stage.ADAPT, Stage.JOINT]
    assert wam[0] == agra[0]
    joint = agra[1]
    assert joint.method.aligns
    assert not wam[1].method.aligns
    unaligned = with_objective(joint, alignment_weight=0.0)
    assert wam[1] == replace(unaligned, method=replace(unaligned.method, alignment=None))
    logs = [stage.metrics.read_text().splitlines() for name in NAMES for stage in lineage(name)]
    assert [max(json.loads(row)["step"] for row in rows) for rows in logs] == [
        stage.config.stage.steps for name in NAMES for stage in lineage(name)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_card_agrees_with_the_complete_evaluation(name):
    folder = resolve(name)
    results = read_results(folder / "results.jsonl")
    assert results.header["policy"] == name
    assert {regime: len(results.regime(regime)) for regime in REGIMES} == {
        "in_distribution": 50, "semantic": 40, "instance": 50, "attribute": 40,
    }  # fmt: skip
    card = (BUNDLED / "README.md").read_text()
    rows = re.findall(rf"^\| `{name}` \|(.*)\|$", card, re.M)
    counts = [tuple(map(int, cell)) for cell in re.findall(r"(\d+) of (\d+)", rows[0])]
    assert counts == [(s.successes, s.trials) for s in summarise(results) if s.regime != "all"]


@pytest.mark.parametrize(("flags", "actor"), [([], FastActor), (["--no-fast"], TrainingActor)])
def test_a_server_takes_the_path_of_its_flags(flags, actor, monkeypatch):
    sources = []

    async def serve(config, source, **_):
        sources.append(source)

    monkeypatch.setattr("agra.serving.server.app.serve", serve)
    main(["serve", "tabletop-wam", *flags])
    (source,) = sources
    assert type(source.load()._actor) is actor
    assert source.stamp() == BUNDLED / "tabletop-wam"

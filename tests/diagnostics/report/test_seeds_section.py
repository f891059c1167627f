"""Training seeds in the report: arms, their intervals, and differences paired by seed and trial."""

import json

import pytest

from agra.diagnostics.report.page import build_report
from agra.diagnostics.report.seeds_section import find_arms, seeds_section
from tests.diagnostics.report.test_sections import Page
from tests.evaluation.test_results import make_results


def config(seed, weight, path="demonstrations"):
    return {"stage": {"seed": seed, "steps": 10}, "method": {"weight": weight}, "data": {"path": path}}


ROWS = {
    "wam_0": (config(0, 0), {"semantic": "1100", "attribute": "0000"}),
    "wam_1": (config(1, 0), {"semantic": "1000", "attribute": "1000"}),
    "agra_0": (config(0, 1), {"semantic": "1110", "attribute": "0000"}),
    "agra_2": (config(2, 1), {"semantic": "1111", "attribute": "1111"}),
    "elsewhere": (config(0, 1, "other"), {"semantic": "1111", "attribute": "1111"}),
}


@pytest.fixture
def columns():
    return [(i, name, make_results(name, outcomes)) for i, (name, (_, outcomes)) in enumerate(ROWS.items())]


CONFIGS = {name: one for name, (one, _) in ROWS.items()}
DATA = {name: one["data"]["path"] for name, one in CONFIGS.items()}


def test_an_arm_has_one_config_but_for_the_seed(columns):
    arms = {arm.name: list(arm.results) for arm in find_arms(columns, CONFIGS, DATA)}
    assert arms == {"wam": [0, 1], "agra": [0, 2], "elsewhere": [0]}
    zero = (5, "wam_0_zero", make_results("wam_0_zero", {"semantic": "1111"}, policy_settings={"action_noise": "zero"}))
    started = find_arms([*columns, zero], CONFIGS | {"wam_0_zero": config(0, 0)}, DATA)
    assert {arm.name: list(arm.results) for arm in started} == arms | {"wam_0_zero": [0]}
    longer = [(i, name, make_results(name, dict(ROWS[name][1]), max_steps=9 + i)) for i, name, _ in columns]
    assert [len(arm.results) for arm in find_arms(longer, CONFIGS, DATA)] == [1] * 5  # other protocols
    twice = (5, "again", make_results("again", {"semantic": "1111"}))
    assert "wam" not in {arm.name for arm in find_arms([*columns, twice], CONFIGS | {"again": config(0, 0)}, DATA)}


def test_success_has_the_seeds_spread_beside_its_interval(columns):
    section = seeds_section(columns, CONFIGS, DATA)
    assert section["columns"] == ["seeds", "semantic", "attribute", "all regimes"]
    (name, cells), *_ = section["success"]
    assert (name, cells[0].text) == ("wam", "0, 1")
    words = f"{cells[1].text} {cells[1].range}".replace("\u00a0", " ")
    assert words.startswith("38 % [")
    assert words.endswith("]; seeds 25 % to 50 %")
    single = dict(section["success"])["elsewhere"][1]
    assert "seeds" not in single.range


def test_differences_pair_common_seeds_on_the_same_demonstrations(columns):
    """Arm agra has seeds 0 and 2, the reference 0 and 1: only seed 0 counts. An arm with data of its own stands against the first."""
    rows = dict(seeds_section(columns, CONFIGS, DATA)["differences"])
    assert list(rows) == ["agra minus wam", "elsewhere minus wam"]
    seeds, semantic, attribute, _ = rows["agra minus wam"]
    assert seeds.text == "0"
    assert (semantic.text, attribute.text) == ("+25 points", "+0 points")
    assert semantic.range.endswith("; by seed +25")
    assert not semantic.clear
    other = [
        (i, name, make_results(name, dict(ROWS[name][1]), max_steps=9)) for i, name in ((2, "agra_0"), (3, "agra_2"))
    ]
    mixed = dict(seeds_section([*columns[:2], *other], CONFIGS, DATA)["differences"])
    assert mixed["agra minus wam"][1].text.startswith("not comparable")
    apart = [*columns[:2], columns[3]]
    assert dict(seeds_section(apart, CONFIGS, DATA)["differences"])["agra_2 minus wam"][0].text == "no common seed"


def test_arms_whose_answers_start_elsewhere_are_marked(columns):
    zero = [
        (i, name, make_results(name, ROWS[name][1], policy_settings={"action_noise": "zero"})) for i, name, _ in columns
    ]
    rows = dict(seeds_section([*columns[:2], *zero[2:4]], CONFIGS, DATA)["differences"])
    assert (
        rows["agra minus wam"][0].range
        == "answers start from zero action noise, the reference's from random action noise"
    )
    assert not dict(seeds_section(columns, CONFIGS, DATA)["differences"])["agra minus wam"][0].range


def test_a_clear_difference_over_three_seeds():
    rows = [(name, seed) for name in ("a", "b") for seed in range(3)]
    columns = [
        (i, f"{n}{s}", make_results(n, {"semantic": "1" * 20 if n == "b" else "10" * 10}))
        for i, (n, s) in enumerate(rows)
    ]
    configs = {f"{n}{s}": config(s, n) for n, s in rows}
    ((_, (_, cell)),) = seeds_section(columns, configs, {})["differences"]
    assert cell.text == "+50 points"
    assert cell.range.endswith("by seed +50, +50, +50")
    assert cell.clear


def test_one_seed_each_has_no_section(columns):
    assert seeds_section([columns[0], columns[2]], CONFIGS, DATA) is None


def test_the_page_shows_the_arms(write_policy, tmp_path):
    entries = [write_policy("wam_0"), write_policy("wam_1", wins=5), write_policy("agra_0", wins=8)]
    for entry, (seed, weight) in zip(entries, ((0, 0), (1, 0), (0, 1)), strict=True):
        entry.config.write_text(json.dumps(config(seed, weight) | {"method": {"kind": "wam", "weight": weight}}))
    page = Page(build_report(entries, tmp_path / "report.html").read_text())
    assert "seeds" in page.ids
    assert "wam 0, 1" in page.words
    assert "seeds 30 % to 50 %" in page.words
    assert "agra_0 minus wam" in page.words
    assert "+50 points" in page.words

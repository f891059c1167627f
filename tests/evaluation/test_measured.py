"""Rows of the compared methods, and their leaderboard."""

import json
from dataclasses import replace
from functools import partial

import pytest
from scipy.stats import binomtest

from agra.cli.main import main
from agra.evaluation.measured import FOLDER, measured
from agra.evaluation.results import summarise
from agra.evaluation.tables import methods_tables
from tests.evaluation.test_results import make_results, text, write

OUTCOMES = {
    "wam": {"random": "11000000", "zero": "11100000"},
    "other": {"random": "10111110", "zero": "11111111"},
}


@pytest.fixture
def folder(tmp_path):
    for name, by_noise in OUTCOMES.items():
        row = tmp_path / "point" / f"{name}_0"
        row.mkdir(parents=True)
        (row / "row.json").write_text(json.dumps({"name": name, "seed": 0, "pre_training": f"text of {name}"}))
        for noise, outcomes in by_noise.items():
            settings = {} if noise == "random" else {"action_noise": noise}
            regimes = {"semantic": outcomes[:4], "attribute": outcomes[4:]}
            write(row / f"{noise}.jsonl", make_results(name, regimes, policy_settings=settings))
    return tmp_path


def test_rows_and_their_leaderboard(folder):
    rows = measured("point", folder)
    assert [row.name for row in rows] == ["other", "wam"]
    success, tests = (text(table) for table in methods_tables(rows))
    lines = [line.split("│")[1:-1] for line in success.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert [line[0] for line in cells] == ["other", "other", "wam", "wam"]  # the best first
    assert cells[0][1:4] == ["0", "text of other", "random"]
    assert cells[0][-1].startswith("6/8 75%")
    assert cells[1][-1].startswith("8/8 100%")
    assert cells[2][-3].startswith("2/4 50%")
    alone = f"5 / 1, p {binomtest(5, 6).pvalue:.3f}"  # only other 2, 3, 4, 5, 6, only wam 1
    assert alone in tests
    assert f"5 / 0, p {binomtest(5, 5).pvalue:.3f}" in tests  # zero noise against zero noise


def test_further_results_beside_the_rows(folder):
    rows = measured("point", folder)
    own = make_results(
        "own",
        {"semantic": "1111", "attribute": "1111"},
        policy_settings={"action_noise": "zero", "video_noise": "fixed"},
    )
    success, tests = (text(table) for table in methods_tables(rows, [own]))
    assert "* own, fixed video noise" in success
    assert f"5 / 0, p {binomtest(5, 5).pvalue:.3f}" in tests.split("* own")[1]
    with pytest.raises(ValueError, match="cannot compare own with wam: protocol differs"):
        methods_tables(rows, [replace(own, header={**own.header, "protocol": {"execute_steps": 16}})])


def test_an_unfinished_row_is_an_error(folder):
    path = folder / "point" / "wam_0" / "zero.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="interrupted after 7 of 8 trials"):
        measured("point", folder)


def test_a_row_with_one_kind_of_noise(folder):
    row = folder / "point" / "wam_0"
    (row / "random.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"random\.jsonl: no results file"):
        measured("point", folder)
    (row / "row.json").write_text(json.dumps({"name": "wam", "seed": 0, "noises": ["zero"]}))
    assert set(measured("point", folder)[1].results) == {"zero"}


def test_measured_rows_stand_among_published_ones(monkeypatch, tmp_path, capsys):
    outcomes = {"in_distribution": "1" * 30 + "0" * 70}
    row = tmp_path / "metaworld" / "wam_0"
    row.mkdir(parents=True)
    (row / "row.json").write_text(json.dumps({"name": "wam", "seed": 0, "noises": ["zero"]}))
    made = make_results("wam_0", outcomes, simulator="metaworld", policy_settings={"action_noise": "zero"})
    made.header["protocol"].update(termination="step")
    write(row / "zero.jsonl", made)
    monkeypatch.setattr("agra.evaluation.measured.measured", partial(measured, folder=tmp_path))
    main(["leaderboard", "--benchmark", "metaworld"])
    printed = capsys.readouterr().out
    assert "* wam_0" in printed
    assert "zero action noise" in " ".join(printed.replace("│", " ").split())
    assert "SmolVLA 2.25B" in printed


def test_a_benchmark_without_rows(tmp_path):
    assert measured("elsewhere", tmp_path) == []


@pytest.mark.skipif(not (FOLDER / "tabletop").is_dir(), reason="no row is finished")
def test_the_rows_of_the_package_follow_one_protocol():
    rows = measured("tabletop")
    headers = [results.header for row in rows for results in row.results.values()]
    for key in ("trials_sha256", "protocol", "settings", "max_steps"):
        assert len({json.dumps(header[key]) for header in headers}) == 1, key
    for row in rows:
        assert row.results["zero"].header["policy_settings"] == {"action_noise": "zero"}
        assert row.results["random"].header["policy_settings"] == {}
        assert summarise(row.results["random"])[-1].trials == 180
        assert row.info["windows"] == 92_800 or row.name.endswith("_compute")
    # Another machine renders the same demonstrations with other roundings. Rows before `numbers_sha256` share one collection.
    assert len({row.info["numbers_sha256"] for row in rows if "numbers_sha256" in row.info} - {None}) <= 1
    earlier = [row for row in rows if "numbers_sha256" not in row.info]
    assert len({row.info["demonstrations_sha256"] for row in earlier} - {None}) <= 1

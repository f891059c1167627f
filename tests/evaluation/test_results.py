import json
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from agra.evaluation.results import (
    Results,
    TrialResult,
    compare,
    read_results,
    summarise,
    wilson_interval,
)
from agra.evaluation.tables import (
    comparison_table,
    group_table,
    leaderboard_table,
    print_table,
    summary_table,
    task_table,
)
from agra.evaluation.task_groups import TASK_GROUPS


def make_results(policy: str, successes: dict[str, str], **header) -> Results:
    """`successes` gives a regime's outcomes as a string of 0 and 1."""
    trials = tuple(
        TrialResult(
            trial=f"{regime}/{i}",
            regime=regime,
            task="reach",
            seed=i,
            instruction="go",
            success=outcome == "1",
            progress={"near": i % 2 == 0},
            steps=10,
            calls=2,
            wall_s=0.5,
            policy_ms={"mean": 2.0, "p50": 1.0 + i, "p95": 3.0},
        )
        for regime, outcomes in successes.items()
        for i, outcome in enumerate(outcomes)
    )
    regimes = {regime: {"played": len(outcomes), "full": 40} for regime, outcomes in successes.items()}
    fields = {"policy": policy, "simulator": "point", "protocol": {"execute_steps": 4}, "max_steps": 30}
    fields |= {"num_trials": len(trials), "regimes": regimes, "trials_sha256": "abc"}
    return Results(header=fields | header, trials=trials)


A = make_results("a", {"semantic": "1100", "attribute": "111100"})
B = make_results("b", {"semantic": "1010", "attribute": "111111"})


def write(path, results: Results) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in (results.header, *map(asdict, results.trials))))


def test_summary():
    semantic, attribute, both = summarise(A)
    assert (semantic.regime, semantic.trials, semantic.full, semantic.successes) == ("semantic", 4, 40, 2)
    assert semantic.interval == wilson_interval(2, 4)
    assert semantic.progress == {"near": 0.5}
    assert attribute.median_policy_ms == 3.5
    assert (both.regime, both.trials, both.full, both.rate) == ("all", 10, 80, 0.6)
    assert len(summarise(make_results("one", {"instance": "10"}))) == 1


def test_compare_pairs_by_name():
    shuffled = replace(B, trials=B.trials[::-1])
    comparison = compare(A, shuffled)
    assert (comparison.name_a, comparison.name_b) == ("a", "b")
    semantic, attribute, both = comparison.pairs
    assert semantic.test == (1.0, 1, 1, 1, 1)
    assert attribute.test == (0.5, 0, 2, 4, 0)
    assert both.test[1:] == (1, 3, 5, 1)


def test_compare_refuses_what_is_not_comparable():
    for key, value in {"simulator": "libero", "trials_sha256": "abd", "protocol": {"execute_steps": 8}}.items():
        other = replace(B, header={**B.header, key: value})
        with pytest.raises(ValueError, match=f"cannot compare a with b: {key} differs"):
            compare(A, other)
    with pytest.raises(ValueError, match="their finished trials differ"):
        compare(A, replace(B, trials=B.trials[1:]))


def test_averages_over_tasks():
    """Six tasks in one regime: the average's interval draws tasks; two tasks are too few."""
    tasks = "aabbccddeeff"
    trials = tuple(replace(t, task=task) for t, task in zip(A.trials + B.trials[:2], tasks, strict=True))
    names = [replace(trial, trial=f"{i}", regime="semantic") for i, trial in enumerate(trials)]
    (summary,) = summarise(replace(A, trials=tuple(names)))
    assert (summary.tasks, summary.average.clusters) == (6, 6)
    assert summary.average.low < summary.rate < summary.average.high
    assert all(summary.average is None for summary in summarise(A))
    table = text(task_table(replace(A, trials=tuple(names))))
    assert "2 of 2" in table
    assert "34-100" in table


def test_compare_gives_the_difference():
    pair = compare(A, B).pairs[-1]
    assert pair.difference.value == pytest.approx(-0.2)
    assert pair.difference.low < -0.2 < pair.difference.high
    assert pair.difference.clusters == 10  # one task only, so trials are drawn
    single = make_results("a", {"semantic": "1"})
    assert compare(single, single).pairs[0].difference == (0, -1, 1, 1)


def test_the_difference_is_that_of_the_columns():
    """One task has two trials, four have one."""
    a, b = (make_results(name, {"semantic": outcomes}) for name, outcomes in (("a", "110000"), ("b", "000000")))
    a, b = (
        replace(r, trials=tuple(replace(t, task=k) for t, k in zip(r.trials, "xxyzuv", strict=True))) for r in (a, b)
    )
    pair = compare(a, b).pairs[0]
    assert pair.difference.value == pytest.approx(pair.a.rate - pair.b.rate)
    shown = text(comparison_table(compare(a, b)))
    assert "33% (10-70)" in shown
    assert "+33 (" in shown
    assert "points over all trials, paired bootstrap over tasks" in " ".join(shown.split())


def test_a_comparison_names_where_answers_start():
    zero = {"policy_settings": {"action_noise": "zero", "video_noise": "fixed"}}
    a, b = make_results("a", {"semantic": "1100"}, **zero), make_results("b", {"semantic": "1010"})
    shown = " ".join(text(comparison_table(compare(a, b))).split())
    assert "A: a, from zero action noise, fixed video noise B: b, from random action noise" in shown
    assert "(A) and from random action noise (B), which alone changes success" in shown
    assert "which alone changes success" not in text(comparison_table(compare(a, a)))
    expert = compare(make_results("expert", {"semantic": "1010"}), a)
    assert "A: expert, from no noise" in text(comparison_table(expert))
    assert "which alone changes success" not in text(comparison_table(expert))
    foreign = make_results("c", {"semantic": "1010"}, policy_settings={"key_mapping": "groot_gr1"})
    assert compare(foreign, b).start_a == "its server's noise"


def test_leaderboard():
    ours = make_results("ours", {"unseen_combinations": "1101"}, simulator="robocasa_gr1", settings={"camera": "ego"})
    ours.header["protocol"].update(termination="chunk")
    table = text(leaderboard_table([ours], "robocasa_gr1"))
    assert "* ours" in table
    assert "Table 2" in table  # a row says where it is from
    assert "66.4 % (64-69)" in table  # the paper's average, 24 x 50
    assert table.index("* ours") < table.index("66.3 %")  # 75 % is above Table 2's best in its regime
    assert "4 of the 40 trials" in " ".join(table.split())
    with pytest.raises(ValueError, match="these are results of point, not of robocasa_gr1"):
        leaderboard_table([A], "robocasa_gr1")
    with pytest.raises(ValueError, match="no published results of 'tabletop'; available: robocasa_gr1"):
        leaderboard_table([], "tabletop")


def metaworld_results(solved, *, tasks=None) -> Results:
    """Two trials of each task, both solved in the groups `solved`."""
    group_of = {task: group for group, members in TASK_GROUPS["metaworld"].items() for task in members}
    outcomes = {task: "11" if group_of[task] in solved else "00" for task in tasks or group_of}
    results = make_results("ours", {"in_distribution": "".join(outcomes.values())}, simulator="metaworld")
    named = zip(results.trials, [task for task in outcomes for _ in range(2)], strict=True)
    return replace(results, trials=tuple(replace(trial, task=task) for trial, task in named))


def test_averages_over_groups_of_tasks():
    """28 easy tasks solved of 50: 56 % of the tasks, a quarter of the groups."""
    results = metaworld_results({"easy"})
    (summary,) = summarise(results)
    assert [(group.group, group.tasks, group.rate) for group in summary.groups] == [
        ("easy", 28, 1),
        ("medium", 11, 0),
        ("hard", 6, 0),
        ("very hard", 5, 0),
    ]
    assert (summary.average.value, summary.group_average.value) == (pytest.approx(0.56), 0.25)
    shown = text(summary_table(results))
    assert "25% (22-41)" in shown
    assert "where tasks have one rate, the average's interval is Wilson's over tasks" in " ".join(shown.split())
    assert "100% (88-100)" in text(group_table(results))
    assert group_table(A) is None
    few = metaworld_results({"easy"}, tasks=["reach-v3", "drawer-open-v3", "push-v3"])
    (summary,) = summarise(few)
    assert (len(summary.groups), summary.group_average) == (2, None)


def test_leaderboard_of_metaworld():
    results = metaworld_results({"easy", "hard"})
    results.header["protocol"].update(termination="step")
    lines = text(leaderboard_table([results], "metaworld"))
    table = " ".join(lines.replace("│", " ").split())
    assert table.index("pi0 3.5B, from PaliGemma") < table.index("* ours") < table.index("pi0 3.5B, robot-pretrained")
    assert "* ours 50% (40-63)" in table
    assert all(part in table for part in ("easy 100.0%", "very hard 0.0%", "68.0% over tasks"))
    assert "57.3 % 50 x 10" in table  # an average over groups has no interval of pooled episodes
    assert "reproductions print 75.8 and 76.2" in table


def text(table) -> str:
    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_tables():
    shown = text(summary_table(A)) + text(comparison_table(compare(A, B)))
    assert "4 of 40" in shown
    assert "60% (31-83)" in shown
    assert "100% (61-100)" in shown
    assert "an improvement of 40 points is detectable with 10 other trials (80 % power, 5 % level)" in " ".join(
        shown.split()
    )
    assert "…" not in shown


def test_read(tmp_path):
    write(tmp_path / "r.jsonl", A)
    assert read_results(tmp_path / "r.jsonl") == A
    with pytest.raises(FileNotFoundError, match=r"x\.jsonl: no results file; write it with: agra evaluate"):
        read_results(tmp_path / "x.jsonl")


def test_interrupted(tmp_path):
    path = tmp_path / "r.jsonl"
    write(path, A)
    whole = path.read_text()
    path.write_text(whole[:-30])
    with pytest.raises(ValueError, match=r"r\.jsonl: interrupted after 9 of 10 trials; run the same agra evaluate"):
        read_results(path)
    assert read_results(path, partial=True).trials == A.trials[:-1]
    path.write_text("".join(whole.splitlines(keepends=True)[:5]))
    with pytest.raises(ValueError, match="interrupted after 4 of 10"):
        read_results(path)


def test_malformed_lines_are_named(tmp_path):
    path = tmp_path / "r.jsonl"
    write(path, A)
    lines = path.read_text().splitlines(keepends=True)
    cases = {
        3: [*lines[:2], "{broken\n", *lines[3:]],
        4: [*lines[:3], json.dumps({"trial": "x"}) + "\n", *lines[4:]],
        6: [*lines[:5], lines[2], *lines[6:]],
        1: lines[1:],
    }
    for number, changed in cases.items():
        path.write_text("".join(changed))
        for partial in (False, True):
            with pytest.raises(ValueError, match=rf"r\.jsonl, line {number}: "):
                read_results(path, partial=partial)
    path.write_text("")
    with pytest.raises(ValueError, match="line 1: expected the header"):
        read_results(path)


def test_printed_tables_are_complete_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    path = tmp_path / "r.jsonl"
    write(path, A)
    print_table(summary_table(read_results(path)))
    print_table(comparison_table(compare(read_results(path), read_results(path))))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "success (95 %)" in printed
    assert "only A" in printed

import json
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from agra.evaluation.results import (
    Results,
    TrialResult,
    compare,
    comparison_table,
    mcnemar,
    print_comparison,
    print_summary,
    read_results,
    summarise,
    summary_table,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "trials", "confidence", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.95, 0.2553, 0.3662),
        (15, 148, 0.95, 0.0624, 0.1605),
        (0, 20, 0.95, 0.0, 0.1611),
        (1, 29, 0.95, 0.0061, 0.1718),
        (10, 10, 0.90, 0.7871, 1.0),  # n / (n + z^2), z = 1.6449
    ],
)
def test_wilson(successes, trials, confidence, low, high):
    assert wilson_interval(successes, trials, confidence) == pytest.approx((low, high), abs=6e-5)


def test_mcnemar():
    # 12 trials that one alone solved, 2 of them the first: 2 * (1 + 12 + 66) / 2^12
    a = [True] * 5 + [True] * 2 + [False] * 10 + [False] * 3
    b = [True] * 5 + [False] * 2 + [True] * 10 + [False] * 3
    test = mcnemar(a, b)
    assert test == (pytest.approx(2 * 79 / 4096), 2, 10, 5, 3)
    assert mcnemar(b, a).p_value == test.p_value
    assert mcnemar([True, False], [True, False]).p_value == 1
    assert mcnemar([True] * 3, [False] * 3).p_value == pytest.approx(0.25)
    with pytest.raises(ValueError, match="equally long"):
        mcnemar([True], [True, False])


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
    known = {"policy": policy, "simulator": "point", "protocol": {"execute_steps": 4}, "max_steps": 30}
    known |= {"num_trials": len(trials), "regimes": regimes, "trials_sha256": "abc"}
    return Results(header=known | header, trials=trials)


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
    compare(A, replace(B, header={**B.header, "protocol": {"execute_steps": 8}}), across_protocols=True)
    with pytest.raises(ValueError, match="finished different trials"):
        compare(A, replace(B, trials=B.trials[1:]))


def test_tables():
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(A))
    console.print(comparison_table(compare(A, B)))
    text = console.export_text()
    assert "4 of 40" in text
    assert "60% (31-83)" in text
    assert "100% (61-100)" in text
    assert "…" not in text


def test_read(tmp_path):
    write(tmp_path / "r.jsonl", A)
    assert read_results(tmp_path / "r.jsonl") == A
    with pytest.raises(FileNotFoundError, match=r"x\.jsonl: no results here; make them with: agra evaluate"):
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
    print_summary(read_results(path))
    print_comparison(compare(read_results(path), read_results(path)))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "success (95 %)" in printed
    assert "only A" in printed

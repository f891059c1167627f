import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from agra.diagnostics.metrics import IntervalEstimate
from agra.diagnostics.record import Diagnosis, read_diagnosis, write_diagnosis
from agra.diagnostics.report.comparison_table import difference_cell, mcnemar_cell, number, percent
from agra.diagnostics.report.grounding_section import print_grounding
from agra.diagnostics.report.page import PolicyEntry, build_report
from agra.diagnostics.report.training_section import read_log
from agra.diagnostics.report.visual_reliance_section import read_visual_reliance
from agra.diagnostics.visual_reliance import Swaps, VisualReliance
from agra.types import REGIMES


class Page(HTMLParser):
    """Checks nesting, and gathers text, ids and everything that could load from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.sources, self.text, self.data = [], set(), [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [value for name, value in attrs.items() if name in ("src", "href", "srcset", "action")]
        self.ids.add(attrs.get("id"))
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"closed {tag}"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.data = self.data or data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text).replace("\u00a0", " "))


def teach(frames):
    return frames.reshape(len(frames), 4, 4, 5, 4, 3).mean(axis=(2, 4))


def test_the_report_holds_everything_and_loads_nothing(write_policy, tmp_path):
    entries = [write_policy("baseline"), write_policy("aligned", wins=8, teacher=teach), write_policy("third")]
    output = build_report(entries, tmp_path / "site" / "report.html")
    text = output.read_text()
    page = Page(text)
    for name in ("baseline", "aligned", "third"):
        assert f"The arm {name} <b>" in page.words  # escaped, not markup
    for regime in REGIMES:
        assert regime.replace("_", " ") in page.words
    assert "patch PCA" in page.words
    assert {"summary", "training", "evaluation", "grounding", "gallery", "settings"} <= page.ids
    assert all(source.startswith(("#", "data:image/jpeg;base64,")) for source in page.sources)
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    assert len(text) < 2_000_000
    data = json.loads(page.data)
    assert len(data["samples"]) == 2
    assert len(data["samples"][0]["arms"]) == 3
    assert [name for name, _ in data["samples"][0]["teachers"]] == ["pixels"]  # of the one policy that has it
    assert not list(output.parent.glob("*.tmp"))


@pytest.mark.parametrize("field", ["vision_encoder", "visual_encoder"])
def test_the_image_features_of_a_policy_without_a_video_model_are_named(write_policy, tmp_path, field):
    entry = write_policy("features")
    entry.config.write_text(json.dumps({"method": {"kind": "vla", field: {"kind": "packaged_dinov2_small"}}}))
    page = Page(build_report([entry], tmp_path / "report.html").read_text())
    assert "Image features: a packaged DINOv2-S/14" in page.words


def test_verdicts_in_the_report(write_policy, tmp_path):
    words = Page(
        build_report([write_policy("baseline"), write_policy("aligned", wins=8)], tmp_path / "r.html").read_text()
    ).words
    # 5 more of 10 in each regime: McNemar p = .0625 in one, far below in all
    assert "30 % (3/10)" in words
    assert "of 10 trials aligned alone succeeded in 5, baseline alone in 0; p = 0.062" in words
    assert "aligned succeeds more often of 40 trials aligned alone succeeded in 20" in words
    assert "no difference shown difference 0 [0, 0]" in words  # the same weights, so the same grounding


def test_policies_are_compared_on_the_same_demonstrations(write_policy, tmp_path):
    def trained_on(name, data):
        entry = write_policy(name)
        entry.config.write_text(json.dumps(json.loads(entry.config.read_text()) | {"data": {"path": data}}))
        return entry

    pairs = [
        trained_on(name, data) for name, data in (("wam", "a"), ("agra", "a"), ("own-wam", "b"), ("own-agra", "b"))
    ]
    words = Page(build_report(pairs, tmp_path / "pairs.html").read_text()).words
    assert "wam agra against wam own-wam own-agra against own-wam" in words
    assert "own-wam against" not in words
    single = [*pairs[:2], trained_on("other", "c")]
    words = Page(build_report(single, tmp_path / "single.html").read_text()).words
    assert "agra against wam other against wam" in words


def test_one_policy_and_missing_parts(write_policy, tmp_path):
    whole = write_policy("alone")
    bare = PolicyEntry(name="bare", description="nothing was measured")
    words = Page(build_report([whole], tmp_path / "a.html").read_text()).words
    assert "against" not in words.split("Evaluation")[0]
    page = Page(build_report([whole, bare], tmp_path / "b.html").read_text())
    assert "not comparable" in page.words
    page = Page(build_report([bare], tmp_path / "c.html").read_text())
    assert not {"training", "evaluation", "grounding", "gallery"} & page.ids


def test_different_trials_are_not_compared(write_policy, tmp_path):
    one, two = write_policy("one"), write_policy("two")
    lines = two.results.read_text().replace('"trials_sha256": "x"', '"trials_sha256": "y"')
    two.results.write_text(lines)
    assert "not comparable: trials differ" in Page(build_report([one, two], tmp_path / "r.html").read_text()).words


def test_policies_whose_answers_start_elsewhere_are_marked(write_policy, tmp_path, capsys):
    one, two = write_policy("one"), write_policy("two")
    mark = "answers start from zero action noise, the reference's from random action noise"
    assert "answers start from" not in Page(build_report([one, two], tmp_path / "r.html").read_text()).words
    lines = two.results.read_text().replace(
        '"max_steps": 9', '"max_steps": 9, "policy_settings": {"action_noise": "zero"}'
    )
    two.results.write_text(lines)
    page = Page(build_report([one, two], tmp_path / "r.html").read_text())
    assert "one from random action noise, two from zero action noise" in page.words
    assert page.words.count(mark) >= 5  # success, all of it and by regime
    header = json.loads((two.diagnosis / "diagnosis.json").read_text())
    (two.diagnosis / "diagnosis.json").write_text(json.dumps(header | {"action_noise": "zero"}))
    print_grounding([(i, p.name, read_diagnosis(p.diagnosis)) for i, p in enumerate((one, two))])
    assert "action noise" in capsys.readouterr().out  # broken over lines
    earlier = {key: value for key, value in header.items() if key not in ("action_noise", "video_noise")}
    (two.diagnosis / "diagnosis.json").write_text(json.dumps(earlier))
    words = Page(build_report([one, two], tmp_path / "r.html").read_text()).words
    assert "answers start from noise that was not recorded, the reference's from random action noise" in words


def test_samples_are_paired_by_name(write_policy, tmp_path):
    one, two = write_policy("one"), write_policy("two")
    read = read_diagnosis(two.diagnosis)
    rows = [{**row, "trial": row["trial"] if i < 2 else f"other-{i}"} for i, row in enumerate(read.rows)]
    write_diagnosis(Diagnosis(header=read.header, rows=rows, arrays=read.arrays), two.diagnosis)
    assert "n = 2" in Page(build_report([one, two], tmp_path / "r.html").read_text()).words


def test_a_cut_log_is_read_and_a_broken_one_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert read_log(path) == [{"step": 1, "loss": 2}]
    path.write_text('{"step": 1\n{"step": 2, "loss": 1}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_log(path)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="got none"):
        build_report([], tmp_path / "r.html")
    entry = PolicyEntry(name="a", description="", diagnosis=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must differ"):
        build_report([entry, entry], tmp_path / "r.html")
    with pytest.raises(FileNotFoundError, match=r"diagnosis\.json|metrics\.jsonl"):
        build_report([entry], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def estimate(value, low, high):
    return IntervalEstimate(value=value, low=low, high=high, count=9, groups=9)


def test_wording_follows_the_interval():
    assert difference_cell(estimate(0.2, -0.1, 0.5), name="b").text == "no difference shown"
    assert difference_cell(estimate(0.2, 0.1, 0.5), name="b").text == "b higher"
    assert difference_cell(estimate(-0.2, -0.4, -0.1), name="b").text == "b lower"
    assert "too few" in difference_cell(estimate(0.2, np.nan, np.nan), name="b").text
    assert mcnemar_cell(5, 0, 0.0625, 10, name="b", reference="a").text == "no difference shown"
    assert mcnemar_cell(0, 9, 0.004, 10, name="b", reference="a").text == "b succeeds less often"


def test_numbers_read_well():
    assert [number(v) for v in (0, 1.2345, -0.0466, 12.0, 1234.0, np.inf, np.nan)] == [
        "0", "1.23", "−0.0466", "12.0", "1234", "∞", "–"
    ]  # fmt: skip
    assert [percent(v) for v in (0, 0.3, 0.052, 1)] == ["0\u00a0%", "30\u00a0%", "5.2\u00a0%", "100\u00a0%"]


def make_reliance(error, shift, trials):
    """Initial observations in two groups, with known error and shift."""
    demonstrated = np.random.default_rng(0).uniform(-0.1, 0.1, (len(trials), 2))
    unchanged = demonstrated + np.array([error, 0])
    moved = unchanged + np.array([0, shift])
    targets = {"unchanged": unchanged, "image_swapped": moved, "image_masked": moved, "instruction_swapped": unchanged}
    groups = ["in_distribution" if i % 2 else "semantic" for i in range(len(trials))]
    swaps = Swaps.of(groups, [f"take {i}" for i in range(len(trials))], demonstrated, {0: 2, 2: 0})
    return VisualReliance.of(targets, demonstrated, swaps, trials=trials, groups=groups)


def test_visual_reliance_is_compared_on_the_same_trials(write_policy, tmp_path, caplog):
    entries = [write_policy("wam"), write_policy("agra")]
    trials = [f"trial {i}" for i in range(24)]
    make_reliance(0.06, 0.004, trials).save(tmp_path / "wam" / "diagnosis" / "visual_reliance.json")
    make_reliance(0.02, 0.05, trials).save(tmp_path / "agra" / "diagnosis" / "visual_reliance.json")
    page = Page(build_report(entries, tmp_path / "report.html").read_text())
    assert "visual-reliance" in page.ids
    assert "Target error, one object in distribution; lower is better 6.0 cm [6.0 cm, 6.0 cm] 2.0 cm" in page.words
    assert "agra lower difference −4.0 cm" in page.words
    assert "agra higher difference +4.6 cm" in page.words
    assert page.words.count("Image swapped") == 3  # of two groups, and in the summary
    make_reliance(0.02, 0.05, trials[::-1]).save(tmp_path / "agra" / "diagnosis" / "visual_reliance.json")
    with pytest.raises(
        ValueError, match="agra and wam: visual reliance was measured on different trials; diagnose them again"
    ):
        build_report(entries, tmp_path / "report.html")
    file = tmp_path / "wam" / "diagnosis" / "visual_reliance.json"
    content = json.loads(file.read_text())
    del content["values"]["demonstrated_swap_shift"]
    file.write_text(json.dumps(content))  # of the earlier instrument
    assert read_visual_reliance(file.parent) is None
    assert f"{file}: was measured by an earlier version; diagnose the policy again" in caplog.text
    page = Page(build_report(entries, tmp_path / "report.html").read_text())
    assert "agra lower difference −4.0 cm" not in page.words
    assert "2.0 cm [2.0 cm, 2.0 cm]" in page.words


def test_an_instrument_that_a_method_cannot_offer_is_not_applicable(
    write_policy, policy, token_policy, plain_policy, tmp_path
):
    entries = [
        write_policy("whole", policy=policy, teacher=teach),
        write_policy("tokens", policy=token_policy, teacher=teach),
        write_policy("plain", policy=plain_policy),
    ]
    page = Page(build_report(entries, tmp_path / "r.html").read_text())
    words = page.words
    row = words.split("Attention in mask fraction of the attention mass; higher is better")[1][:90]
    assert "100 % [100 %, 100 %] not applicable not applicable" in row
    row = words.split("Sensitivity ratio, mean mean replacement; higher is better")[1]
    assert row.startswith(" ∞ no interval ∞ no interval not comparable: no finite values in common not applicable")
    row = words.split("PSNR of the predicted video dB; higher is better")[1][:90]
    assert row.count("not applicable") == 2
    assert "Not applicable: attention, sensitivity, PCA, predicted video." in words
    assert "Not applicable: attention, predicted video." in words
    assert "nan" not in words.lower().split()
    words = Page(build_report(entries[2:], tmp_path / "alone.html").read_text()).words
    assert "No policy reads token grids: grounding is not applicable." in words
    assert "Error of the predicted actions" in words

from dataclasses import replace

import numpy as np
import pytest

from agra.diagnostics.samples.probe_sample import load_samples, samples_from_episode, save_samples
from agra.types import Episode


@pytest.fixture
def episode():
    frames = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), dtype=np.uint8)
    return Episode(
        frames=frames,
        states=np.arange(20, dtype=np.float32).reshape(10, 2),
        actions=np.zeros((10, 3), dtype=np.float32),
        instruction="put the apple in the bowl",
        embodiment="hands",
        fps=10,
        masks=frames[..., 0] > 4,
    )


def test_samples_repeat_the_last_frame(episode):
    first, last = samples_from_episode(episode, [0, 8], [0, 1, 5], trial="t", regime="semantic")
    assert first.frames[:, 0, 0, 0].tolist() == [0, 1, 5]
    assert first.masks.any(axis=(1, 2)).tolist() == [False, False, True]
    assert last.frames[:, 0, 0, 0].tolist() == [8, 9, 9]
    assert last.state.tolist() == [16, 17]
    np.testing.assert_array_equal(last.observation.frame, episode.frames[8])
    assert last.observation.joined, "a dataset's frames hold all of its cameras"


def test_samples_hold_past_observations(episode, tmp_path):
    """Before the start the first observation repeats, as in an evaluation."""
    samples = samples_from_episode(episode, [1, 8], [0], trial="t", regime="semantic", past_offsets=(-4, -1))
    save_samples(samples, tmp_path / "probe")
    for sample, rows in zip(load_samples(tmp_path / "probe"), ([0, 0], [4, 7]), strict=True):
        observation = sample.observation_for((-4, -1))
        assert [past.frame[0, 0, 0] for past in observation.past] == rows
        assert [past.state[0] for past in observation.past] == [2 * row for row in rows]
        assert sample.observation_for(()).past == ()
        with pytest.raises(ValueError, match=r"steps \(-1,\), but the sample holds 2 past observations"):
            sample.observation_for((-1,))
    (bare,) = samples_from_episode(episode, [1], [0], trial="t", regime="semantic")
    with pytest.raises(ValueError, match="write the probe samples again"):
        bare.observation_for((-1,))
    with pytest.raises(ValueError, match="as many past_frames as past_states"):
        replace(samples[0], past_states=None)


def test_samples_refuse(episode):
    with pytest.raises(ValueError, match="step 10 lies outside"):
        samples_from_episode(episode, [10], [0], trial="t", regime="semantic")
    with pytest.raises(ValueError, match="expected 0 first"):
        samples_from_episode(episode, [0], [1, 5], trial="t", regime="semantic")
    with pytest.raises(ValueError, match="expected one of"):
        samples_from_episode(episode, [0], [0], trial="t", regime="easy")


def test_round_trip(tmp_path, make_sample):
    samples = [make_sample(seed=i, step=i) for i in range(3)]
    save_samples(samples, tmp_path / "probe")
    loaded = load_samples(tmp_path / "probe")
    for one, two in zip(samples, loaded, strict=True):
        assert (one.trial, one.step, one.regime) == (two.trial, two.step, two.regime)
        for name in ("state", "frames", "masks"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    with pytest.raises(FileNotFoundError, match=r"samples\.json"):
        load_samples(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", "{", '{"samples": [{"trial": "t"}]}', '{"samples": [{"odd": 1}]}', '{"samples": 3}']
)
def test_odd_samples_are_one_line(tmp_path, make_sample, content):
    save_samples([make_sample()], tmp_path / "probe")
    (tmp_path / "probe" / "samples.json").write_text(content)
    with pytest.raises(ValueError, match="probe"):
        load_samples(tmp_path / "probe")
    save_samples([make_sample()], tmp_path / "probe")
    (tmp_path / "probe" / "samples.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="probe"):
        load_samples(tmp_path / "probe")

"""The control loop with a robot that records its commands: lost connections, a restarted server, a swapped policy."""

import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from agra.data.lerobot.dataset import LeRobotDataset
from agra.serving.client import PolicyClient, ServerRefused
from agra.serving.robot.control import ActionLimits, Watchdog, control
from agra.serving.robot.executors import Asynchronous, DelayedInference, Synchronous, ThreadedInference
from agra.serving.robot.recorder import DatasetRecorder
from agra.serving.robot.robots import LeRobotArm
from agra.serving.server.app import PolicySource, reload
from agra.types import ActionChunk, Embodiment, EmbodimentSpec, Observation, PolicySpec
from tests.support.echo import Echo, running, spec

NAMES = tuple("abcd")


class Robot:
    embodiment = Embodiment(name="robot", state_names=NAMES, action_names=NAMES)

    def __init__(self):
        self.commands, self.stops = [], 0
        self.at = np.zeros(4, np.float32)

    def connect(self): ...

    def observe(self):
        frame = np.full((32, 48, 3), len(self.commands) % 256, np.uint8)
        return Observation(frame=frame, state=self.at.copy(), instruction="go", embodiment="robot")

    def pose(self, observation):
        return observation.state

    def command(self, action):
        self.commands.append(action)
        self.at = action

    def hold(self):
        self.commands.append(None)

    def stop(self):
        self.stops += 1

    def disconnect(self): ...


class Planned:
    def __init__(self, actions):
        self.actions = np.array(actions, np.float32)

    def reset(self, seed): ...

    def act(self, observation, *, continuation=None):
        return ActionChunk(actions=self.actions)


def run(robot, actions, *, steps=4, delay=0, fps=10, real_time=False, **options):
    executor = Synchronous(DelayedInference(Planned(actions), delay), execute_steps=len(actions))
    return control(robot, executor, fps=fps, steps=steps, real_time=real_time, **options)


def test_actions_are_limited_in_size_and_change():
    robot = Robot()
    limits = ActionLimits(low=-1.0, high=[1, 1, 1, 0.1], max_step=0.5)
    report = run(robot, [[9, -9, 0.2, 9]] * 4, limits=limits)
    np.testing.assert_allclose(robot.commands[0], [0.5, -0.5, 0.2, 0.1])
    np.testing.assert_allclose(robot.commands[3], [1, -1, 0.2, 0.1])
    assert (report.steps, report.clipped, report.held, robot.stops) == (4, 4, 0, 1)


def test_actions_that_are_not_finite_are_never_sent():
    robot = Robot()
    report = run(robot, [[0, 0, 0, 0], [np.nan, 0, 0, 0], [np.inf, 0, 0, 0], [1, 1, 1, 1]])
    assert [commands is None for commands in robot.commands] == [False, True, True, False]
    assert report.held == 2


def test_old_actions_are_not_executed():
    robot = Robot()
    report = run(robot, [[1, 1, 1, 1]] * 10, steps=10, watchdog=Watchdog(max_age=0.4))
    assert report.held == 5
    assert robot.commands[-1] is None


class Stalling(Robot):
    """A robot whose camera stalls once."""

    def __init__(self, step, seconds):
        super().__init__()
        self.step, self.seconds, self.times = step, seconds, []

    def observe(self):
        if len(self.commands) == self.step:
            time.sleep(self.seconds)
        return super().observe()

    def command(self, action):
        super().command(action)
        self.times.append(time.perf_counter())


def test_no_burst_follows_a_stall():
    robot = Stalling(step=3, seconds=0.3)
    start = time.perf_counter()
    report = run(robot, [[1, 1, 1, 1]] * 12, fps=50, steps=12, real_time=True)
    assert report.overruns >= 1
    assert np.diff(robot.times).min() > 0.5 / 50
    assert time.perf_counter() - start > 0.3 + 9.5 / 50


def test_the_age_of_an_action_is_measured_by_the_clock():
    robot = Stalling(step=3, seconds=0.5)
    run(robot, [[1, 1, 1, 1]] * 6, fps=50, steps=7, real_time=True, watchdog=Watchdog(max_age=0.45))
    # After the stall the rest of the chunk is only a few control steps old, but too old by the clock. The next chunk is not.
    assert [commands is None for commands in robot.commands[3:]] == [True, True, True, False]


def test_a_dry_run_commands_nothing():
    robot = Robot()
    report = run(robot, [[1, 1, 1, 1]] * 4, dry_run=True)
    assert robot.commands == [None] * 4
    assert report.held == 0


def test_holding_for_too_long_ends_the_run_at_rest():
    robot = Robot()
    report = run(robot, [[1, 1, 1, 1]], steps=100, delay=50, watchdog=Watchdog(stop_after=1.0))
    assert report.steps == 10
    assert "held for 1 s" in report.stopped
    assert robot.stops == 1


def test_the_robot_is_stopped_after_any_error():
    class Broken(Robot):
        def command(self, action):
            raise RuntimeError("motor 3")

    robot = Broken()
    with pytest.raises(RuntimeError, match="motor 3"):
        run(robot, [[1, 1, 1, 1]])
    assert robot.stops == 1


def test_invalid_settings_are_refused():
    with pytest.raises(ValueError, match="above high"):
        ActionLimits(low=1.0, high=0.0)
    with pytest.raises(ValueError, match="max_step"):
        ActionLimits(max_step=0.0)
    with pytest.raises(ValueError, match="max_age"):
        Watchdog(max_age=0)
    with pytest.raises(ValueError, match="positive rate"):
        control(Robot(), Synchronous(DelayedInference(Planned([[0] * 4]), 0), execute_steps=1), fps=0, steps=1)


@pytest.mark.parametrize("options", [["--executors", "rtc"], ["--latencies", "0", "100"]])
def test_the_benchmark_refuses_options_without_its_comparison(monkeypatch, capsys, options):
    """Before an episode is played: the checkpoint of this name does not exist."""
    from benchmarks import control as benchmark

    monkeypatch.setattr("sys.argv", ["control", "no-such-checkpoint", *options])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "the result compares asynchronous and rtc at 200 ms, got --executors" in capsys.readouterr().err


def test_episodes_are_recorded_as_a_dataset(tmp_path):
    robot = Robot()
    with DatasetRecorder(tmp_path / "log", robot, fps=10) as recorder:
        for _ in range(2):
            run(robot, [[1, 2, 3, 4]] * 3, steps=8, delay=1, recorder=recorder)
            recorder.end_episode()
    dataset = LeRobotDataset(tmp_path / "log", camera="observation.images.ego_view")
    assert dataset.num_episodes == 2
    actions = dataset.actions(0)
    assert actions.shape == (8, 4)
    np.testing.assert_allclose(actions[1], [1, 2, 3, 4])
    np.testing.assert_allclose(actions[0], dataset.states(0)[0])  # held where it stood


def test_each_run_is_an_episode_with_its_instruction(tmp_path):
    class Told(Robot):
        def observe(self):
            return replace(super().observe(), instruction=self.instruction)

    robot = Told()
    with DatasetRecorder(tmp_path / "log", robot, fps=10) as recorder:
        for robot.instruction, steps in (("open the drawer", 8), ("close the drawer", 5)):
            run(robot, [[1, 2, 3, 4]] * 3, steps=steps, recorder=recorder)
    dataset = LeRobotDataset(tmp_path / "log")
    assert dataset.lengths.tolist() == [8, 5]
    assert [dataset.instruction(episode) for episode in range(2)] == ["open the drawer", "close the drawer"]


def test_a_recording_tells_which_actions_were_sent(tmp_path):
    robot = Robot()
    with DatasetRecorder(tmp_path / "log", robot, fps=10) as recorder:
        for dry_run in (False, True):
            run(robot, [[1, 2, 3, 4]] * 3, steps=6, delay=1, dry_run=dry_run, recorder=recorder)
    rows = pq.read_table(next((tmp_path / "log/data").rglob("*.parquet"))).to_pydict()
    assert rows["held"] == [True, False, False, False, True, False] * 2
    assert rows["sent"] == [False, True, True, True, False, True] + [False] * 6


def test_each_camera_is_recorded_under_its_name(tmp_path):
    class TwoCameras(Robot):
        camera = "front"

        def observe(self):
            views = {} if len(self.commands) == 4 else {"wrist": np.full((16, 32, 3), 200, np.uint8)}
            return replace(super().observe(), views=views)

    robot = TwoCameras()
    message = (
        r"expected the cameras observation.images.front, observation.images.wrist, .* got observation.images.front"
    )
    with pytest.raises(ValueError, match=message), DatasetRecorder(tmp_path / "log", robot, fps=10) as recorder:
        run(robot, [[1, 2, 3, 4]] * 3, steps=6, recorder=recorder)
    front, wrist = (
        LeRobotDataset(tmp_path / "log", camera=f"observation.images.{name}") for name in ("front", "wrist")
    )
    assert front.frames(0).shape == (4, 32, 48, 3)
    assert wrist.frames(0).shape == (4, 16, 32, 3)
    np.testing.assert_allclose(wrist.frames(0).mean(), 200, atol=2)


def test_a_recording_takes_little_memory_and_survives_a_failure(tmp_path):
    class Failing(Robot):
        def observe(self):
            if len(self.commands) == 30:
                raise OSError("camera")
            seen = super().observe()
            self.shared[:] = seen.frame  # one buffer for all frames, as in drivers
            return replace(seen, frame=self.shared)

        shared = np.zeros((32, 48, 3), np.uint8)

    robot = Failing()
    with pytest.raises(OSError, match="camera"), DatasetRecorder(tmp_path / "log", robot, fps=10) as recorder:
        run(robot, [[1, 2, 3, 4]] * 3, steps=100, recorder=recorder)
    assert not any(step.observation.frame.size for step in recorder._steps)
    dataset = LeRobotDataset(tmp_path / "log", camera="observation.images.ego_view")
    assert len(dataset.actions(0)) == 30
    shades = dataset.frames(0)[[0, 10, 29]].mean((1, 2, 3))
    np.testing.assert_allclose(shades, [0, 10, 29], atol=2)


def test_a_changed_frame_size_ends_the_run_and_keeps_the_recording(tmp_path):
    class Changing(Robot):
        def observe(self):
            seen = super().observe()
            return replace(seen, frame=np.zeros((32, 64, 3), np.uint8)) if len(self.commands) == 5 else seen

    robot = Changing()
    message = r"expected frames of \(32, 48, 3\) of .*ego_view, as in the first step, got \(32, 64, 3\)"
    with pytest.raises(ValueError, match=message), DatasetRecorder(tmp_path / "log", robot, fps=10) as recorder:
        run(robot, [[1, 2, 3, 4]] * 3, steps=10, recorder=recorder)
    dataset = LeRobotDataset(tmp_path / "log", camera="observation.images.ego_view")
    assert len(dataset.actions(0)) == len(dataset.frames(0)) == 5
    assert robot.stops == 1


def test_a_run_that_fails_at_once_leaves_no_recording(tmp_path):
    class Broken(Robot):
        def observe(self):
            raise OSError("camera")

    robot = Broken()
    with pytest.raises(OSError, match="camera"), DatasetRecorder(tmp_path / "log", robot, fps=10) as recorder:
        run(robot, [[1, 2, 3, 4]], recorder=recorder)
    assert list(tmp_path.iterdir()) == []


def test_steps_without_a_command_or_pose_are_not_recorded(tmp_path):
    class WithoutPose(Robot):
        def pose(self, observation):
            return None

    robot = WithoutPose()
    with DatasetRecorder(tmp_path / "log", robot, fps=10) as recorder:
        run(robot, [[1, 2, 3, 4]] * 3, steps=6, delay=2, recorder=recorder)
    assert len(LeRobotDataset(tmp_path / "log", camera="observation.images.ego_view").actions(0)) == 4


class Driver:
    """A driver of LeRobot's interface."""

    action_features = {"pan.pos": float, "grip.pos": float}  # noqa: RUF012
    observation_features = {"pan.pos": float, "grip.pos": float, "front": (32, 48, 3)}  # noqa: RUF012

    def __init__(self):
        self.positions = {"pan.pos": 1.0, "grip.pos": 50.0}
        self.sent, self.is_connected = [], False

    def connect(self, calibrate=True):
        self.is_connected = True

    def disconnect(self):
        self.is_connected = False

    def get_observation(self):
        return {**self.positions, "front": np.zeros((32, 48, 3), np.uint8)}

    def send_action(self, action):
        self.sent.append(action)
        self.positions = {name: (self.positions[name] + value) / 2 for name, value in action.items()}
        return action


def test_an_arm_behind_lerobots_driver():
    driver = Driver()
    arm = LeRobotArm(driver, camera="front", instruction="go", embodiment="so101", joints=("grip.pos", "pan.pos"))
    arm.connect()
    seen = arm.observe()
    assert seen.state.tolist() == [50.0, 1.0]
    assert seen.frame.shape == (32, 48, 3)
    run(arm, [[40, 2]] * 3, steps=3)
    assert driver.sent[0] == {"grip.pos": 40.0, "pan.pos": 2.0}
    assert driver.sent[-1] == pytest.approx(driver.positions, abs=2)  # the present position is the last target
    assert len(driver.sent) == 4
    arm.disconnect()
    assert not driver.is_connected
    with pytest.raises(ValueError, match="no 'elbow'"):
        LeRobotArm(driver, camera="front", instruction="go", embodiment="x", joints=("elbow",))
    with pytest.raises(ValueError, match="has no 'wrist'"):
        LeRobotArm(driver, camera="wrist", instruction="go", embodiment="x").observe()


def test_an_arm_stops_where_it_was_seen_last_when_its_camera_fails(caplog):
    class Blind(Driver):
        fails = False

        def get_observation(self):
            if self.fails or len(self.sent) == 3:
                raise TimeoutError("no new frame")
            return super().get_observation()

    driver = Blind()
    arm = LeRobotArm(driver, camera="front", instruction="go", embodiment="so101")
    with pytest.raises(TimeoutError, match="no new frame"):
        run(arm, [[90, 90]] * 10, steps=10)
    assert len(driver.sent) == 4
    assert driver.sent[-1] == {"pan.pos": 67.75, "grip.pos": 80.0}  # after two of the three commands
    assert "the arm stops at the last one that it gave" in caplog.text
    driver.fails = True
    with pytest.raises(TimeoutError, match="no new frame"):
        run(arm, [[90, 90]] * 10, steps=10)
    assert len(driver.sent) == 4, "the position of an earlier run is no target"


class TwoCameras(Driver):
    def get_observation(self):
        return {**super().get_observation(), "wrist": np.full((16, 24, 3), 7, np.uint8)}


def test_an_arm_with_two_cameras():
    arm = LeRobotArm(TwoCameras(), camera="front", extra_cameras=("wrist",), instruction="go", embodiment="so101")
    seen = arm.observe()
    assert seen.frame.shape == (32, 48, 3)
    assert seen.views["wrist"].shape == (16, 24, 3)
    with pytest.raises(ValueError, match="has no 'side'"):
        LeRobotArm(arm.driver, camera="front", extra_cameras=("side",), instruction="go", embodiment="x").observe()
    with pytest.raises(ValueError, match="expected other cameras than 'front', each once"):
        LeRobotArm(arm.driver, camera="front", extra_cameras=("front",), instruction="go", embodiment="x")


def test_the_documented_program_controls_an_arm_with_two_cameras(tmp_path, monkeypatch):
    """The program of docs/serving.md with a stand-in for LeRobot's driver, fewer steps and this server's address."""
    robot = EmbodimentSpec(state={"arm": (0, 2)}, action={"arm": (0, 2)}, views=("wrist",))
    policy = Echo(PolicySpec(name="so101", horizon=5, frame_size=(32, 48), embodiments={"so_follower": robot}))
    policy.act_batch = lambda requests: (
        policy.batches.append(requests[-1].observation)
        or [ActionChunk(actions=np.ones((5, 2), np.float32))] * len(requests)
    )
    lerobot = {
        "lerobot.cameras.opencv": {"OpenCVCameraConfig": SimpleNamespace},
        "lerobot.robots.so_follower": {
            "SO101FollowerConfig": SimpleNamespace,
            "SO101Follower": lambda config: TwoCameras() if list(config.cameras) == ["front", "wrist"] else None,
        },
    }
    for name, content in lerobot.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    page = (Path(__file__).parents[3] / "docs/serving.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with running(policy) as server:
        changes = {
            "ws://gpu-machine:8000": server.address,
            "runs/monday": str(tmp_path / "log"),
            "steps=30 * 60": "steps=9",
        }
        for old, new in changes.items():
            assert old in program
            program = program.replace(old, new)
        scope: dict = {}
        exec(program, scope)
        scope["policy"].close()
    assert policy.batches[0].views["wrist"].shape == (16, 24, 3)
    for name in ("front", "wrist"):
        recorded = LeRobotDataset(tmp_path / "log", camera=f"observation.images.{name}")
        assert len(recorded.frames(0)) == 9


class Watched(Robot):
    """Calls a function with the commands so far before every observation."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def observe(self):
        self.look([None if action is None else float(action[0]) for action in self.commands])
        return super().observe()


def test_cable_pulled_server_restarted_policy_swapped():
    """The robot holds while the server is away, continues when it is back, and follows the new policy after a swap."""
    four = spec(action=4)
    first, second = Echo4(four, value=1.0), Echo4(four, value=2.0)
    servers, happened = [], []

    def start(port=0):
        context = running(first, port=port)
        servers.append((context, context.__enter__()))

    start()
    port = servers[0][1].server.port

    def pull():  # mid-chunk: the connection breaks without a closing handshake, and the server stops
        for connection in list(servers[0][1].server.clients):
            servers[0][1].loop.call_soon_threadsafe(connection.transport.abort)
        servers[0][0].__exit__(None, None, None)

    def swap():
        server = servers[-1][1]
        source = PolicySource(load=lambda: second, stamp=lambda: 0)
        assert server.call(reload(server.service, server.server, source))

    def look(commands):
        since = commands[happened[-1][1] if happened else 0 :]
        turns = (
            ("pulled", lambda: since.count(1.0) >= 3, pull),
            ("restarted", lambda: since[-10:] == [None] * 10, lambda: start(port)),
            ("swapped", lambda: since.count(1.0) >= 3, swap),
            ("followed", lambda: since.count(2.0) >= 3, lambda: None),
        )
        if len(happened) < len(turns):
            name, reached, act = turns[len(happened)]
            if reached():
                act()
                happened.append((name, len(commands)))

    robot = Watched(look)
    client = PolicyClient(f"ws://127.0.0.1:{port}", timeout=5)
    inference = ThreadedInference(client)
    executor = Asynchronous(inference, execute_steps=2)
    report = control(robot, executor, fps=50, steps=3000, until=lambda: len(happened) == 4)
    at = dict(happened)
    assert list(at) == ["pulled", "restarted", "swapped", "followed"]
    away = [action is not None for action in robot.commands[at["pulled"] : at["restarted"]]]
    assert sum(away) <= 5, "only the rest of the last chunk is executed"
    assert report.errors > 0
    assert robot.stops == 1
    inference.close()
    client.close()
    servers[-1][0].__exit__(None, None, None)


class Echo4(Echo):
    def __init__(self, policy_spec, *, value):
        super().__init__(policy_spec)
        self.value = value

    def act_batch(self, requests):
        return [ActionChunk(actions=np.full((5, 4), self.value, np.float32)) for _ in requests]


def test_a_refused_observation_stops_the_robot():
    with running(Echo(spec(state=9))) as server:
        robot = Robot()
        inference = ThreadedInference(PolicyClient(server.address))
        with pytest.raises(ServerRefused, match=r"expected \(9,\) float"):
            control(robot, Asynchronous(inference, execute_steps=2), fps=50, steps=200)
        assert robot.stops == 1
        inference.close()

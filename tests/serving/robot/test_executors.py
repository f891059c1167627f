"""Executors with a policy whose correct action is the number of the control step."""

import threading

import numpy as np
import pytest

from agra.serving.client import ServerLost
from agra.serving.robot.executors import (
    EXECUTORS,
    Asynchronous,
    DelayedInference,
    RealTimeChunking,
    Synchronous,
    TemporalEnsemble,
    ThreadedInference,
    make_executor,
)
from agra.types import ActionChunk, Observation

HORIZON = 12


def observe(step):
    return Observation(
        frame=np.zeros((16, 16, 3), np.uint8), state=np.array([step], np.float32), instruction="go", embodiment="robot"
    )


class Counting:
    """Plans the action n for control step n. Records the steps of its requests and their continuations."""

    def __init__(self):
        self.requested, self.continuations, self.seeds = [], [], []
        self.lost = False

    def reset(self, seed):
        self.seeds.append(seed)

    def act(self, observation, *, continuation=None):
        if self.lost:
            raise ServerLost("gone")
        now = observation.state[0]
        self.requested.append(int(now))
        self.continuations.append(continuation)
        return ActionChunk(actions=(now + np.arange(HORIZON, dtype=np.float32))[:, None])


def play(executor, steps=60):
    executor.reset(3)
    return [executor.step(observe(step)) for step in range(steps)]


@pytest.mark.parametrize("name", EXECUTORS)
def test_requests_carry_the_past_that_the_policy_reads(name):
    """Known from the first answer on, when the episode has no past yet."""

    class Reading(Counting):
        past = (-3, -1)

        def act(self, observation, *, continuation=None):
            self.steps = [*getattr(self, "steps", []), [int(moment.state[0]) for moment in observation.past]]
            return super().act(observation, continuation=continuation)

    policy = Reading()
    play(make_executor(name, DelayedInference(policy, 0), execute_steps=2), steps=8)
    assert policy.steps[0] == []
    assert len(policy.requested) > 3
    for now, steps in zip(policy.requested[1:], policy.steps[1:], strict=True):
        assert steps == [max(0, now - 3), now - 1]


@pytest.mark.parametrize("delay", [0, 1, 2, 4])
@pytest.mark.parametrize("name", ["asynchronous", "ensemble", "rtc"])
def test_each_action_is_executed_at_its_own_step(name, delay):
    commands = play(make_executor(name, DelayedInference(Counting(), delay), execute_steps=6))
    assert all(command.action is None for command in commands[:delay])
    for step, command in enumerate(commands[delay:], start=delay):
        assert command.action[0] == pytest.approx(step)
    assert {command.delay for command in commands} - {None} == {delay}


@pytest.mark.parametrize("delay", [0, 1, 4])
def test_synchronous_execution_holds_while_it_waits(delay):
    policy = Counting()
    commands = play(Synchronous(DelayedInference(policy, delay), execute_steps=6))
    period = 6 + delay
    assert policy.requested == list(range(0, 60, period))
    for step, command in enumerate(commands):
        turn, phase = divmod(step, period)
        if phase < delay:
            assert command.action is None
        else:
            assert command.action[0] == turn * period + phase - delay  # late by the delay
            assert command.age == phase


def test_execute_steps_beyond_the_chunk_execute_all_of_it():
    policy = Counting()
    play(Synchronous(DelayedInference(policy, 0), execute_steps=100), steps=2 * HORIZON)
    assert policy.requested == [0, HORIZON]


def test_asynchronous_execution_requests_while_it_executes():
    policy = Counting()
    commands = play(Asynchronous(DelayedInference(policy, 3), execute_steps=5), steps=20)
    assert policy.requested == [0, 5, 10, 15]
    assert [c.age for c in commands] == [0, 0, 0, 3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 3, 4]


def test_the_robot_holds_when_a_chunk_ends_before_the_next_arrives():
    commands = play(Asynchronous(DelayedInference(Counting(), 8), execute_steps=HORIZON - 2), steps=30)
    assert [c.action is None for c in commands[HORIZON:18]] == [True] * 6
    assert commands[18].action[0] == 18


@pytest.mark.parametrize("delay", [HORIZON, HORIZON + 3])
@pytest.mark.parametrize("name", ["asynchronous", "ensemble", "rtc"])
def test_the_robot_holds_when_each_chunk_arrives_after_its_end(name, delay):
    commands = play(make_executor(name, DelayedInference(Counting(), delay), execute_steps=6))
    assert all(command.action is None for command in commands)
    assert {command.delay for command in commands} == {None, delay}


def test_rtc_sends_the_rest_of_the_chunk_and_the_longest_delay():
    policy = Counting()
    play(RealTimeChunking(DelayedInference(policy, 3), execute_steps=5), steps=12)
    first, second, third = policy.continuations
    assert first is None
    for continuation, requested in ((second, 5), (third, 10)):
        assert continuation.delay == 3
        assert continuation.actions[0, 0] == requested  # the action of the observation's own control step
        assert len(continuation.actions) == HORIZON - 5


def test_ensembling_averages_with_acts_weights():
    class Constant(Counting):
        def act(self, observation, *, continuation=None):
            return ActionChunk(actions=np.full((HORIZON, 1), float(observation.state[0]), np.float32))

    executor = TemporalEnsemble(DelayedInference(Constant(), 0), decay=0.5)
    executor.reset(0)
    actions = [executor.step(observe(step)).action[0] for step in range(3)]
    weights = np.exp(-0.5 * np.arange(3))
    assert actions[2] == pytest.approx((weights * [0, 1, 2]).sum() / weights.sum())


@pytest.mark.parametrize("name", EXECUTORS)
def test_after_a_loss_the_rest_of_the_chunk_is_executed(name):
    policy = Counting()
    executor = make_executor(name, DelayedInference(policy, 1), execute_steps=4)
    executor.reset(0)
    before = [executor.step(observe(step)) for step in range(8)]
    assert before[-1].error is None
    policy.lost = True
    during = [executor.step(observe(step)) for step in range(8, 40)]
    assert any(command.error == "gone" for command in during)
    assert all(command.action is None for command in during[-10:])
    policy.lost = False
    after = [executor.step(observe(step)) for step in range(40, 50)]
    assert after[-1].action is not None
    assert after[-1].error is None


def test_threaded_inference_answers_later():
    go = threading.Event()

    class Slow(Counting):
        def act(self, observation, *, continuation=None):
            go.wait(10)
            return super().act(observation)

    inference = ThreadedInference(Slow())
    executor = Asynchronous(inference, execute_steps=4)
    executor.reset(7)
    assert executor.step(observe(0)).action is None
    assert executor.step(observe(1)).action is None
    go.set()
    inference._result.result(10)
    command = executor.step(observe(2))
    assert (command.action[0], command.delay, inference.policy.seeds[-1]) == (2, 2, 7)
    inference.close()


def test_invalid_settings_are_refused():
    inference = DelayedInference(Counting(), 0)
    for call in (
        lambda: Synchronous(inference, execute_steps=0),
        lambda: TemporalEnsemble(inference, decay=float("nan")),
        lambda: DelayedInference(Counting(), -1),
        lambda: make_executor("magic", inference, execute_steps=1),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()

"""The model server for vla-evaluation-harness: against its package where installed, else against a stand-in."""

import asyncio
import dataclasses
import importlib.util
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from agra.serving.client import ServerRefused
from agra.types import Observation, with_past
from tests.support import vla_eval_stand_in
from tests.support.echo import ACTION, Echo, expected, running, spec, wait_for

FILE = Path(__file__).parents[2] / "integrations/vla_evaluation_harness/agra_server.py"
REAL = importlib.util.find_spec("vla_eval") is not None
if not REAL:
    vla_eval_stand_in.install()


def load():
    module_spec = importlib.util.spec_from_file_location("agra_vla_eval_server", FILE)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


agra_server = load()


def message(seed=0, **changes):
    """An observation as the harness's LIBERO sends it, with a state of the echo's size."""
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (32, 48, 3), np.uint8) for name in ("agentview", "wrist")}
    state = rng.normal(size=4)
    return {"images": images, "states": state, "task_description": "go", **changes}


def as_observation(seed=0):
    sent = message(seed)
    state = sent["states"].astype(np.float32)
    return Observation(frame=sent["images"]["agentview"], state=state, instruction="go", embodiment="robot")


def make(policy, **options):
    return agra_server.AgraModelServer(policy.address, **{"camera": "agentview", "execute_steps": 3, **options})


def context(session="session"):
    from vla_eval.model_servers.base import SessionContext

    ctx = SessionContext(session, "episode")
    ctx.sent = []

    async def send(action):
        ctx.sent.append(action)

    ctx._send_action_fn = send
    return ctx


async def episode(server, seeds, ctx, config=None):
    """Play observations `seeds` in one episode. Returns its actions (N, D)."""
    await server.on_episode_start(config or {"task": {"name": "t", "episode_idx": 0}}, ctx)
    first = len(ctx.sent)
    for seed in seeds:
        await server.on_observation(message(seed), ctx)
    await server.on_episode_end({"metrics": {"success": True}, "steps": len(seeds)}, ctx)
    return np.stack([action["actions"] for action in ctx.sent[first:]])


def play(server, *episodes):
    async def run():
        await server.on_serve_start(None)
        return [await episode(server, *arguments) for arguments in episodes]

    return asyncio.run(run())


def test_executes_three_actions_of_each_chunk_and_asks_again():
    with running(Echo()) as policy:
        (actions,) = play(make(policy), (range(7), context()))
    chunks = [expected(as_observation(seed)) for seed in (0, 3, 6)]
    assert np.array_equal(actions, np.concatenate([chunks[0][:3], chunks[1][:3], chunks[2][:1]]))
    assert actions.dtype == np.float32
    assert len(policy.policy.batches) == 3


def test_a_new_episode_forgets_the_chunk_even_if_the_last_one_never_ended():
    with running(Echo()) as policy:
        server, ctx = make(policy), context()

        async def run():
            await server.on_serve_start(None)
            await server.on_episode_start({"task": {}}, ctx)
            await server.on_observation(message(0), ctx)  # given up here, with two actions left
            return await episode(server, [9], ctx)

        (action,) = asyncio.run(run())
    assert np.array_equal(action, expected(as_observation(9))[0])


def test_seeds_follow_from_task_and_episode_alone():
    def task(index):
        return {"task": {"name": "t", "episode_idx": index}, "recording": {"sid": "s", "eid": str(index)}}

    with running(Echo()) as policy:
        server = make(policy)
        played = [([0], context("a"), task(0)), ([0], context("a"), task(1)), ([0], context("b"), task(0))]
        play(server, *played)
        play(make(policy, seed=1), ([0], context(), task(0)))
        first, second, again, other = policy.policy.seeds
    assert first == again
    assert len({first, second, other}) == 3


def test_a_policy_that_reads_past_observations_gets_those_of_its_own_episode():
    seen = []

    class Recorder(Echo):
        def act_batch(self, requests):
            seen.extend(request.observation for request in requests)
            return super().act_batch(requests)

    past = (-2, -1)
    with running(Recorder(dataclasses.replace(spec(), past=past))) as policy:
        play(make(policy), (range(4), context()), ([7], context()))
    rows = [as_observation(seed) for seed in range(4)]
    wanted = [(rows[0], []), (rows[3], rows[:3]), (as_observation(7), [])]
    assert len(seen) == len(wanted)
    for observation, (present, earlier) in zip(seen, wanted, strict=True):
        assert np.array_equal(observation.frame, present.frame)
        for got, want in zip(observation.past, with_past(present, earlier, past).past, strict=True):
            assert np.array_equal(got.frame, want.frame)
            assert np.array_equal(got.state, want.state)


def test_sessions_of_a_batch_get_their_own_answers():
    with running(Echo(seconds=0.1)) as policy:
        server = make(policy, max_batch_size=4)
        contexts = [context(str(row)) for row in range(4)]

        async def start():
            for ctx in contexts:
                await server.on_episode_start({"task": {"name": ctx.session_id}}, ctx)

        asyncio.run(start())
        batch = [{"observation": as_observation(seed)} for seed in range(4)]
        results = server.predict_batch(batch, contexts)
    for seed, result in enumerate(results):
        assert np.array_equal(result["actions"], expected(as_observation(seed)))
    assert max(policy.policy.batches) > 1  # sent at once


@pytest.mark.parametrize(
    ("options", "changes", "text"),
    [
        ({"camera": None}, {}, "camera: expected the only image.*'agentview', 'wrist'"),
        ({"camera": "top"}, {}, "camera: expected 'top'"),
        ({}, {"states": np.zeros(8)}, "takes 4 numbers of 'robot', got 8 from {'states': 8}"),
        ({"state_keys": ["arm/hand"]}, {"arm": {"elbow": 1}}, "'arm/hand' is not in the observation"),
    ],
)
def test_an_observation_that_does_not_fit_is_named(options, changes, text):
    with running(Echo()) as policy:
        server, ctx = make(policy, **options), context()

        async def run():
            await server.on_serve_start(None)
            await server.on_episode_start({}, ctx)
            await server.on_observation(message(**changes), ctx)

        with pytest.raises(ValueError, match=text):
            asyncio.run(run())


def test_state_keys_are_joined_in_order_and_parts_of_maps_found():
    with running(Echo()) as policy:
        server = make(policy, state_keys=["state/arm", "gripper"])
        whole = message()["states"]
        sent = message(states=None, state={"arm": whole[:3], "base": 0}, gripper=whole[3])
        assert np.array_equal(server._read(sent).state, whole.astype(np.float32))


def test_settings_that_do_not_fit_are_refused_at_the_start():
    with running(Echo()) as policy:
        with pytest.raises(ValueError, match=r"embodiment: expected one of \['robot'\], got 'so101'"):
            make(policy, embodiment="so101")
        with pytest.raises(ValueError, match="execute_steps: expected at least 1"):
            make(policy, execute_steps=0)
        with pytest.raises(ValueError, match="action_spec: expected 3 dims in total, got 4"):
            make(policy, action_spec={"position": {"dims": 4, "format": "delta_xyz"}})
        server = make(policy, action_spec={"position": {"dims": 3, "format": "delta_xyz", "range": [-1, 1]}})
        assert server.get_action_spec()["position"].range == (-1, 1)
        assert make(policy).get_action_spec()["actions"].dims == ACTION
        assert make(policy).get_observation_params() == {"send_state": True}


def test_a_refusal_of_the_policy_reaches_the_harness():
    with running(Echo()) as policy:
        server, ctx = make(policy), context()

        async def run():
            await server.on_serve_start(None)
            await server.on_episode_start({}, ctx)
            await server.on_observation(message(task_description="impossible"), ctx)

        with pytest.raises(ServerRefused, match="nobody can do this"):
            asyncio.run(run())


@pytest.mark.skipif(not REAL, reason="vla-eval is not installed")
def test_over_the_packages_own_websocket():
    """Its server, its connection and its episode runner: two episodes, with one error between them."""
    import anyio
    from vla_eval.benchmarks.base import StepBenchmark, StepResult
    from vla_eval.connection import Connection
    from vla_eval.model_servers.serve import serve_async
    from vla_eval.runners.sync_runner import SyncEpisodeRunner

    class Benchmark(StepBenchmark):
        """Counts steps and keeps actions. Observation n has seed n."""

        def reset(self, task):
            self.actions = []

        def step(self, action):
            self.actions.append(action["actions"])
            return StepResult(obs=None, reward=0.0, done=len(self.actions) >= 5, info={})

        def make_obs(self, raw_obs, task):
            return message(len(self.actions))

        def check_done(self, step_result):
            return step_result.done

        def get_step_result(self, step_result):
            return {"success": step_result.done}

        def get_tasks(self):
            return [{"name": "task"}]

        def get_metadata(self):
            return {"max_steps": 5}

    played = []

    async def run(server):
        async with anyio.create_task_group() as group:
            port = await group.start(serve_async, server, "127.0.0.1", 0)
            async with Connection(f"ws://127.0.0.1:{port}") as connection:
                assert connection.server_info["observation_params"] == {"send_state": True}
                assert connection.server_info["action_spec"]["actions"]["dims"] == ACTION
                for index in range(2):
                    benchmark = Benchmark()
                    task = {"name": "task", "episode_idx": index}
                    result = await SyncEpisodeRunner().run_episode(benchmark, task, connection, max_steps=9)
                    assert result["steps"] == 5
                    played.append(np.stack(benchmark.actions))
                    await connection.start_episode({"task": {}})
                    with pytest.raises(RuntimeError, match="takes 4 numbers"):
                        await connection.act(message(states=np.zeros(2)))
            group.cancel_scope.cancel()

    for options in ({}, {"max_batch_size": 2}):
        with running(Echo()) as policy:
            anyio.run(run, make(policy, **options))
            assert len(set(policy.policy.seeds)) == 2
    chunks = [expected(as_observation(seed)) for seed in (0, 3)]
    wanted = np.concatenate([chunks[0][:3], chunks[1][:2]])
    assert len(played) == 4
    assert all(np.array_equal(actions, wanted) for actions in played)


def test_episodes_leave_no_connection_behind():
    with running(Echo()) as policy:
        server = make(policy)

        def connections():
            return policy.service.connections._value.get()

        async def run():
            await server.on_serve_start(None)
            await server.on_episode_start({}, context("open"))
            await server.on_observation(message(), context("open"))

        asyncio.run(run())
        wait_for(lambda: connections() == 1)
        play(server, *[([0], context(str(row))) for row in range(5)])
        asyncio.run(server.on_episode_end({}, context("open")))
        wait_for(lambda: connections() == 0)


def test_a_checkpoint_in_this_process_answers_as_it_does_by_itself():
    pytest.importorskip("torch")  # the other tests need none
    from agra.policies.load import load_policy

    policy = load_policy("tabletop-agra")
    (robot,) = policy.spec.embodiments
    state, text = np.asarray(policy.stats[robot].state["mean"]), "put the apple on the plate"
    rows = [message(seed, states=state, task_description=text) for seed in range(3)]
    server = agra_server.AgraModelServer("tabletop-agra", camera="agentview", execute_steps=2)
    config, ctx = {"task": {"name": "apple", "episode_idx": 4}}, context()

    async def run():
        await server.on_serve_start(None)
        await server.on_episode_start(config, ctx)
        for row in rows:
            await server.on_observation(row, ctx)

    asyncio.run(run())
    frames = [rows[row]["images"]["agentview"] for row in (0, 2)]
    observations = [Observation(frame=f, state=state, instruction=text, embodiment=robot) for f in frames]

    def chunks(seed):
        policy.reset(seed)
        first, second = [policy.act(observation).actions for observation in observations]
        return np.stack([*first[:2], second[0]])

    got = np.stack([action["actions"] for action in ctx.sent])
    seed = zlib.crc32(b'[0, {"episode_idx": 4, "name": "apple"}]')
    np.testing.assert_allclose(got, chunks(seed), rtol=1e-4, atol=1e-6)
    assert np.abs(got - chunks(seed + 1)).max() > 1e-3


def test_a_trial_through_the_harness_equals_one_of_agras_own_loop():
    """The tabletop behind the harness's messages: the same actions in the same number of steps, until success."""
    pytest.importorskip("torch")
    from agra import load_policy, make_simulator
    from agra.evaluation.rollout import run_episode
    from agra.serving.client import PolicyClient

    simulator = make_simulator("tabletop")
    trial = simulator.trials("in_distribution")[0]
    with running(load_policy("tabletop-agra")) as policy:
        policy.call(policy.service.start(), timeout=60)
        server, ctx = agra_server.AgraModelServer(policy.address, execute_steps=8), context()

        async def run():
            await server.on_serve_start(None)
            await server.on_episode_start({"task": {"name": trial.name, "episode_idx": 0}}, ctx)
            observation = simulator.reset(trial)
            for _ in range(simulator.max_steps):
                sent = {"images": {"ego": observation.frame}, "states": observation.state}
                await server.on_observation({**sent, "task_description": observation.instruction}, ctx)
                step = simulator.step(ctx.sent[-1]["actions"])
                observation = step.observation
                if step.success:
                    break
            await server.on_episode_end({"steps": len(ctx.sent)}, ctx)
            return step.success

        success = asyncio.run(run())
        client = PolicyClient(policy.address)
        seed = zlib.crc32(json.dumps([0, {"episode_idx": 0, "name": trial.name}]).encode())
        episode = run_episode(client, simulator, dataclasses.replace(trial, seed=seed), execute_steps=8, record=False)
        client.close()
    simulator.close()
    assert episode.success == success
    np.testing.assert_array_equal(np.stack([action["actions"] for action in ctx.sent]), episode.actions)

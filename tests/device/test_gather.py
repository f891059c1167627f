"""Parameters gathered in bfloat16 under FSDP2: the numerics of the option, on two gloo processes."""

import json
import signal
import socket
from multiprocessing import get_context

import pytest
import torch

from agra.weights import read_tensors
from tests.support import gather

pytestmark = pytest.mark.slow  # two processes, half a minute of CPU


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """The folder in which the two processes left their results."""
    folder = tmp_path_factory.mktemp("gather")
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.support.gather"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=gather.work, args=(rank, port, folder)) for rank in range(gather.RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * gather.RANKS
    return folder


def distance(first, second):
    """The distance of all gradients together, relative to those of `second`."""
    first, second = (
        torch.cat([g[name].flatten() for name in sorted(second) if name != "loss"]) for g in (first, second)
    )
    return ((first - second).norm() / second.norm()).item()


def test_parameters_arrive_in_the_type_that_the_option_says(computed):
    for rank in range(gather.RANKS):
        seen = json.loads((computed / f"rank_{rank}.json").read_text())["dtypes"]
        assert seen == {"float32": "torch.float32", "autocast": "torch.float32", "gathered": "torch.bfloat16"}


def test_gathering_rounds_about_as_much_as_autocast_does(computed):
    """Beside the products, which autocast rounds either way, gathering rounds what parameters meet elsewhere: normalised
    queries and keys, the affine norms, and the tokens of the action head, which its embeddings otherwise keep in float32.

    One rounding changes a number by up to 2^-9 = 0.2 % of it. Autocast's own move this gradient by 2.7 % from the float32
    one, gathering's by 2.5 % from autocast's. The tolerance is twice what autocast moves it, and 5 %.
    """
    exact, autocast, gathered = (read_tensors(computed / f"{name}.safetensors") for name in gather.WAYS)
    of_autocast, of_gathering = distance(autocast, exact), distance(gathered, autocast)
    assert 0 < of_autocast < 0.05
    assert 0 < of_gathering < min(0.05, 2 * of_autocast)
    assert distance(gathered, exact) < 2 * of_autocast
    assert gathered["loss"].item() == pytest.approx(exact["loss"].item(), rel=2**-7)


def test_of_two_signals_the_higher_number_stops_the_run(computed):
    """SIGTERM to one process and SIGINT to another are no signal 8."""
    stopped_by = [json.loads((computed / f"rank_{rank}.json").read_text())["signal"] for rank in range(gather.RANKS)]
    assert stopped_by == [signal.SIGTERM] * gather.RANKS

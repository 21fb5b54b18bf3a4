"""How long a prompt may be for the memory of its prefill."""

import pytest

from sglang_mm.config import Config
from sglang_mm.parallel.memory import ModelSizes, Tower, even_table
from sglang_mm.serving.room import longest_prefill

TOWER = Tower(layers=32, hidden=1280, intermediate=3420, heads=16, pixels=1176, merge=2)
QWEN_7B = ModelSizes(28, 3584, 18944, 28, 4, 128, 152064, 128000, False, 2, TOWER)
GIB = 1 << 30


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("cp", [1, 3, 8])
def test_the_longest_prompt_is_the_last_that_fits(cp, fused):
    config = Config(cp=cp)

    def needs(tokens):
        return even_table(QWEN_7B, config, tokens, fused=fused).prefill

    longest = longest_prefill(QWEN_7B, config, 8 * GIB, 1 << 24, fused=fused)
    assert needs(longest) <= 8 * GIB < needs(longest + 64)
    assert longest_prefill(QWEN_7B, config, 8 * GIB, 1000, fused=fused) == 1000
    assert longest_prefill(QWEN_7B, config, 0, 1 << 24, fused=fused) == 0


def test_more_replicas_take_longer_prompts():
    longest = [longest_prefill(QWEN_7B, Config(cp=cp), 8 * GIB, 1 << 24, fused=True) for cp in (1, 2, 8)]
    assert longest[0] > 100_000 and longest[1] > 1.7 * longest[0] and longest[2] > 6 * longest[0]

"""What SGLang is told about shared pages, without an engine; test_decode.py has the rest."""

from types import SimpleNamespace

import pytest
import torch

import sglang_mm
from sglang_mm.config import ENV, Config
from sglang_mm.types import page_for

assert sglang_mm.Engine  # before SGLang is imported: it decides then on which platform it is
from sglang_mm.serving import kv_pool  # noqa: E402


@pytest.fixture
def chosen(monkeypatch):
    def choose(**arguments) -> None:
        monkeypatch.setenv(ENV, "")
        Config(**arguments).to_env()

    return choose


@pytest.mark.parametrize(
    ("arguments", "price"), [({"cp": 4}, 250), ({"cp": 3}, 334), ({"cp": 4, "kv": "replicated"}, 1000)]
)
def test_a_token_costs_a_rank_its_share(chosen, arguments, price):
    chosen(**arguments)
    assert kv_pool.bytes_of_token(1000) == price


@pytest.mark.parametrize("cp", range(2, 9))
def test_kernels_for_powers_of_two_are_not_asked_for_other_pages(cp):
    """tl.arange of SGLang's allocation kernels takes nothing else."""
    allocator = SimpleNamespace(page_size=page_for(cp), use_triton_kernels=True)
    kv_pool.pages_of_any_size(None, allocator)
    assert allocator.use_triton_kernels == (cp in (2, 4, 8))


def test_only_attention_over_all_keys_gets_a_shared_pool(chosen):
    chosen(cp=2)

    def stock(configurator, *, kind, default):
        return default

    assert kv_pool.pool_class(stock, None, kind="mha", default=dict) is kv_pool.ShardedKVPool
    assert kv_pool.pool_class(stock, None, kind="mla", default=dict) is dict
    chosen(cp=2, kv="replicated")
    assert kv_pool.pool_class(stock, None, kind="mha", default=dict) is dict


def test_pages_of_66_are_allocated_one_after_another():
    """SGLang's torch functions, on a prefix that ends inside a page."""
    from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive

    found, free = torch.empty(100, dtype=torch.int64), torch.arange(1, 9)
    given = torch.tensor([70]), torch.tensor([170]), torch.tensor([4 * 66 + 3])
    alloc_extend_naive(*given, free, found, 66, "cpu")
    assert found.tolist() == [*range(4 * 66 + 4, 5 * 66), *range(66, 66 + 38)]

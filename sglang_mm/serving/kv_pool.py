"""The K/V pool of one rank where pages are shared (`--kv sharded`): SGLang's own, with 1/C of the rows of each page.

Allocator, prefix cache and slot table stay SGLang's and count whole pages, alike on every rank; only what reads or
writes K/V knows that a rank keeps a part.
"""

from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool, unwrap_write_loc, write_loc_is_physical
from sglang.srt.runtime_context import get_parallel, get_schedule

from sglang_mm.config import Config
from sglang_mm.types import Residence


def residence_of(config: Config, rank: int) -> Residence:
    """What replica `rank` of C keeps."""
    if config.keepers == 1:
        return Residence(1, 0, 1)
    return Residence(config.keepers, rank, get_schedule().page_size)


class ShardedKVPool(MHATokenToKVPool):
    """size, page_size: SGLang's, of all ranks together. Buffers have (size + page_size) / C rows: `residence.local`."""

    def __init__(self, size: int, page_size: int, *args, **kwargs):
        config = Config.from_env()
        self.residence = residence_of(config, get_parallel().attn_cp_group.rank_in_group)
        super().__init__(size // config.keepers, page_size // config.keepers, *args, **kwargs)

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, *args, **kwargs):
        """Write what this rank keeps of the rows; the rest goes to the padding page. No shape depends on the slots."""
        slots, _, _ = unwrap_write_loc(loc_info)
        where = KVWriteLoc(self.residence.local(slots), physical=write_loc_is_physical(loc_info))
        super().set_kv_buffer(layer, where, cache_k, cache_v, *args, **kwargs)


def pool_class(original, configurator, *, kind, default):
    """Around-hook on KVCacheConfigurator._resolve_kv_pool_class."""
    config = Config.from_env()
    if kind == "mha" and config is not None and config.keepers > 1:
        return ShardedKVPool
    return original(configurator, kind=kind, default=default)


def pages_of_any_size(result, allocator, *_args, **_kwargs):
    """After-hook on PagedTokenToKVPoolAllocator.__init__: its Triton kernels take pages of powers of two alone, which
    three ranks cannot share; its own torch functions take any.
    """
    if allocator.page_size & (allocator.page_size - 1):
        allocator.use_triton_kernels = False
    return result


def bytes_of_token(cell_size: int, *_args, **_kwargs) -> int:
    """After-hook on DefaultPoolConfigurator._compute_cell_size: what a token costs each of the ranks that share it."""
    config = Config.from_env()
    return -(-cell_size // config.keepers) if config is not None else cell_size

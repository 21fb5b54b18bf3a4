"""FlashInfer without a GPU: what its kernels are given, and what they say they compute, in plain torch.

`Twin` stands for the library where it is not installed. `Installed` is the library itself, its Python as it is, with
nothing but the compiled kernels replaced. Both end in `Paged`, the arguments of a kernel, so that tests decode those.

M rows of q, N rows of k; S requests (rows of blocks), C keys of a page, D head dim.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_mm.kernels.flashinfer_backend import plan, plan_cache

LOG2E = 1.4426950408889634
CUSTOM_MASK = 2  # MaskMode::kCustom
NO_MASK = 0


@dataclass(frozen=True, eq=False)
class Paged:
    """q_M1D, k_N1D, v_N1D; int32 q_ptr [S + 1] in rows, page_ptr [S + 1], pages; mask uint8 and mask_ptr, or None.

    Bit j % 8 of byte mask_ptr[s] + j / 8 says whether row i of request s sees its key n: j = i * (keys of s) + n.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_ptr: Tensor
    page_ptr: Tensor
    pages: Tensor
    size: int
    mask: Tensor | None
    mask_ptr: Tensor | None
    scale: float
    out_dtype: torch.dtype

    def requests(self):
        """(rows of q, rows of k, seen bool [rows, keys]) of each request."""
        for s in range(len(self.q_ptr) - 1):
            rows = torch.arange(int(self.q_ptr[s]), int(self.q_ptr[s + 1]))
            pages = self.pages[int(self.page_ptr[s]) : int(self.page_ptr[s + 1])].long()
            keys = (pages[:, None] * self.size + torch.arange(self.size)).flatten()
            yield rows, keys, self._seen(s, len(rows), len(keys))

    def _seen(self, s: int, rows: int, keys: int) -> Tensor:
        if self.mask is None:
            return torch.ones(rows, keys, dtype=torch.bool)
        bit = torch.arange(rows * keys)
        return (self.mask[int(self.mask_ptr[s]) + bit // 8] >> bit % 8 & 1).bool().view(rows, keys)


def attention(paged: Paged) -> tuple[Tensor, Tensor]:
    """(out [M, 1, D] in 16 bits, lse fp32 [M, 1] to base 2). Weights are rounded to 16 bits for the second product."""
    out, lse = torch.zeros_like(paged.q, dtype=paged.out_dtype), torch.full(paged.q.shape[:2], float("-inf"))
    for rows, keys, seen in paged.requests():
        scores = paged.q[rows, 0].float() @ paged.k[keys, 0].float().T * (paged.scale * LOG2E)
        scores = scores.masked_fill(~seen, float("-inf"))
        top = scores.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        weights = torch.exp2(scores - top)
        total = weights.sum(1, keepdim=True)
        product = weights.to(paged.v.dtype).float() @ paged.v[keys, 0].float()
        out[rows, 0] = (product / total.clamp(min=1e-30)).to(paged.out_dtype)
        lse[rows, 0] = (top + torch.log2(total)).squeeze(1)
    return out, lse


class Twin:
    """BlockSparseAttentionWrapper: the part of it that the backend uses, with the library's defaults."""

    def __init__(self, ran: list[Paged]):
        self.ran, self.plans = ran, 0

    def plan(
        self, indptr, indices, M, N, R, C, num_qo_heads, num_kv_heads, head_dim, mask=None, packed_mask=None,
        sm_scale=None, q_data_type="float16", kv_data_type=None, o_data_type="float16",
    ):  # fmt: skip
        assert indptr.dtype == indices.dtype == torch.int32 and len(indices) == int(indptr[-1])
        assert N % C == 0 and bool((indices >= 0).all()) and int(indices.max()) < N // C
        assert num_qo_heads == num_kv_heads == 1 and (len(indptr) - 1) * R == M and R >= 4 and mask is None
        self.plans += 1
        self._given = SimpleNamespace(**locals())
        self._mask_indptr_buf = None
        if packed_mask is not None:
            self._mask_indptr_buf = (indptr * (R * C)).int()  # of bits; kernels count bytes (their pull request 2201)

    def run(self, q, k, v, return_lse=False):
        given = self._given
        assert q.shape == (given.M, 1, given.head_dim) and k.shape == v.shape == (given.N, 1, given.head_dim)
        assert return_lse and q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
        dtypes = {"float16": torch.float16}
        assert q.dtype == dtypes.get(given.q_data_type, given.q_data_type) == k.dtype == v.dtype
        rows = torch.arange(len(given.indptr), dtype=torch.int32) * given.R
        scale = given.head_dim**-0.5 if given.sm_scale is None else given.sm_scale
        out_dtype = dtypes.get(given.o_data_type, given.o_data_type)
        paged = Paged(
            q, k, v, rows, given.indptr, given.indices, given.C, given.packed_mask, self._mask_indptr_buf,
            scale, out_dtype,
        )  # fmt: skip
        self.ran.append(paged)
        return attention(paged)


class Installed:
    """The library's wrapper on CPU. Its plan and run are its own; of its kernels, only `attention` is left."""

    def __new__(cls, ran: list[Paged]):
        from flashinfer import sparse

        usual = torch.empty
        with pytest.MonkeyPatch.context() as patch:  # pinned memory needs a GPU
            patch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **how: usual(*sizes, **how))
            return sparse.BlockSparseAttentionWrapper(usual(1024, dtype=torch.uint8))

    @staticmethod
    def replace_kernels(monkeypatch: pytest.MonkeyPatch, ran: list[Paged]) -> None:
        sparse = pytest.importorskip("flashinfer").sparse

        def paged_run(
            float_workspace, int_workspace, plan_info, q, k, v, q_ptr, page_ptr, pages, last_page_len, out, lse,
            mask_mode, layout, window_left, enable_pdl, mask, mask_ptr, alibi, prefix_len, token_pos, max_item_len,
            logits_soft_cap, sm_scale, *_,
        ):  # fmt: skip
            assert mask_mode == (NO_MASK if mask is None else CUSTOM_MASK) and window_left == -1 and not logits_soft_cap
            size = k.shape[1]
            assert bool((last_page_len == size).all())
            k, v = (each.reshape(-1, *each.shape[2:]) for each in (k, v))
            ran.append(Paged(q, k, v, q_ptr, page_ptr, pages, size, mask, mask_ptr, sm_scale, out.dtype))
            for mine, theirs in zip(attention(ran[-1]), (out, lse)):
                theirs.copy_(mine)

        kernels = SimpleNamespace(plan=lambda *_: "planned", paged_run=paged_run)
        monkeypatch.setattr(sparse, "get_batch_prefill_module", lambda *_: kernels)
        monkeypatch.setattr(sparse, "get_batch_decode_module", None)  # for blocks of few rows: never to be reached
        monkeypatch.setattr(sparse, "determine_attention_backend", lambda *_, **__: "fa2")
        monkeypatch.setattr(sparse, "device_support_pdl", lambda _: False)


@dataclass
class Library:
    """ran: what kernels were given, call by call. made: the wrappers."""

    ran: list[Paged] = field(default_factory=list)
    made: list[Any] = field(default_factory=list)


def put_in_place(monkeypatch: pytest.MonkeyPatch, kind: type) -> Library:
    """The backend makes wrappers of this kind until the test ends; it has no plans yet, and keeps none after that."""
    library = Library()
    if kind is Installed:
        Installed.replace_kernels(monkeypatch, library.ran)
    monkeypatch.setattr(plan_cache, "_plans", OrderedDict())
    monkeypatch.setattr(plan, "_new_wrapper", lambda device: library.made.append(kind(library.ran)) or library.made[-1])
    return library

"""Which requests are sparse: their parameter, their key in the prefix cache, how long they are; and records, joined."""

from array import array
from types import SimpleNamespace

import pytest

from sglang_mm import Engine  # before SGLang: it decides then on which platform it is
from sglang_mm.config import Config
from sglang_mm.errors import ConfigError
from sglang_mm.serving import sparse_record, sparse_request
from sglang_mm.serving.media_access import RequestError
from sglang_mm.serving.prompts import KnownPrompts, Prompt
from sglang_mm.serving.sparse_method import KNOWN_PLAN, cache_key, is_sparse, with_known_plan
from sglang_mm.serving.sparse_record import LayerTold, Told, join_chunks, join_replica, join_ring, record_of

assert Engine
AUTO = Config(sparse="auto")
MANAGER = SimpleNamespace(preferred_sampling_params=None)


@pytest.fixture
def serving(monkeypatch):
    """serving(config): requests of this process are from then on as of such a server."""
    monkeypatch.setattr(sparse_request, "_key", None)
    return sparse_request.serve


def marked(custom=None, key=None, manager=MANAGER) -> str | None:
    """The key of a request that came with custom_params and a key of its own."""
    obj = SimpleNamespace(sampling_params={"custom_params": custom}, extra_key=key)
    sparse_request.mark_sparse(manager, obj)
    sparse_request.mark_sparse(manager, obj)  # SGLang may look at a request twice
    return obj.extra_key


def test_the_key_says_how_it_was_computed(serving):
    serving(AUTO)
    assert marked() == marked({"sparse": "on"}) == marked({"sparse": True}) == "sglang_mm:auto:frames"
    assert marked({"sparse": "off"}) is None and marked({"sparse": False}, "mine") == "mine"
    assert marked(key="mine") == "mine|sglang_mm:auto:frames"
    assert is_sparse(marked(key="mine"), cache_key(AUTO)) and not is_sparse("mine", cache_key(AUTO))
    serving(Config(sparse="auto", vision="stock"))
    assert marked() == "sglang_mm:auto:stock"


def test_a_dense_server_leaves_keys_alone(serving):
    serving(Config())
    assert marked() is None and marked({"sparse": "off"}, "mine") == "mine"
    with pytest.raises(RequestError, match="started with --sparse off"):
        marked({"sparse": "on"})


def test_what_a_server_prefers_holds_unless_the_request_says_otherwise(serving):
    serving(AUTO)
    manager = SimpleNamespace(preferred_sampling_params={"custom_params": {"sparse": "off"}})
    obj = SimpleNamespace(sampling_params={}, extra_key=None)
    sparse_request.mark_sparse(manager, obj)
    assert obj.extra_key is None and marked({"sparse": "on"}, manager=manager) is not None


@pytest.mark.parametrize("custom", [{"sparse": "auto"}, {"sparse": 1.5}, {"sparse": ["off"]}])
def test_other_values_are_refused(serving, custom):
    serving(AUTO)
    with pytest.raises(RequestError, match=r"sparse .* in custom_params.*'off' \| 'on'"):
        marked(custom)


def test_keys_like_ours_are_refused(serving):
    serving(AUTO)
    with pytest.raises(RequestError, match="a key without 'sglang_mm:'"):
        marked(key="sglang_mm:0123:frames")


def test_the_plan_in_the_checkpoint_s_folder_is_known(tmp_path):
    assert with_known_plan(AUTO, str(tmp_path)) == AUTO
    (tmp_path / KNOWN_PLAN).write_text("{}")
    assert with_known_plan(AUTO, str(tmp_path)).sparse == str(tmp_path / KNOWN_PLAN)
    assert with_known_plan(Config(), str(tmp_path)).sparse == "off"


def test_paths_are_taken_and_other_types_refused(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    assert Config(sparse=tmp_path / "plan.json", keep_selections=tmp_path).keep_selections == str(tmp_path)
    with pytest.raises(ConfigError, match="sparse=True"):
        Config(sparse=True)


@pytest.fixture
def prompts() -> KnownPrompts:
    config = SimpleNamespace(
        architectures=["Qwen2_5_VLForConditionalGeneration"], vision_start_token_id=1, vision_end_token_id=2
    )
    return KnownPrompts(config, "cpu", fewest=100)


def prompt(tokens: int, first: int = 5) -> Prompt:
    return Prompt("a", array("q", range(first, first + tokens)), True)


def test_length_counts_over_all_chunks(prompts):
    """The last chunk, and one cut short by others, go on being sparse; a short follow-up is not."""
    long = prompt(250)
    assert prompts.is_long(long, 0) and prompts.is_long(long, 150) and not prompts.is_long(long, 151)
    known = prompts.of(long, None, 0)
    known.until = 200
    assert prompts.is_long(long, 200) and not prompts.is_long(long, 210)
    assert prompts.of(long, None, 200) is known
    known.until = 250
    assert known.is_done
    prompts.forget(known)
    assert not prompts.is_long(long, 200)


def test_another_prompt_of_that_name_is_another(prompts):
    known = prompts.of(prompt(250), None, 0)
    known.until = 120
    assert prompts.of(prompt(250, first=6), None, 120) is not known


def test_records_add_up():
    """Two ranks of a ring hold one selection; two ranks of a replica have other heads; chunks follow each other."""
    first = Told([LayerTold(30, 100, 0.9, 4, 0.5, 0.1)], {"why": 1}, ["cpu"])
    ring = join_ring([first, Told([LayerTold(0, 100, 0.9, 5, 0.7, 0.1)], {"why": 1}, ["cpu"])])
    assert ring.layers == [LayerTold(30, 100, 0.9, 9, 0.7, 0.1)] and ring.fallbacks == {"why": 1}
    assert ring.tiles_per_rank == [4, 5]
    both = join_replica([ring, Told([LayerTold(10, 100, 1.0, 2)], {"why": 2}, ["triton"], ["fa4: no"], [2, 0])])
    assert both.layers == [LayerTold(40, 200, 0.9, 11, 0.7, 0.1)]
    assert (both.fallbacks, both.kernels, both.passed_over) == ({"why": 3}, ["cpu", "triton"], ["fa4: no"])
    record = record_of("auto", "auto", both)
    assert (record["density"], record["recall"], record["pairs"]) == (0.2, 0.9, {"attended": 40, "causal": 200})
    joined = join_chunks(record, record_of("auto", "auto", Told([LayerTold(200, 300, 0.95)], tiles_per_rank=[1, 1])))
    assert (joined["density"], joined["recall"], joined["tiles_per_rank"]) == (0.48, 0.9, [7, 6])
    assert joined["fallbacks"] == {"why": 3}
    dense = {"plan": "auto", "kernel_backend": "auto", "dense": "few"}
    assert join_chunks(dense, joined) == joined == join_chunks(joined, dense)
    assert sparse_record.gather_told([first], None) == [[first]]

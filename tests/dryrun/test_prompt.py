"""Which replica computes, encodes and keeps what: against counting one by one."""

import pytest
import torch

from sglang_mm.config import Config
from sglang_mm.dryrun.prompt import describe, lay_out, prompt_of, runs_of_map
from sglang_mm.errors import ConfigError
from sglang_mm.plan.geometry import parse_geometry

MIXED = "text:20,video:9x6x8,text:300,image:12x10,text:7,video:4x6x8+newline,text:33"


@pytest.mark.parametrize("kv", ["sharded", "replicated"])
@pytest.mark.parametrize("cp", [1, 2, 3, 8])
@pytest.mark.parametrize("description", [MIXED, "text:700", describe(6000)])
def test_shares_are_what_counting_says(description, cp, kv):
    tokens = parse_geometry(description)
    laid_out = lay_out(tokens, Config(cp=cp, kv=kv))
    owner = laid_out.layout.owner().tolist()
    keepers = cp if kv == "sharded" else 1
    for share in laid_out.shares:
        own = [position for position, rank in enumerate(owner) if rank == share.rank]
        assert share.rows == len(own) and share.pairs == sum(position + 1 for position in own)
        assert share.stretches == sum(position - 1 not in set(own) for position in own)
        assert share.media == sum(int(tokens.modality[position]) > 0 for position in own)
        part = laid_out.page // keepers
        kept = [p for p in range(len(tokens)) if p % laid_out.page // part == share.rank % keepers]
        assert share.kept == len(kept)
    assert sum(share.frames for share in laid_out.shares) == int((tokens.modality > 0).sum())
    assert laid_out.pages * laid_out.page >= len(tokens) > (laid_out.pages - 1) * laid_out.page


def test_runs_tile_the_prompt_with_frames_of_equal_length():
    tokens = parse_geometry(MIXED)
    runs = runs_of_map(tokens)
    assert [(run.start, run.length, run.frames, run.modality) for run in runs] == [
        (0, 20, 1, "text"), (20, 432, 9, "video"), (452, 300, 1, "text"), (752, 120, 1, "image"), (872, 7, 1, "text"),
        (879, 4 * 54, 4, "video"), (1095, 33, 1, "text"),
    ]  # fmt: skip


def test_timestamps_make_a_video_one_run():
    """Its frames are not equally far apart; what matters here is that no token is lost."""
    tokens = parse_geometry("text:9,video:5x4x6+timestamps,text:9")
    assert [run.length for run in runs_of_map(tokens)] == torch.bincount(tokens.span).tolist()


@pytest.mark.parametrize("length", [1, 40, 295, 296, 5000, 1 << 20])
def test_a_video_fills_the_prompt(length):
    _, tokens = prompt_of(length, None)
    assert len(tokens) == length
    assert (int((tokens.modality > 0).sum()) > 0) == (length >= 296)


@pytest.mark.parametrize(
    ("tokens", "description", "said"),
    [
        (None, None, "without a prompt"), (0, None, "--tokens 0"), (1 << 25, None, "1 to 16777216"),
        (10, "text:11", "of 11 tokens"), (None, "text:x", "in a prompt"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_prompt_is_refused(tokens, description, said):
    with pytest.raises(ConfigError, match=said):
        prompt_of(tokens, description)

"""Prompts that are asked sparsely, of every engine: videos, images and text, what follows, and a batch of texts.

What follows attends to cached keys. Rows that it computes again it computes by its own selection, so that all engines
have to find the same tokens cached, whatever the page of their K/V.
"""

from functools import cache

import numpy as np

from tests.serving.cases import SAMPLING, TOP, Case

SPARSE = {**SAMPLING, "custom_params": {"sparse": "on"}}
DENSE = {**SAMPLING, "custom_params": {"sparse": "off"}}
FEWEST = 256  # new tokens from which these engines compute sparsely
PAGES = 64 * 66 // 2  # tokens: whole pages of 64, of 66 (three ranks) and of one token
FIRST, SECOND, THIRD = TURNS = "sparse first", "sparse second", "sparse third"
TEXTS, SHORT, AGAIN = "sparse texts", "sparse short", "sparse asked densely"
VIDEO, IMAGE = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("video", "image"))


@cache
def dialogue(model_path: str) -> dict[str, dict]:
    """FIRST: two videos of different sizes, two images and text. What follows it: an image more, or text alone."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model_path)
    draw = np.random.default_rng(11)

    def text(count: int) -> str:
        return "".join(map(chr, draw.integers(97, 123, count)))

    def frames(count: int, rows: int, columns: int) -> np.ndarray:
        """A pattern of squares that wanders."""
        first = draw.integers(0, 256, (rows, columns, 3), dtype=np.uint8).repeat(28, 0).repeat(28, 1)
        return np.stack([np.roll(first, (9 * i, 17 * i), (0, 1)) for i in range(count)])

    videos, images = (
        [frames(24, 8, 10), frames(12, 6, 8)],
        [frames(1, *size)[0] for size in ((10, 16), (20, 14), (26, 30))],
    )

    def request(shown: str, pictures: int) -> dict:
        made = processor(
            text=[shown], videos=videos, images=images[:pictures], do_sample_frames=False, fps=2.0, return_tensors="pt"
        )
        kinds = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
        found = {
            f"{kind}_data": [{"format": "processor_output", **{n: made[n] for n in names}}]
            for kind, names in kinds.items()
        }
        found["video_data"][0]["second_per_grid_ts"] = [1.0, 1.0]
        return {"input_ids": made["input_ids"][0].tolist(), **found}

    shown = f"{VIDEO}{text(90)}{IMAGE}{text(9)}{IMAGE}{text(70)}{VIDEO}{text(30)}"
    missing = PAGES - len(request(shown, 2)["input_ids"])
    first = text(missing) + shown
    return {
        FIRST: request(first, 2),
        SECOND: request(f"{first}{text(70)}{IMAGE}{text(30)}", 3),
        THIRD: request(first + text(300), 2),
        SHORT: request(first + text(40), 2),
    }


def texts(prompts: list[Case]) -> dict:
    """A batch of two prompts of unequal length without media."""
    (ids,) = [case.request["input_ids"] for case in prompts if case.name == "text"]
    return {"input_ids": [[101, *ids[:650]], [102, *ids[200:640]]]}


def ask_all(ask, model_path: str, prompts: list[Case]) -> dict:
    """name -> answer. The first turn is asked densely too, after its sparse K/V have been cached."""
    scored, asked = {"return_logprob": True, "top_logprobs_num": TOP}, dialogue(model_path)
    told = {name: ask("generate", **asked[name], sampling_params=SPARSE, **scored) for name in asked}
    told[TEXTS] = ask("generate", **texts(prompts), sampling_params=SPARSE, **scored)
    told[AGAIN] = ask("generate", **asked[FIRST], sampling_params=DENSE, **scored)
    shown = ask("kept_prompts")[-len(asked) - 1 :]
    told["sparse prompts"] = dict(zip((*asked, AGAIN), shown, strict=True))
    return told

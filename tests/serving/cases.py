"""The prompts every rank count must answer alike: text, one image, several images, one video.

Media are processed once, by the checkpoint's own processor, and the same tensors go to every engine and to
transformers; `file` is an mp4 that SGLang decodes and samples itself.
"""

from dataclasses import dataclass, field

import numpy as np

NEW_TOKENS = 16
TOP = 20
SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
SAMPLING = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}


@dataclass(frozen=True)
class Case:
    """request: keyword arguments of Engine.generate."""

    name: str
    request: dict = field(repr=False)


def generate_arguments(case: Case) -> dict:
    return {**case.request, "sampling_params": SAMPLING, "return_logprob": True, "top_logprobs_num": TOP}


def build(model_path: str, video_path: str) -> list[Case]:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model_path)
    rng = np.random.default_rng(7)

    def picture(height: int, width: int) -> np.ndarray:
        """A smooth random image, uint8 [height, width, 3]."""
        coarse = rng.integers(0, 256, (height // 28 + 1, width // 28 + 1, 3), dtype=np.uint8)
        return np.kron(coarse, np.ones((28, 28, 1), np.uint8))[:height, :width]

    def frames(count: int, height: int, width: int) -> np.ndarray:
        first = picture(height, width)
        return np.stack([np.roll(first, (9 * i, 17 * i), (0, 1)) for i in range(count)])

    text = "".join(chr(c) for c in rng.integers(97, 123, 700))
    return [
        Case("text", {"input_ids": processor.tokenizer(text)["input_ids"]}),
        media_case("one image", processor, "Describe: ", images=[picture(728, 840)]),
        media_case("three images", processor, "Compare these: ",
                    images=[picture(224, 280), picture(448, 392), picture(392, 560)]),
        media_case("one video", processor, "What moves? ", videos=[frames(24, 224, 280)]),
        Case("video file", {"prompt": _chat(processor, ["video"], "And here? "), "video_data": [video_path]}),
    ]  # fmt: skip


def _chat(processor, kinds: list[str], question: str) -> str:
    content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": question}]
    return processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def media_case(name: str, processor, question: str, images=(), videos=()) -> Case:
    prompt = _chat(processor, ["image"] * len(images) + ["video"] * len(videos), question)
    kwargs = {"images": list(images)} if images else {"videos": list(videos), "do_sample_frames": False, "fps": 2.0}
    made = processor(text=[prompt], return_tensors="pt", **kwargs)
    tensors = {key: value for key, value in made.items() if key.startswith(("pixel", "image_grid", "video_grid"))}
    if videos:
        tensors["second_per_grid_ts"] = [1.0]
    request = {"input_ids": made["input_ids"][0].tolist()}
    request["image_data" if images else "video_data"] = [{"format": "processor_output", **tensors}]
    return Case(name, request)


def follow_ups(prompts: list[Case]) -> list[Case]:
    """Asked after the prompts: hits in the prefix cache, batches, scores, several answers, bounds on the answer."""
    by_name = {case.name: case for case in prompts}
    scored = {"sampling_params": SAMPLING, "return_logprob": True, "top_logprobs_num": TOP}
    video, text = by_name["one video"].request, by_name["text"].request
    longer = {**video, "input_ids": video["input_ids"] + list(range(40, 80)) * 20}
    other = {"input_ids": text["input_ids"][1:]}

    def bounded(**bounds) -> dict:
        return {**scored, "sampling_params": {"temperature": 0, "max_new_tokens": 24, **bounds}}

    return [
        Case("cached prefix", {**longer, **scored}),
        Case("second turn", {**longer, "input_ids": longer["input_ids"] + list(range(97, 120)) * 30, **scored}),
        Case("batch", {"input_ids": [text["input_ids"][3:], text["input_ids"][7:90]], **scored}),
        Case("input logprobs", {**other, **scored, "logprob_start_len": 100}),
        Case("all input logprobs", {**video, "input_ids": [97, *video["input_ids"]], **scored, "logprob_start_len": 0}),
        Case("asked tokens", {**other, **scored, "logprob_start_len": 7, "token_ids_logprob": [65, 66, 67]}),
        Case("unequal scores", {"sampling_params": SAMPLING, **_unequal_scores(text["input_ids"])}),
        Case("two answers", {**other, **bounded(n=2, ignore_eos=True)}),
        Case("stop string", {**other, **bounded(stop=[chr(c) for c in range(97, 117)])}),
        Case("stop token", {**other, **bounded(stop_token_ids=list(range(97, 117)))}),
        Case("regex", {**other, **bounded(regex="[0-9]{3}-[a-f]{2}")}),
        Case("json schema", {**other, **bounded(json_schema=SCHEMA)}),
        Case("short", {"input_ids": text["input_ids"][300:340], **scored}),
    ]


def _unequal_scores(ids: list[int]) -> dict:
    """A batch in which every request asks for other log-probabilities of its prompt, two of them for none."""
    return {
        "input_ids": [ids[5:], ids[9:95], ids[13:400], ids[17:120], ids[21:60]],
        "return_logprob": [True, True, False, True, True],
        "logprob_start_len": [0, 50, -1, -1, 38],
        "top_logprobs_num": [TOP, 3, 0, 2, 0],
        "token_ids_logprob": [[65, 66], None, None, [67], [68, 69, 70]],
    }


def interleaved(prompts: list[Case]) -> Case:
    """Text, video, text, image, text, in one prompt."""
    by_name = {case.name: case.request for case in prompts}
    video, image = by_name["one video"], by_name["one image"]
    ids = [*range(97, 110), *video["input_ids"], *range(100, 120), *image["input_ids"], *range(97, 107)]
    return Case("interleaved", {"input_ids": ids, "video_data": video["video_data"], "image_data": image["image_data"]})

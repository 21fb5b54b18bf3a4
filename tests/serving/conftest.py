"""One tiny checkpoint, one video and one set of answers per rank count, for the whole session."""

from functools import cache

import pytest

from sglang_mm.patterns.plan_file import read_model, save
from sglang_mm.tiny import write_checkpoint, write_video
from tests.serving import cases, plans, sparse_cases
from tests.serving.engine_process import engine

KV_TOKENS = 24_000  # a fraction of what the soak prefills, so that the cache has to evict
SOAK_REQUESTS = 200
LONG_ANSWER, LONG_PROMPT = 96, 8000  # tokens
KEEPING = (1, 3)  # replicas of the engines that keep what was selected
SOAKED = {(1, 1), (1, 2)}  # wider ones are asked in test_soak.py


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny"))


@pytest.fixture(scope="session")
def video(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("video") / "shapes.mp4"
    write_video(path, seconds=16)
    return str(path)


@pytest.fixture(scope="session")
def prompts(checkpoint, video) -> list[cases.Case]:
    shown = cases.build(checkpoint, video)
    return [*shown, cases.interleaved(shown)]


def asked_at_length(prompts) -> list[dict]:
    """Requests whose answers are decoded side by side: short, long, with media, and two that share a cached video."""
    by_name = {case.name: case.request for case in prompts}
    text, video = by_name["text"], by_name["one video"]
    second = {**video, "input_ids": video["input_ids"] + list(range(97, 117))}
    return [text, {"input_ids": text["input_ids"][9:21]}, by_name["three images"], video, second]


def long_prompt(prompts) -> cases.Case:
    """More tokens than one rank's share of KV_TOKENS."""
    (text,) = [case.request["input_ids"] for case in prompts if case.name == "text"]
    return cases.Case("long prompt", {"input_ids": [99, *(text * 12)[: LONG_PROMPT - 1]]})


def long_question(prompts) -> cases.Case:
    """Many new tokens about far more cached ones, and beside it a prompt that is not cached at all."""
    long, (text,) = long_prompt(prompts), [case.request["input_ids"] for case in prompts if case.name == "text"]
    return cases.Case("long question", {"input_ids": [[*long.request["input_ids"], *text[:540]], [100, *text[:530]]]})


@pytest.fixture(scope="session")
def plan(checkpoint, tmp_path_factory) -> str:
    """Every pattern and every boundary, each on a head of its own."""
    return str(save(plans.every_pattern(read_model(checkpoint)), tmp_path_factory.mktemp("plan") / "every.json"))


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """kept(cp): where the engine of that width keeps what its sparse requests attended to."""
    return cache(lambda cp: str(tmp_path_factory.mktemp(f"kept-{cp}")))


@pytest.fixture(scope="session")
def answers(checkpoint, prompts, plan, kept):
    """answers(tp, cp, schedule): everything asked of one engine, started when first wanted and then closed."""

    @cache
    def ask_all(tp: int, cp: int, schedule: str) -> dict | Exception:
        try:
            return ask_engine(tp, cp, schedule)
        except Exception as error:  # kept, so that an engine that does not start is not started for every test
            return error

    def ask_engine(tp: int, cp: int, schedule: str) -> dict:
        arguments = {"tp": tp, "cp": cp, "schedule": schedule, "max_total_tokens": KV_TOKENS}
        arguments |= {"sparse": plan, "sparse_min_tokens": sparse_cases.FEWEST}
        arguments["keep_selections"] = kept(cp) if tp == 1 and cp in KEEPING else ""
        with engine("tests.serving.observed:ObservedEngine", model_path=checkpoint, **arguments) as ask:
            ask("keep_prompts")
            told = {"infos": ask("rank_infos")}
            for case in prompts:
                told[case.name] = ask("generate", **cases.generate_arguments(case))
            shown = [case.name for case in prompts if {"image_data", "video_data"} & case.request.keys()]
            told["prompts"] = dict(zip(shown, ask("kept_prompts"), strict=True))
            for case in cases.follow_ups(prompts):
                told[case.name] = ask("generate", **case.request)
            told |= beyond_generate(ask, cp)
            told |= sparse_cases.ask_all(ask, checkpoint, prompts)
            if (tp, cp) in SOAKED:
                told["soak"] = ask("tests.serving.soak:run", prompts, SOAK_REQUESTS)
        return told

    def beyond_generate(ask, cp: int) -> dict:
        by_name = {case.name: case for case in prompts}
        text, video = by_name["text"], by_name["one video"]
        later = cases.Case("later", {**video.request, "input_ids": [98, 99, *video.request["input_ids"]]})
        never_ending = {**cases.SAMPLING, "max_new_tokens": 4000}
        long = {"input_ids": text.request["input_ids"] * 16, "sampling_params": never_ending}
        told = {"long prompt": ask("generate", **cases.generate_arguments(long_prompt(prompts)))}
        if cp > 1:
            told["long answers"] = ask("tests.serving.dialogue:long_answers", asked_at_length(prompts), LONG_ANSWER)
            told["most decoded"] = [state["most_decoded"] for state in ask("rank_states")]
        question = ask("generate", **cases.generate_arguments(long_question(prompts)))
        told["long question"], told["beside it"] = question
        return told | {
            "streamed": ask("tests.serving.dialogue:streamed", cases.generate_arguments(later)),
            "sampled": ask("tests.serving.dialogue:sampled_then_scored", text.request),
            "aborted": ask("tests.serving.dialogue:aborted", long, 0.3),
        }

    def answers_of(tp: int, cp: int, schedule: str = "auto") -> dict:
        told = ask_all(tp, cp, schedule)
        if isinstance(told, Exception):
            raise told
        return told

    return answers_of

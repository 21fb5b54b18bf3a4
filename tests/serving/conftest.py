"""One tiny checkpoint, one video and one set of answers per rank count, for the whole session."""

from functools import cache

import pytest

from sglang_mm.tiny import write_checkpoint, write_video
from tests.serving import cases
from tests.serving.engine_process import engine


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
    return cases.build(checkpoint, video)


@pytest.fixture(scope="session")
def answers(checkpoint, prompts):
    """answers(tp, cp): everything asked of one engine of that topology, started when first wanted and then closed."""

    @cache
    def ask_all(tp: int, cp: int) -> dict | Exception:
        try:
            return ask_engine(tp, cp)
        except Exception as error:  # kept, so that an engine that does not start is not started for every test
            return error

    def ask_engine(tp: int, cp: int) -> dict:
        with engine(model_path=checkpoint, tp=tp, cp=cp) as ask:
            ask("keep_prompts")
            told = {"infos": ask("rank_infos")}
            for case in prompts:
                told[case.name] = ask("generate", **cases.generate_arguments(case))
            told["prompts"] = ask("kept_prompts")
            for case in cases.follow_ups(prompts):
                told[case.name] = ask("generate", **case.request)
        return told

    def answers_of(tp: int, cp: int) -> dict:
        told = ask_all(tp, cp)
        if isinstance(told, Exception):
            raise told
        return told

    return answers_of

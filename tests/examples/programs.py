"""python -m tests.examples.programs URL VIDEO PICTURE: programs against a server; prints what came back as JSON."""

import json
import sys

import requests
import sglang as sgl

from sglang_mm.serving.endpoint import RuntimeEndpoint
from tests.examples.sgl_video import read_without_opencv

TOKENS = 4


@sgl.function
def ask(s, shown, question="What moves?"):
    s += sgl.user(shown + question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=TOKENS, return_logprob=True))


@sgl.function
def two_turns(s, shown):
    s += sgl.user(shown + "What moves?")
    s += sgl.assistant(sgl.gen("first", max_tokens=TOKENS))
    s += sgl.user("And where?")
    s += sgl.assistant(sgl.gen("second", max_tokens=TOKENS))


@sgl.function
def forked(s, shown):
    s += sgl.user(shown + "Tell one thing.")
    forks = s.fork(2)
    for i, fork in enumerate(forks):
        fork += sgl.assistant(f"{i}. " + sgl.gen("answer", max_tokens=TOKENS))
    s["told"] = [told(fork) for fork in forks]


@sgl.function
def constrained(s, shown):
    s += sgl.user(shown + "How many?")
    s += sgl.assistant(sgl.gen("digits", max_tokens=TOKENS, regex="[0-9]{2}"))
    s += sgl.user("Sure?")
    s += sgl.assistant(sgl.gen("choice", choices=["yes", "no", "a bit"]))


def told(state, name: str = "answer") -> dict:
    if (error := state.error()) is not None:
        raise error
    info = state.get_meta_info(name)
    scored = [logprob for logprob, *_ in info.get("output_token_logprobs", [])]
    return {key: info[key] for key in ("prompt_tokens", "cached_tokens", "sglang_mm")} | {"logprobs": scored}


def run(url: str, video: str, picture: str) -> dict:
    stock, ours = sgl.RuntimeEndpoint(url), RuntimeEndpoint(url)
    fresh = {"temperature": 0, "backend": stock}

    def shown(number: int = 8):
        return sgl.video(video, number)

    def alone(*shown, backend=ours) -> dict:
        requests.post(f"{url}/flush_cache?timeout=30", timeout=60).raise_for_status()
        media = shown[0] + shown[1] if len(shown) > 1 else shown[0]
        return told(ask.run(media, temperature=0, backend=backend))

    found = {f"{count} frames": alone(shown(count), backend=stock) for count in (16, 8, 7, 1)}
    found["picture"] = alone(sgl.image(picture), backend=stock)
    plain = sgl.RuntimeEndpoint(url, chat_template_name="default")
    found["default template"] = [alone(medium, backend=plain) for medium in (shown(), sgl.image(picture))]
    found["video first"] = alone(shown(), sgl.image(picture))
    found["picture first"] = alone(sgl.image(picture), shown())
    found["two videos"] = alone(shown(16), shown(4))
    found["half a second apart"] = alone(shown(4), backend=stock)
    found["as far apart as they are"] = told(ask.run(shown(4), temperature=0, backend=ours))
    found["again"] = told(ask.run(shown(4), temperature=0, backend=ours))
    state = two_turns.run(shown(6), **fresh)
    found["turns"] = [told(state, "first"), told(state, "second")]
    found["forks"] = forked.run(shown(6), **fresh)["told"]
    states = ask.run_batch([{"shown": shown(count)} for count in (2, 4)], **fresh)
    found["batch"] = [told(state) for state in states]
    whole = ask.run(shown(), **fresh)
    streamed = ask.run(shown(), stream=True, **fresh)
    found["streamed"] = ["".join(streamed.text_iter("answer")), whole["answer"]]
    state = constrained.run(shown(), **fresh)
    told(state, "digits")
    found["digits"], found["choice"] = state["digits"], state["choice"]
    found["scores"] = state.get_meta_info("choice")["normalized_prompt_logprobs"]
    return found


if __name__ == "__main__":
    read_without_opencv()
    print("JSON " + json.dumps(run(*sys.argv[1:])))

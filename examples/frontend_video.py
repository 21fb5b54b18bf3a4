"""A program of SGLang's frontend language over a video: sgl.video shows frames, sgl.gen and sgl.select answer.

sgl.video reads the file here, with OpenCV (pip install opencv-python-headless), and sends evenly spaced frames.
"""

import argparse
import sys

import sglang as sgl


@sgl.function
def ask(s, video: str, frames: int, question: str, tokens: int):
    s += sgl.user(sgl.video(video, frames) + question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=tokens))
    s += sgl.user("Is it day or night there?")  # a second turn: the video is in the server's cache by now
    s += sgl.assistant(sgl.select("light", ["day", "night"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server's address (default %(default)s)")
    parser.add_argument("--video", required=True, help="a video file")
    parser.add_argument("--frames", type=int, default=16, help="how many of its frames to show (default %(default)s)")
    parser.add_argument("--question", default="What moves in this video, and where does it go?")
    parser.add_argument("--template", default="qwen2-vl", help="SGLang's name of the chat template (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    # Takes one image or video per program. sglang_mm.serving.endpoint.RuntimeEndpoint(url) takes several, and also
    # tells the server how long the video is; without that, frames count as half a second apart.
    sgl.set_default_backend(sgl.RuntimeEndpoint(args.url, chat_template_name=args.template))
    state = ask.run(args.video, args.frames, args.question, args.max_tokens, temperature=0)
    if state.error() is not None:  # programs keep their errors to themselves
        sys.exit(f"the program failed: {state.error()}")
    print(f"{args.question}\n  {state['answer']!r}\nday or night?\n  {state['light']!r}")
    told = state.get_meta_info("answer")
    print(f"{told['prompt_tokens']} tokens of prompt, {told['cached_tokens']} of them cached; ran: {told['sglang_mm']}")


if __name__ == "__main__":
    main()

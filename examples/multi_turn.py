"""Ask twice about one video. The second prompt begins with the first, so the server finds the video in its cache."""

import argparse
import base64
from pathlib import Path

import requests
from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server's address (default %(default)s)")
    parser.add_argument("--video", required=True, help="a video file")
    parser.add_argument("--questions", nargs=2, default=["What moves in this video?", "And where does it go?"])
    parser.add_argument("--model", default="default", help="the served model's name; a server with one takes any")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    video = "data:video/mp4;base64," + base64.b64encode(Path(args.video).read_bytes()).decode()
    messages = []
    for question in args.questions:
        content = [{"type": "text", "text": question}]
        if not messages:  # the video is shown once; later turns refer to it
            content.insert(0, {"type": "video_url", "video_url": {"url": video}})
        messages.append({"role": "user", "content": content})
        answer = client.chat.completions.create(
            model=args.model, messages=messages, max_tokens=args.max_tokens, temperature=0
        )
        text = answer.choices[0].message.content
        messages.append({"role": "assistant", "content": text})

        reply = requests.get(f"{args.url}/sglang_mm/requests/{answer.id}", timeout=30)
        reply.raise_for_status()
        ran = reply.json()
        print(f"{question}\n  {text!r}")
        print(f"  {answer.usage.prompt_tokens} tokens of prompt, of them cached: {ran['cached_tokens']}")


if __name__ == "__main__":
    main()

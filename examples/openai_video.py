"""Ask about a video with the OpenAI client, print the answer as it comes, then say what ran for it."""

import argparse
import base64
from pathlib import Path

import requests
from openai import OpenAI


def video_url(video: str) -> str:
    """An address as it is; a file as a data URL, so that the server may be another machine."""
    if video.startswith(("http://", "https://")):
        return video
    return "data:video/mp4;base64," + base64.b64encode(Path(video).read_bytes()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server's address (default %(default)s)")
    parser.add_argument("--video", required=True, help="a video file or its http address")
    parser.add_argument("--question", default="What moves in this video, and where does it go?")
    parser.add_argument("--model", default="default", help="the served model's name; a server with one takes any")
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()

    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=args.model,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": video_url(args.video)}},
                    {"type": "text", "text": args.question},
                ],
            }
        ],
        max_tokens=args.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
        if chunk.usage:
            used = chunk.usage
    print(f"\n{used.prompt_tokens} tokens of prompt, {used.completion_tokens} of answer")

    reply = requests.get(f"{args.url}/sglang_mm/requests/{chunk.id}", timeout=30)
    reply.raise_for_status()
    ran = reply.json()
    print(f"{ran['schedule']} over {ran['ranks']} ranks, rows per rank {ran['rows_per_rank']}")


if __name__ == "__main__":
    main()

"""Ask a question about a video and print, for the answer's first tokens, what else could have stood there."""

import argparse
import base64
import math
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server's address (default %(default)s)")
    parser.add_argument("--video", required=True, help="a video file")
    parser.add_argument("--question", default="Does anything red move in this video? Answer yes or no.")
    parser.add_argument("--model", default="default", help="the served model's name; a server with one takes any")
    parser.add_argument("--tokens", type=int, default=1, help="how many tokens of the answer (default %(default)s)")
    parser.add_argument("--top", type=int, default=5, help="how many alternatives for each (default %(default)s)")
    args = parser.parse_args()

    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    video = "data:video/mp4;base64," + base64.b64encode(Path(args.video).read_bytes()).decode()
    answer = client.chat.completions.create(
        model=args.model,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": video}},
                    {"type": "text", "text": args.question},
                ],
            }
        ],
        max_tokens=args.tokens,
        temperature=0,
        logprobs=True,
        top_logprobs=args.top,
    )
    for place in answer.choices[0].logprobs.content:
        others = ", ".join(f"{other.token!r} {math.exp(other.logprob):.3f}" for other in place.top_logprobs)
        print(f"{place.token!r} {place.logprob:.4f}   of: {others}")


if __name__ == "__main__":
    main()

"""Write the input of a batch: every question about every video of a folder, one JSON line each."""

import argparse
import json
from pathlib import Path

VIDEOS = (".mp4", ".mkv", ".mov", ".webm", ".avi")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the videos are, below it too")
    parser.add_argument("out", type=Path, help="the file to write, for python -m sglang_mm.batch")
    parser.add_argument("--question", action="append", help="give it again for more (default: two questions)")
    parser.add_argument("--max-tokens", type=int, default=256)
    args = parser.parse_args()

    questions = args.question or ["What happens in this video?", "Where does it take place?"]
    videos = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in VIDEOS)
    if not videos:
        parser.error(f"no video below {args.folder}: looked for {', '.join(VIDEOS)}")
    with args.out.open("w") as out:
        for video in videos:
            # questions about one video follow each other: all but the first find it in the prefix cache
            for number, question in enumerate(questions, 1):
                name = f"{video.relative_to(args.folder)}#{number}"
                line = {"id": name, "video": str(video.resolve()), "question": question, "max_tokens": args.max_tokens}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{len(videos)} videos x {len(questions)} questions: {args.out}")


if __name__ == "__main__":
    main()

"""A batch of video questions without a server: SGLang's Engine, its prefill sharded over ranks."""

import argparse

import sglang_mm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a checkpoint's folder or name, as for --model-path")
    parser.add_argument("--video", required=True, nargs="+", help="video files, one question each")
    parser.add_argument("--question", default="What moves in this video, and where does it go?")
    parser.add_argument("--cp", type=int, default=1, help="ranks that share one prompt (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    engine = sglang_mm.Engine(model_path=args.model, tp=1, cp=args.cp, log_level="error")
    try:
        from transformers import AutoTokenizer  # after the Engine, which settles what SGLang runs on

        content = [{"type": "video"}, {"type": "text", "text": args.question}]
        prompt = AutoTokenizer.from_pretrained(args.model).apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        answers = engine.generate(
            [prompt] * len(args.video),
            {"max_new_tokens": args.max_tokens, "temperature": 0},
            video_data=[[video] for video in args.video],
        )
        for video, answer in zip(args.video, answers):
            told = answer["meta_info"]
            print(f"{video}: {told['prompt_tokens']} tokens of prompt\n  {answer['text']!r}\n  {told['sglang_mm'][-1]}")
    finally:
        engine.shutdown()


if __name__ == "__main__":  # SGLang starts its processes anew, and they import this file
    main()

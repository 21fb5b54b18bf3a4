"""python -m sglang_mm.demo [--cp C] [--nodes N] [--sparse auto|off] [--video FILE --question TEXT] [--json]

Serves a video question over N ranks, with dense and with sparse attention, and checks the dense answer against
single-rank SGLang and transformers. Exit code 0 only if its tokens are equal and its log-probabilities agree within
1e-4, and if sparse attention kept its recall, left keys out, and shared no K/V with the dense requests.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from sglang_mm.demo import server
from sglang_mm.demo.reference import largest_difference, top_logprobs
from sglang_mm.demo.sides import SPARSE_FLAGS, Side, ask_both, compare_sides, table, verdict
from sglang_mm.errors import ConfigError, SglangMMError

TOLERANCE = 1e-4
LAYERS = {"off": 2, "auto": 8}  # the first two are dense under `auto`
SECONDS = 44  # of video: the question is then too few rows to be looked at
QUESTION = "What moves in this video, and where does it go?"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sglang_mm.demo", description=__doc__.split("\n\n")[1])
    parser.add_argument("--cp", type=int, default=2, metavar="N", help="ranks the prefill is sharded over (default 2)")
    parser.add_argument(
        "--nodes",
        type=int,
        default=1,
        metavar="N",
        help="spread the ranks over the nodes of a Ray cluster, simulated here if none runs (default 1)",
    )
    parser.add_argument(
        "--sparse",
        choices=tuple(LAYERS),
        default="auto",
        help="auto: ask a second time with sparse attention, on the same server; off: dense alone (default auto)",
    )
    parser.add_argument("--video", type=Path, help="a video file (default: one is rendered)")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N", help="length of the answer (default 16)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def run(cp: int, video: Path | None, question: str, new_tokens: int, say, sparse: str = "auto", nodes: int = 1) -> dict:
    """The whole job; say(text, end) shows progress. Returns the JSON object."""
    if video is not None and not video.is_file():
        raise ConfigError(f"--video {video}", "a readable video file", "check the path, or leave --video out")
    flags = (*(SPARSE_FLAGS if sparse == "auto" else ()), *(("--nodes", str(nodes)) if nodes > 1 else ()))
    with tempfile.TemporaryDirectory(prefix="sglang_mm_demo_") as folder:
        work = Path(folder)
        model_path, video = prepare(work, video, LAYERS[sparse], say)
        prompt = chat_prompt(model_path, question)
        say(f"server: python -m sglang_mm.launch --model-path {model_path} --tp 1 --cp {cp} {' '.join(flags)}")
        with server.server(model_path, cp, work / "server.log", flags) as url:
            for line in startup_lines(work / "server.log"):
                say(f"  {line}")
            on = server.nodes(url)
            say(f"question: {question}")
            sides = ask_both(url, prompt, video, question, new_tokens, sparse == "auto", say)
        say("references: SGLang on one rank, then transformers, on the same ids, pixels and positions")
        reference = run_reference(work, model_path, prompt, video, new_tokens)
    result = compare(cp, sides["dense"], reference) | {"nodes": on}
    return result | (compare_sides(**sides) if "sparse" in sides else {})


def prepare(work: Path, video: Path | None, layers: int, say) -> tuple[str, Path]:
    from sglang_mm.tiny import write_checkpoint, write_video

    say("model:  a tiny Qwen2.5-VL with planted heads, written now")
    model_path = str(write_checkpoint(work / "tiny-qwen2.5-vl", layers=layers))
    if video is None:
        say(f"video:  {SECONDS} s of moving shapes, rendered now")
        video = work / "shapes.mp4"
        write_video(video, seconds=SECONDS)
    return model_path, video


def chat_prompt(model_path: str, question: str) -> str:
    """The text that the server's chat endpoint makes of the same message."""
    from transformers import AutoTokenizer

    content = [{"type": "video"}, {"type": "text", "text": question}]
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def startup_lines(log: Path) -> list[str]:
    lines = log.read_text().splitlines()
    kept = (
        "sglang_mm  ",
        "  topology ",
        "  prefill ",
        "  nodes ",
        "  sparse ",
        "  vision ",
        "  backends ",
        "  K/V ",
        "  fits ",
    )
    return [line.strip() for line in lines if line.startswith(kept)]


def run_reference(work: Path, model_path: str, prompt: str, video: Path, new_tokens: int) -> dict:
    job = {"model_path": model_path, "prompt": prompt, "video": str(video.resolve()), "new_tokens": new_tokens}
    (work / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "sglang_mm.demo.reference", str(work / "job.json"), str(work / "reference.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=server.START_DEADLINE_S)
    if not (work / "reference.json").is_file():
        raise SglangMMError("the reference process failed; its last lines:\n" + done.stderr[-3000:])
    return json.loads((work / "reference.json").read_text())


def compare(cp: int, dense: Side, reference: dict) -> dict:
    mine, ran = dense.answer, dense.ran
    difference = largest_difference(top_logprobs(mine), reference["stock_logprobs"], reference["hf_logprobs"])
    same_tokens = mine["output_ids"] == reference["stock_output_tokens"] == reference["hf_output_tokens"]
    return {
        "cp": cp,
        "prompt_tokens": mine["meta_info"]["prompt_tokens"],
        "output_tokens": mine["output_ids"],
        "stock_output_tokens": reference["stock_output_tokens"],
        "hf_output_tokens": reference["hf_output_tokens"],
        "max_logprob_diff": difference,
        "identical": bool(
            same_tokens
            and difference <= TOLERANCE
            and dense.streamed["text"] == mine["text"]
            and mine["meta_info"]["prompt_tokens"] == reference["prompt_tokens"]
        ),
        "schedule": ran["schedule"],
        "fallbacks": dense.stock_reasons,
        "not_sharded": dense.stock_reasons,
        "rows_per_rank": ran["rows_per_rank"],
        "ttft_s": round(dense.streamed["ttft_s"], 3),
    }


def report(result: dict) -> str:
    lines = [f"schedule: {result['schedule']} over {result['cp']} ranks, {result['prompt_tokens']} prompt tokens"]
    widest = max(result["rows_per_rank"])
    for rank, rows in enumerate(result["rows_per_rank"]):
        lines.append(f"  rank {rank}  {'█' * max(1, round(40 * rows / widest))} {rows} rows")
    for reason in result["not_sharded"]:
        lines.append(f"  not sharded: {reason}")
    if "density" in result:
        lines.append(table(result))
    else:
        lines.append(f"time to first token: {result['ttft_s']} s")
    equal = result["output_tokens"] == result["stock_output_tokens"] == result["hf_output_tokens"]
    lines.append(f"greedy tokens equal to single-rank SGLang and transformers: {'yes' if equal else 'NO'}")
    lines.append(f"largest difference of a log-probability: {result['max_logprob_diff']:.1e} (allowed {TOLERANCE})")
    if "density" in result:
        lines += verdict(result)
    lines.append("identical" if result["identical"] else "NOT identical")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)

    def say(text: str, end: str = "\n") -> None:
        if not args.json:
            print(text, end=end, flush=True)

    try:
        result = run(args.cp, args.video, args.question, args.new_tokens, say, args.sparse, args.nodes)
    except SglangMMError as error:
        print(f"sglang_mm.demo: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if args.json else report(result))
    return 0 if result["identical"] and result.get("sparse_in_bounds", True) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""One long video through a real server on this machine, and a second question about it: seconds and peak memory.

    python -m benchmarks.long_prompt --tokens 262144 --cp 2 --out benchmarks/results/long-prompt.md

A model of 1.5 million weights: what is shown is that nothing breaks, grows or waits at this length, not how fast a GPU
is. The figures for eight GPUs below the table are computed, not measured, and say so.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import psutil
import torch

import sglang_mm
from benchmarks.memory import MODEL
from sglang_mm.config import Config
from sglang_mm.launch.args import build_parser
from sglang_mm.parallel.cost import Constants, ModelShape, predict
from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.memory import even_table
from sglang_mm.tiny import write_checkpoint, write_video
from sglang_mm.types import BatchLayout, Run

SIDE, TOKENS_OF_PAIR = 448, 256  # of two frames of SIDE x SIDE pixels
FPS = 2
ROOM = 5  # quarters of the video: a long video is seen at fewer frames where it would fill the K/V to the brim
ASSUMED = Constants(600e12, 360e9, 10e-6, 3.35e12, 70e-6)  # of an H100 and NVLink; arithmetic, not measured
ANSWER = {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True}
TEMPLATE = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    asked = _arguments()
    with tempfile.TemporaryDirectory(prefix="long-prompt-") as directory:
        made = Path(directory)
        checkpoint = write_checkpoint(made / "tiny")
        pairs = asked.tokens // TOKENS_OF_PAIR
        video = write_video(made / "long.mp4", seconds=2 * pairs / FPS, fps=FPS, width=SIDE, height=SIDE)
        arguments = {"cp": asked.cp, "kv": asked.kv, "schedule": asked.schedule}
        arguments["max_total_tokens"] = ROOM * asked.tokens // 4 + 8192
        engine = sglang_mm.Engine(model_path=str(checkpoint), **arguments)
        try:
            told = measure(engine, str(video))
        finally:
            engine.shutdown()
    text = page(asked, told)
    if asked.out:
        asked.out.write_text(text)
        asked.out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_prompt", description=__doc__.splitlines()[0])
    ours = {action.dest: action for action in build_parser()._actions}
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of the video (default %(default)s)")
    parser.add_argument("--cp", type=int, default=2)
    parser.add_argument("--kv", choices=ours["kv"].choices, default="sharded")
    parser.add_argument("--schedule", choices=ours["schedule"].choices, default="auto")
    parser.add_argument("--out", type=Path, help="a Markdown file; a .json is written beside it")
    return parser.parse_args()


def measure(engine, video: str) -> dict:
    """What the first and a second question about the video cost."""
    sizes = engine._scheduler_init_result.scheduler_infos[0]["sglang_mm"]
    told = {"kv_bytes_per_token": sizes["kv_bytes_per_token"], "kv_bytes_per_rank": sizes["kv_bytes"], "questions": []}
    told["idle_bytes"] = _resident()
    for question in ("What moves?", "And what stands still?"):
        began = time.perf_counter()
        answer = engine.generate(prompt=TEMPLATE.format(question), video_data=[video], sampling_params=ANSWER)
        (record,) = [found for found in answer["meta_info"]["sglang_mm"] if found]
        told["questions"].append({
            "question": question,
            "prompt_tokens": answer["meta_info"]["prompt_tokens"],
            "seconds": time.perf_counter() - began,
            "record": record,
        })  # fmt: skip
    told["peak_bytes"] = _resident(peak=True)
    return told


def _resident(peak: bool = False) -> dict[str, int]:
    """Bytes of this process (server and decoder of videos) and of each rank."""
    found = {"server": _status(psutil.Process().pid, peak)}
    for child in psutil.Process().children(recursive=True):
        title = " ".join(child.cmdline())
        if "scheduler" in title:
            found[title.split("::")[-1].strip() or str(child.pid)] = _status(child.pid, peak)
    return found


def _status(pid: int, peak: bool) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM" if peak else "VmRSS"))


def page(asked, told: dict) -> str:
    first, second = told["questions"]
    total = first["prompt_tokens"]
    lines = [
        "# A long prompt, end to end",
        "",
        f"`python -m benchmarks.long_prompt --tokens {asked.tokens} --cp {asked.cp} --kv {asked.kv} "
        f"--schedule {asked.schedule}`: a video file of {asked.tokens:,} tokens through a real engine, a tiny model in "
        "fp32, CPU only.",
        "",
        "| | first question | second question, video cached |",
        "|---|---:|---:|",
    ]
    rows = {
        "prompt tokens": [f"{each['prompt_tokens']:,}" for each in (first, second)],
        "of them cached": [f"{each['record']['cached_tokens']:,}" for each in (first, second)],
        "seconds, all (with decoding the video, 16 tokens of answer)": [f"{q['seconds']:.1f}" for q in (first, second)],
        "schedule": [each["record"]["schedule"] for each in (first, second)],
        **{
            f"prefill: {stage}, slowest rank, seconds": [
                f"{max(each['record'].get('seconds', {}).get(stage, [0])):.1f}" for each in (first, second)
            ]
            for stage in ("vision", "exchange", "attention", "transport", "rest", "total")
        },
    }
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines += ["", "| process | resident before, MiB | peak, MiB |", "|---|---:|---:|"]
    for name, peak in told["peak_bytes"].items():
        lines.append(f"| {name} | {told['idle_bytes'].get(name, 0) / 2**20:,.0f} | {peak / 2**20:,.0f} |")
    kept = total * told["kv_bytes_per_token"] / 2**20
    lines += [
        "",
        f"K/V of the prompt: {kept:,.0f} MiB in all; {told['kv_bytes_per_rank'] / 2**20:,.0f} MiB set aside per rank.",
        "",
        *on_paper(),
    ]
    return "\n".join(lines)


def on_paper(tokens: int = 1 << 20, cp: int = 8) -> list[str]:
    """A prompt of a million tokens on eight GPUs, by the table of memory and the cost model."""
    layout = BatchLayout((make_layout([Run(0, tokens)], cp),))
    shape = ModelShape(MODEL.layers, MODEL.heads, MODEL.kv_heads, MODEL.head_dim, torch.bfloat16)
    seconds = predict(layout, shape, ASSUMED)
    table = even_table(MODEL, Config(cp=cp), tokens)
    said = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    flops, link, memory = ASSUMED.attention_flops_per_s, ASSUMED.bytes_per_s, ASSUMED.memory_bytes_per_s
    return [
        f"## {tokens:,} tokens on {cp} GPUs: computed, not measured",
        "",
        "Qwen2.5-VL-7B in bf16, dense, by the table of memory and the cost model.",
        f"Assumed, of an H100: attention at {flops / 1e12:.0f} TFLOP/s, {link / 1e9:.0f} GB/s between GPUs, "
        f"{memory / 1e12:.2f} TB/s of memory.",
        f"Attention and its transport then take: {said}. A rank holds {table.peak / 2**30:.1f} GiB at the peak, of",
        f"which K/V {tokens * MODEL.kv_bytes / cp / 2**30:.1f} GiB. Nothing of this has run on a GPU.",
        "",
    ]


if __name__ == "__main__":
    main()

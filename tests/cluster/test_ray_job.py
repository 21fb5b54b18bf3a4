"""A batch as a Ray job over two nodes, as a user submits it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from sglang_mm.demo import huggingface
from sglang_mm.tiny import write_video
from tests.house.source import ROOT

SUBMIT = ["bash", str(ROOT / "examples" / "ray_job.sh")]
NEW_TOKENS = 6
LONG = "what is said at length here is asked of two nodes at once. " * 12


def test_a_batch_as_a_ray_job_over_two_nodes(cluster, checkpoint, tmp_path):
    write_video(tmp_path / "shapes.mp4", seconds=6)
    questions = [
        {"id": "moves", "video": "shapes.mp4", "question": "What moves?"},
        {"id": "long", "question": LONG},
        {"id": "missing", "video": "nowhere.mp4", "question": "What moves?"},
    ]
    ask = tmp_path / "in.jsonl"
    fields = {"max_tokens": NEW_TOKENS, "ignore_eos": True}
    ask.write_text("".join(json.dumps(question | fields) + "\n" for question in questions))
    answers = tmp_path / "out.jsonl"
    flags = ["--model-path", checkpoint, "--cp", "2", "--nodes", "2", "--cp-min-tokens", "64"]
    environment = cluster.environment | {
        "RAY_API_SERVER_ADDRESS": cluster.jobs, "PYTHON": sys.executable, "JOB": "answers",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    command = [*SUBMIT, str(ask), str(answers), *flags]
    done, told = submitted(command, environment)
    assert answers.is_file(), told[-3000:]
    moves, long, missing = map(json.loads, answers.read_text().splitlines())
    assert moves["error"] is None and moves["usage"]["completion_tokens"] == NEW_TOKENS
    assert moves["usage"]["prompt_tokens"] > 300
    assert long["error"] is None and long["answer"] == greedy(checkpoint, LONG)
    assert "nowhere.mp4" in missing["error"]["message"] and missing["answer"] is None
    log = Path(f"{answers}.server.log").read_text()
    assert "nodes      local-0, local-1: 1 rank each; Ray at" in log, log[-3000:]
    assert done.returncode != 0 and "answers" in told  # a line could not be asked: the job says so


def submitted(command: list[str], environment: dict[str, str]) -> tuple[subprocess.CompletedProcess, str]:
    """Once the cluster takes jobs: its agent starts some seconds after the rest."""
    for _ in range(10):
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
        told = done.stdout + done.stderr
        if "No available agent to submit job" not in told:
            break
        time.sleep(2)
    return done, told


def greedy(checkpoint: str, question: str) -> str:
    """By transformers, from the same chat."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = huggingface.text_prompt(tokenizer(text).input_ids)
    tokens, _ = huggingface.greedy(huggingface.load(checkpoint), prompt, NEW_TOKENS)
    return tokenizer.decode(tokens, skip_special_tokens=True)

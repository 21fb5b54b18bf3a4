"""`sglang_mm.Engine(nodes=2)`: the answers of one process, and everything given back."""

import json
import re
import subprocess
import sys

import pytest

from sglang_mm.demo import huggingface
from tests.cluster.engine_over_nodes import GREEDY, PROMPT


@pytest.mark.slow
def test_an_engine_over_two_nodes_twice(cluster, checkpoint):
    command = [sys.executable, "-m", "tests.cluster.engine_over_nodes", checkpoint, cluster.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=cluster.environment)
    assert done.returncode == 0, done.stderr[-3000:]
    prompt = huggingface.text_prompt(PROMPT["input_ids"])
    expected, _ = huggingface.greedy(huggingface.load(checkpoint), prompt, GREEDY["max_new_tokens"])
    for told in json.loads(re.search(r"^JSON (.*)$", done.stdout, re.MULTILINE)[1]):
        record = told["record"]
        assert told["tokens"] == expected and record["schedule"] == "ring" and record["rows_per_rank"] == [450, 450]
        assert sum(record["bytes_across_nodes"]) == sum(map(sum, record["bytes_sent"].values()))  # a rank per node

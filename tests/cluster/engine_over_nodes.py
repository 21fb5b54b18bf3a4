"""python -m tests.cluster.engine_over_nodes CHECKPOINT ADDRESS: an Engine over two nodes, twice; what it told, as JSON.

A process of its own: ray must be imported in the environment of the cluster, and no other Ray be in use.
"""

import json
import sys

PROMPT = {"input_ids": [(i * 7) % 90 + 5 for i in range(900)]}
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


def ask(checkpoint: str, address: str) -> dict:
    import sglang_mm

    engine = sglang_mm.Engine(
        model_path=checkpoint, cp=2, nodes=2, ray_address=address, schedule="ring", max_total_tokens=24_000
    )
    try:
        output = engine.generate(**PROMPT, sampling_params=GREEDY)
        return {"tokens": output["output_ids"], "record": output["meta_info"]["sglang_mm"][0]}
    finally:
        engine.shutdown()


if __name__ == "__main__":
    print("JSON", json.dumps([ask(*sys.argv[1:]) for _ in range(2)]))

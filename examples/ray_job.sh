#!/usr/bin/env bash
# A batch as a Ray job, with the ranks spread over the nodes of the cluster.
#
#   bash examples/ray_job.sh /shared/in.jsonl /shared/out.jsonl --model-path Qwen/Qwen2.5-VL-7B-Instruct --cp 16 --nodes 2
#
# Ray runs it on the head node: IN, OUT and the media must be there, under these paths. RAY_API_SERVER_ADDRESS names the
# cluster's dashboard (default http://127.0.0.1:8265). JOB, if it is set, is the name of the job: for `ray job logs`,
# `ray job stop`. A job that failed, or was stopped, goes on where it was when it is submitted again.
set -euo pipefail
in=$(realpath "$1") out=$(realpath "$2")
shift 2
exec ray job submit --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" ${JOB:+--submission-id "$JOB"} -- \
    "${PYTHON:-python}" -m sglang_mm.batch "$in" "$out" --ray-address auto "$@"

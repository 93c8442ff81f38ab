#!/usr/bin/env bash
# RetroInfer's way of running LongBench, with the retrieval strategy as seventh argument.
#
# longbench_run.sh MODEL ATTENTION_TYPE RETRIEVAL_BUDGET ESTIMATION_BUDGET DTYPE CATEGORY [STRATEGY] [FLAGS...]
#
#   MODEL           llama-3.1-8b, llama-3-8b-1048k, qwen2.5-7b, qwen2.5-72b, smollm2-135m, or any that run.py takes
#   ATTENTION_TYPE  Full_Flash_Attn, RetroInfer (the strategy of the model's configuration), or a strategy
#   CATEGORY        SQA, MQA, SUM, FSL, ST, CC
#   STRATEGY        takes the place of ATTENTION_TYPE; several are separated by commas
#   FLAGS           passed on: --data_path FOLDER, --num_examples 20, --e, --protocol retroinfer, ...
#
# The protocol is LongBench's own. RetroInfer's published way (no truncation, template or end token): --protocol retroinfer
set -euo pipefail

if [ $# -lt 6 ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
model=$1 strategies=$2 retrieval_budget=$3 estimation_budget=$4 dtype=$5 category=$6
shift 6
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    strategies=$1
    shift
fi
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
set -x
exec python -m benchmark.LongBench.run --model "$model" --strategies "$strategies" \
    --retrieval_budget "$retrieval_budget" --estimation_budget "$estimation_budget" \
    --dtype "$dtype" --category "$category" "$@"

#!/usr/bin/env bash
# RULER with RetroInfer's positional arguments, then the strategies and any flags of benchmark.ruler.run.
set -euo pipefail

if [ "$#" -lt 8 ]; then
    cat >&2 <<USAGE
usage: bash $0 MODEL PREFILL_METHOD ATTENTION_TYPE CONTEXT_LENGTH TASK DTYPE RETRIEVAL_BUDGET ESTIMATION_BUDGET \\
            [STRATEGY[,STRATEGY..]] [FLAGS..]
  MODEL: llama-3.1-8b, llama-3-8b-1048k, qwen2.5-7b, qwen2.5-72b, smollm2-135m, a hub name, folder or .gguf file
  TASK: one name, a comma list, all, or free (the six that need no data)
example: bash $0 smollm2-135m full RetroInfer 4096 free fp32 0.018 0.232 full,attention_aware_graph --num_samples 10
USAGE
    exit 2
fi

arguments=(--model_name "$1" --prefill_method "$2" --attn_type "$3" --context_len "$4" --tasks "$5" --dtype "$6"
    --retrieval_budget "$7" --estimation_budget "$8")
shift 8
if [ "$#" -gt 0 ] && [[ "$1" != --* ]]; then
    arguments+=(--strategies "$1")
    shift
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python -m benchmark.ruler.run "${arguments[@]}" "$@"

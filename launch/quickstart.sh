#!/usr/bin/env bash
# The main job, a command at a time, each shown before it runs: the same commands train a model of any size.
# usage: launch/quickstart.sh RUN_DIR [key=value ...]
set -euo pipefail
run=$1
shift
maxlm=${MAXLM:-maxlm}
settings=(run_dir="$run" tokenizer.path="$run/tokenizer" data.store="$run/store" "$@")

step() {
  printf '\n\033[1m$ maxlm %s\033[0m\n' "$*"
  "$maxlm" "$@"
}

began=$SECONDS
step tokenizer train quickstart "${settings[@]}"
step data prepare quickstart "${settings[@]}"
step train quickstart "${settings[@]}"
step eval "$run"
step generate "$run" --prompt 'def ' --max-tokens 120 --temperature 0.7
step export "$run" "$run/export" --to hf
step report "$run"

cat <<END

Made in $((SECONDS - began)) seconds, under $run:
  tokenizer/       a byte-level BPE tokenizer of this Python's standard library
  store/           its tokens, ready for training
  checkpoints/     the model's weights and optimizer, resumed from when training starts again
  metrics.jsonl    every logged step
  export/          the model in Hugging Face format
  report.html      the loss curves: open it in a browser

Next:
  $maxlm train $run/config.yaml train.steps=1000              train on, from where it stopped
  $maxlm generate $run --prompt 'class ' --temperature 0.5    sample again
  $maxlm config --presets                                     larger models, to 70B
  $maxlm config --help-keys                                   every setting, explained
END

#!/usr/bin/env bash
# The main job, a command at a time, each shown before it runs: the same commands train a model of any size.
# usage: launch/quickstart.sh RUN_DIR [key=value ...]
set -euo pipefail
run=$1
shift
maxlm=${MAXLM:-maxlm}
settings=()
if [ "$run" != runs/quickstart ]; then # the preset's own folder needs no telling
  settings=(run_dir="$run" tokenizer.path="$run/tokenizer" data.store="$run/store")
fi
settings+=("$@")

show() {
  printf '\n\033[1m$ maxlm'
  printf ' %q' "$@"
  printf '\033[0m\n'
}

step() {
  show "$@"
  "$maxlm" "$@"
}

began=$SECONDS
step tokenizer train quickstart ${settings[@]+"${settings[@]}"}
step data prepare quickstart ${settings[@]+"${settings[@]}"}
step train quickstart ${settings[@]+"${settings[@]}"}
step eval "$run"
sample=(generate "$run" --prompt 'def ' --max-tokens 100 --temperature 0.6)
step "${sample[@]}"
"$maxlm" "${sample[@]}" --json >"$run/samples.json" # for the report
rm -rf "$run/export" # an earlier quickstart's: export writes over nothing
step export "$run" "$run/export" --to hf
step report "$run"

cat <<END

Made in $((SECONDS - began)) seconds, under $run:
  tokenizer/       a byte-level BPE tokenizer, trained on this Python's standard library
  store/           the library as tokens, ready to train on
  checkpoints/     weights and optimizer state: training goes on from here
  metrics.jsonl    every logged step
  export/          the model in Hugging Face format
  report.html      the run on one page: open it in a browser

Next:
  $maxlm train $run train.steps=1000
      train on, from where it stopped
  $maxlm generate $run --prompt 'class ' --prompt 'import ' --temperature 0.5
      sample again
  $maxlm config --presets
      larger models, to 671B;  $maxlm config --help-keys explains every setting
END

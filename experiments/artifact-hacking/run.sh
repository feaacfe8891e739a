#!/bin/sh
# Trains with the rubric alone, with the artifact reward summed, and with it as a gate; then prints the table and makes
# one report of each seed. From the root: sh experiments/artifact-hacking/run.sh. A run that was stopped goes on.
# More or fewer seeds: SEEDS="0"; other ways: WAYS="rubric gate"; a longer run: MORE="steps=120"; elsewhere: OUT=DIR.
set -eu
here=$(dirname "$0")
out=${OUT:-runs/artifact-hacking}
python=${PYTHON:-python3}
rlhf=${RLHF_IMG:-rlhf-img}
for seed in ${SEEDS:-0 1 2}; do
  for way in ${WAYS:-rubric summed gate}; do
    run="$out/$way-$seed"
    [ -f "$run/eval.json" ] && continue
    if [ -f "$run/config.yaml" ]; then
      $rlhf grpo --out "$run" --resume
    else
      $rlhf grpo --out "$run" --config "$here/$way.yaml" --seed "$seed" ${MORE:-}
    fi
  done
  runs=""
  for way in ${WAYS:-rubric summed gate}; do runs="$runs $out/$way-$seed"; done
  $rlhf report $runs --out "$out/report-$seed.html"
done
$python "$here/table.py" "$out"

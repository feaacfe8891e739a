#!/bin/sh
# Trains on three planted hacks and on the default rewards, and prints when the sentinels saw it and when held-out quality
# had fallen. From the root: sh experiments/sentinel-hacks/run.sh. A run that was stopped goes on.
# More seeds: SEEDS="0 1"; some ways: WAYS="text sound"; elsewhere: OUT=DIR; a trial: MORE="steps=4".
set -eu
here=$(dirname "$0")
out=${OUT:-runs/sentinel-hacks}
python=${PYTHON:-python3}
rlhf=${RLHF_IMG:-rlhf-img}
for seed in ${SEEDS:-0}; do
  for way in ${WAYS:-saturation text empty sound}; do
    run="$out/$way-$seed"
    rewards="$here/hacks.py:$way"
    [ "$way" = sound ] && rewards=rubric,artifact
    [ -f "$run/eval.json" ] && continue
    if [ -f "$run/config.yaml" ]; then
      $rlhf grpo --out "$run" --resume
    else
      $rlhf grpo --out "$run" --config "$here/run.yaml" --rewards "$rewards" --seed "$seed" ${MORE:-}
    fi
  done
done
$python "$here/table.py" "$out"

#!/bin/sh
# Makes the pairs, trains every loss on them and prints the table. From the root: sh experiments/dpo-stpo-embedded/run.sh
# More seeds: SEEDS="0 1 2"; other losses: LOSSES="dpo stpo-mirror"; a longer run: MORE="steps=160"; elsewhere: OUT=DIR.
set -eu
here=$(dirname "$0")
out=${OUT:-runs/dpo-stpo}
rlhf=${RLHF_IMG:-rlhf-img}
$rlhf pairs make --out "$out/pairs" --count 896 --group 8 --pairs 2 --setting steps=8 --min-margin 0.1
for seed in ${SEEDS:-0}; do
  for loss in ${LOSSES:-dpo stpo-mirror stpo-guard stpo-anchor ipo}; do
    run="$out/$loss-$seed"
    [ -f "$run/eval.json" ] && continue
    resume=$([ -f "$run/config.yaml" ] && echo "--resume" || echo "--pairs $out/pairs --config $here/run.yaml")
    extra=$([ -f "$run/config.yaml" ] || echo "--seed $seed dpo.loss=$loss ${MORE:-}")
    $rlhf dpo --out "$run" $resume $extra
  done
done
python3 "$here/table.py" "$out"

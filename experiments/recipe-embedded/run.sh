#!/bin/sh
# The whole recipe on the embedded model: Raw -> STPO -> GRPO -> TDM, then what becomes of LoRAs made on Raw, and one report.
# From the root: make recipe, or sh experiments/recipe-embedded/run.sh. Stopped, it goes on where it was when started again.
# SEEDS="0 1 2": seeds. OUT=DIR: where. MORE="steps=2 ...": settings for all runs. PAIRS, PORTED: a smaller trial, see README.md.
set -eu
here=$(dirname "$0")
out=${OUT:-runs/recipe}
rlhf=${RLHF_IMG:-rlhf-img}
python=${PYTHON:-python3}

# run FOLDER FILE COMMAND WORDS...: a run, begun, gone on with, or left alone where FILE says that it is finished.
run() {
  folder=$1 finished=$2 algorithm=$3
  shift 3
  [ -f "$folder/$finished" ] && return
  if [ -f "$folder/config.yaml" ]; then
    $rlhf "$algorithm" --out "$folder" --resume
  else
    $rlhf "$algorithm" --out "$folder" "$@" ${MORE:-}
  fi
}

[ -f "$out/heldout.txt" ] || $python "$here/prompts.py" "$out"
asked="--prompts $out/train.txt --eval-prompts $out/heldout.txt"

# Three LoRAs on Raw: a style, a colour bias, a new shape.
for variant in striped warm ring; do
  run "$out/loras/$variant" eval.json sft --variant $variant --config "$here/sft.yaml"
done

# Pairs go on by themselves, and files that are there stay.
$rlhf pairs make --out "$out/pairs" --prompts "$out/train.txt" --count "${PAIRS:-1792}" --group 3 \
  --strong steps=8,guidance=1 --weak steps=8 --min-margin 0.25

for seed in ${SEEDS:-0}; do
  at="$out/seed-$seed"
  run "$at/stpo" eval.json dpo --pairs "$out/pairs" --eval-prompts "$out/heldout.txt" --config "$here/stpo.yaml" \
    --seed "$seed"
  # What follows trains adapters on the model that preference optimisation has made.
  [ -d "$at/aligned/pipeline" ] || $rlhf export "$at/stpo" --out "$at/aligned" --format pipeline
  run "$at/grpo" eval.json grpo --model "$at/aligned/pipeline" $asked --config "$here/grpo.yaml" --seed "$seed" \
    --processes "${PROCESSES:-2}"
  run "$at/turbo" card.json tdm --teacher "$at/grpo" --config "$here/tdm.yaml" --seed "$seed"
  [ -f "$at/turbo/portability.json" ] ||
    $rlhf eval portability --loras "$out/loras" --from playground --to "$at/turbo" ${PORTED:-}
  # The pipeline is what an export writes last.
  [ -d "$at/export/pipeline" ] || { rm -rf "$at/export" && $rlhf export "$at/turbo" --out "$at/export"; }
  $rlhf report "$at/stpo" "$at/grpo" "$at/turbo" --out "$at/report.html"
done
$python "$here/table.py" "$out"

#!/bin/sh
# Makes the pairs, trains every loss on them, the first two losses also for 4 times the steps, then GRPO from the STPO
# run and from Raw at equal compute, and prints both tables. From the root: sh experiments/dpo-stpo-embedded/run.sh
# A stopped call goes on where it was. More seeds: SEEDS="0 1 2"; other losses: LOSSES="dpo stpo-mirror"; losses of the
# long runs: LONG="dpo"; elsewhere: OUT=DIR. For a trial: PAIRS="--count 64", MORE="steps=4 ...", RL="steps=2 ...".
set -eu
here=$(dirname "$0")
out=${OUT:-runs/dpo-stpo}
rlhf=${RLHF_IMG:-rlhf-img}
python=${PYTHON:-python3}
steps=${STEPS:-30}
rl_steps=${RL_STEPS:-20}

# A run that is not there is begun, one that was stopped is resumed, a finished one is left.
train() {  # algorithm, folder, what it is begun with
  algorithm=$1 run=$2
  shift 2
  if [ -f "$run/eval.json" ]; then return; fi
  if [ -f "$run/config.yaml" ]; then $rlhf "$algorithm" --out "$run" --resume; else $rlhf "$algorithm" --out "$run" "$@"; fi
}

# shellcheck disable=SC2086  # settings are words
$rlhf pairs make --out "$out/pairs" --strong steps=8,guidance=1 --weak steps=8 --group 3 --min-margin 0.25 \
  ${PAIRS:---count 1792}
for seed in ${SEEDS:-0}; do
  for loss in ${LOSSES:-dpo stpo-mirror stpo-guard stpo-anchor ipo}; do
    train dpo "$out/$loss-$seed" --pairs "$out/pairs" --config "$here/run.yaml" --seed "$seed" "dpo.loss=$loss" \
      "steps=$steps" ${MORE:-}
  done
  for loss in ${LONG:-dpo stpo-mirror}; do
    train dpo "$out/$loss-long-$seed" --pairs "$out/pairs" --config "$here/run.yaml" --seed "$seed" "dpo.loss=$loss" \
      "steps=$((4 * steps))" ${MORE:-}
  done
  [ "$rl_steps" = 0 ] && continue
  train grpo "$out/grpo-stpo-$seed" --start "$out/stpo-mirror-$seed" --config "$here/rl.yaml" --seed "$seed" \
    "steps=$rl_steps" ${RL:-}
  equal=$($python "$here/table.py" steps "$out" "$seed" "$rl_steps")
  train grpo "$out/grpo-raw-$seed" --config "$here/rl.yaml" --seed "$seed" "steps=$equal" ${RL:-}
done
$python "$here/table.py" tables "$out"

#!/bin/sh
# Trains a detector on photographs for each seed, measures it and the shipped one, and prints the tables.
# From the root: sh experiments/artifact-detection/run.sh. A run that was stopped goes on.
# With the photographs of Debian packages too, installed or unpacked: PICTURES=/, see photos.py.
# Smaller: STEPS=400 PAIRS=135; other seeds: SEEDS="0"; elsewhere: OUT=DIR.
set -eu
here=$(dirname "$0")
out=${OUT:-runs/artifact-detection}
python=${PYTHON:-python3}
rlhf=${RLHF_IMG:-rlhf-img}
[ -d "$out/photos" ] || $python "$here/photos.py" "$out/photos" ${PICTURES:-}
for seed in ${SEEDS:-0 1 2}; do
  weights="$out/photos-$seed/artifact.safetensors"
  [ -f "$weights" ] && continue
  $rlhf reward train artifact --images "$out/photos" --steps "${STEPS:-1000}" --seed "$seed" --out "$weights" --resume
done
$python "$here/table.py" "$out" --seeds ${SEEDS:-0 1 2} --pairs "${PAIRS:-1026}"

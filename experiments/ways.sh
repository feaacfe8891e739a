# For run.sh of an experiment that trains the same model in several ways: sh experiments/ways.sh FOLDER OUT ALGORITHM/WAY ...
# FOLDER/WAY.yaml is a way's run file; OUT/WAY-SEED its run. A run that was stopped goes on, a finished one is left alone.
# SEEDS="0 1 2", MORE="steps=4" as in run.sh. At the end the table, and a report of each seed with its runs side by side.
set -eu
here=$1 out=$2
shift 2
rlhf=${RLHF_IMG:-rlhf-img}
for seed in ${SEEDS:-0 1 2}; do
  runs=""
  for each in "$@"; do
    algorithm=${each%%/*} way=${each##*/}
    run="$out/$way-$seed" runs="$runs $out/$way-$seed"
    [ -f "$run/eval.json" ] && continue
    if [ -f "$run/config.yaml" ]; then
      $rlhf "$algorithm" --out "$run" --resume
    else
      $rlhf "$algorithm" --out "$run" --config "$here/$way.yaml" --seed "$seed" ${MORE:-}
    fi
  done
  $rlhf report $runs --out "$out/report-$seed.html"
done
${PYTHON:-python3} "$(dirname "$0")/ways.py" "$out"

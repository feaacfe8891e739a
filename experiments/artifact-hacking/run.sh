#!/bin/sh
# Trains with the rubric alone, with the artifact reward summed and as a gate, held and not; prints the table and makes
# one report of each seed. From the root: sh experiments/artifact-hacking/run.sh. A run that was stopped goes on.
# More or fewer seeds: SEEDS="0"; some ways: WAYS="grpo/gate"; a longer run: MORE="steps=120"; elsewhere: OUT=DIR.
exec sh experiments/ways.sh "$(dirname "$0")" "${OUT:-runs/artifact-hacking}" ${WAYS:-grpo/rubric grpo/summed grpo/gate \
  grpo/rubric-unheld grpo/summed-unheld grpo/gate-unheld}

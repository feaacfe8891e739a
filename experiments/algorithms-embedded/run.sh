#!/bin/sh
# Trains with each algorithm and setting, as many images each; then prints the table and makes one report of each seed.
# From the root: sh experiments/algorithms-embedded/run.sh. A run that was stopped goes on.
# SEEDS="0": seeds; WAYS="grpo/awm nft/nft": some of the ways; MORE="steps=60": a longer run; OUT=DIR: elsewhere.
exec sh experiments/ways.sh "$(dirname "$0")" "${OUT:-runs/algorithms}" ${WAYS:-grpo/awm nft/nft grpo/awm-unheld \
  nft/nft-unheld grpo/steps grpo/steps-wide grpo/steps-loud grpo/pool grpo/gdpo grpo/sum grpo/guided}

#!/usr/bin/env bash
# Zachary's karate club by a GCN of 576 weights, dense and in random masks, and pruned iteratively
# (IMP, magnitude) to density 0.1 from dense and from a balanced mask. Five seeds, which also deal
# the members to validation and test: 60 runs, about five minutes on two cores. Running it again
# resumes, and skips what is finished.
set -euo pipefail
cd "$(dirname "$0")/../../STR"
export OMP_NUM_THREADS=1 # two runs at the same time on two cores

commands() {
  for seed in 1 2 3 4 5; do
    while read -r start method density levels; do
      echo --set karate --er-sampling exact --seed $seed --name $start-$density${levels:+-IMP} \
        --er-sparse-method $method --er-sparse-init $density --expt-setup $start${levels:+,IMP} \
        ${levels:+--threshold-list $levels --final_prune_epoch 50 --rewind weights} \
        --log-dir runs/graph --result-dir ../results/graph --resume auto
    done <<'END'
dense uniform 1
uniform uniform 0.5
uniform uniform 0.2
uniform uniform 0.1
balanced balanced 0.5
balanced balanced 0.2
balanced balanced 0.1
ERK ERK 0.5
ERK ERK 0.2
ERK ERK 0.1
dense uniform 1 0.5 0.2 0.1
balanced balanced 0.5 0.2 0.1
END
  done
}

commands | xargs -P 2 -L 1 python main.py
python -m startsparse.report ../results/graph/results.csv --by requested expt_setup \
  --of density valid_accuracy test_accuracy --plot ../results/graph/plot.png \
  | tee ../results/graph/table.md

#!/usr/bin/env bash
# The GCN of Kipf and Welling on Cora and Citeseer, 1,000 steps, five seeds: dense and in random
# masks, pruned iteratively (IMP, magnitude) to density 0.1 from dense and from a balanced mask, and
# by GraNet from that mask, 160 runs. Then, in longer/, dense and balanced masks of 0.1 with 5,000
# steps, 20 runs. About 25 minutes on two cores. Running it again resumes, and skips what is
# finished. SETS=cora runs only one of the two.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 # two runs at the same time on two cores

results=../results/citation

run() { # package, final density, further options; the name is that of the setting
  local package=$1 density=$2
  shift 2
  echo "$package" --set "$set" --seed "$seed" --er-sampling exact "$@" \
    --log-dir "runs/citation/$density" --result-dir $results --resume auto
}

static() { # ratio, density, name
  run STR "$2" --name "${3:-$1}" --er-sparse-method "$1" --er-sparse-init "$2"
}

pruned() { # ratio, initial density, name
  run STR 0.1 --name "$3" --er-sparse-method "$1" --er-sparse-init "$2" --rewind weights \
    --threshold-list $4 --final-prune-epoch 50
}

commands() {
  for seed in 1 2 3 4 5; do
    for set in ${SETS:-cora citeseer}; do
      static uniform 1 dense
      for density in 0.5 0.2 0.1; do
        for ratio in uniform ERK balanced pyramidal; do # ER is ERK, as no layer has a kernel
          static $ratio $density
        done
      done
      pruned uniform 1 IMP-dense "0.5 0.2 0.1"
      pruned balanced 0.5 IMP-balanced-0.5 "0.2 0.1"
      run ER_DST 0.1 --name GraNet-balanced-0.5
    done
  done
}

longer() {
  results=../results/citation/longer
  for seed in 1 2 3 4 5; do
    for set in ${SETS:-cora citeseer}; do
      run STR 0.1 --name balanced-5000 --er-sparse-method balanced --er-sparse-init 0.1 --epochs 250
      run STR 1 --name dense-5000 --er-sparse-method uniform --er-sparse-init 1 --epochs 250
    done
  done
}

(commands; longer) | xargs -P 2 -L 1 bash -c 'cd "$0" && python main.py "$@"'
cd STR
python -m startsparse.report ../results/citation/results.csv --by requested name set \
  --of density valid_accuracy test_accuracy --plot ../results/citation/plot.png --band dense \
  | tee ../results/citation/table.md
python -m startsparse.report ../results/citation/longer/results.csv --by name set \
  --of density valid_accuracy test_accuracy | tee ../results/citation/longer/table.md
{ # words of which no hidden unit knows, in the tested networks of density 0.1
  echo run,dead_words
  for run in ../{STR,ER_DST}/runs/citation/0.1/*/*/seed-?; do
    if [[ $run == *-5000/* ]]; then continue; fi
    echo "$run,$(grep ^hidden "$run/density.csv" | cut -d , -f 8)"
  done
} > ../results/citation/dead_words.csv

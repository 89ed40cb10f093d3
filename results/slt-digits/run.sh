#!/usr/bin/env bash
# Strong lottery tickets of density 0.2, 0.1 and 0.05 on digits: edge-popup inside a dense network
# and inside uniform random masks of density 0.8, 0.5 and 0.3, annealed and not, three seeds: 72
# runs of a narrow VGG11, about 15 minutes on two cores. Afterwards each ticket is tested with its
# masks shuffled. Running it again resumes, and skips what is finished.
set -euo pipefail
cd "$(dirname "$0")/../../ER_SLT"
export OMP_NUM_THREADS=1 # two runs at the same time on two cores

commands() {
  for seed in 1 2 3; do
    for density in 0.2 0.1 0.05; do
      for start in 1 0.8 0.5 0.3; do
        for anneal in True False; do
          echo --er-init-density $start --sparsity $density --anneal $anneal \
            --dataset digits --model vgg11 --width 16 --levels 5 --epochs 3 --batch-size 64 \
            --lr 1.0 --lr-policy cosine --shuffle --sparse-compute on --seed $seed \
            --log-dir runs/slt-digits --result-dir ../results/slt-digits --resume auto
        done
      done
    done
  done
}

commands | xargs -P 2 -L 1 python main.py
python -m startsparse.report ../results/slt-digits/results.csv \
  --by sparsity er_sparse_init anneal --of shuffled_mask_accuracy \
  shuffled_mask_and_weights_accuracy test_accuracy --plot ../results/slt-digits/plot.png \
  | tee ../results/slt-digits/table.md

#!/usr/bin/env bash
# ResNet18 of 11 million weights on CIFAR-10 on a GPU, bf16, batch 512, two seeds: dense, ERK and
# balanced masks at 0.2, 0.05 and 0.01: 14 runs of EPOCHS epochs each (measure one first).
#
#   EPOCHS=8 results/cifar10-jpeg/gpu.sh --set folder --data DIR
#
# gpu/results.csv gets a line per run, with its seconds; environment.json of a run has the card's name.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../../STR"

run() { # name, further options
  python main.py --config configs/cifar10.yaml "${data[@]}" --epochs "$EPOCHS" --batch-size 512 \
    --warmup-length 1 --lr 0.2 --er-sampling exact --amp bf16 --seed "$seed" --name "$@" \
    --log-dir runs/cifar10-gpu --result-dir "$here/gpu" --resume auto
}

data=("$@")
for seed in 1 2; do
  run dense --conv-type DenseConv
  for density in 0.05 0.2 0.01; do
    for ratio in ERK balanced; do
      run $ratio-$density --er-sparse-method $ratio --er-sparse-init $density
    done
  done
done
python -m startsparse.report "$here/gpu/results.csv" --by name \
  --of density training_flops_share seconds test_accuracy | tee "$here/gpu/table.md"

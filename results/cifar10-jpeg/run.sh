#!/usr/bin/env bash
# Starting sparse on CIFAR-10, three seeds, 15 epochs: about 10 hours on two cores. Of images in
# folders, as of a copy that was re-encoded to JPEG, and of the published files:
#
#   results/cifar10-jpeg/run.sh --set folder --data DIR   # DIR/train/CLASS/*, DIR/test/CLASS/*
#   results/cifar10-jpeg/run.sh --set cifar10
#
# Two runs at the same time, each in one thread. Running it again resumes, and skips what is
# finished. EXPERIMENTS="E1 E3" runs only these. CONTINUE=1 also skips what results.csv has, for a
# checkout without the run folders.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
data=("$@")
export OMP_NUM_THREADS=1

run() { # package, name, further options: a line for each seed
  local package=$1 name=$2 seed
  shift 2
  for seed in 1 2 3; do
    if [[ -n ${CONTINUE:-} ]] && grep -q ",$name,$seed," "$here/results.csv"; then continue; fi
    echo "$package" --config configs/cifar10-narrow.yaml "${data[@]}" --seed $seed --name "$name" \
      "$@" --log-dir runs/cifar10-jpeg --result-dir "$here" --resume auto
  done
}

dense="--conv-type DenseConv --sparse-compute off" # PyTorch's own dense kernels
sparse="--sparse-compute on"                       # computes only inside the masks
erk="$sparse --sparse-init ERK --init-density"

E1() { # random masks, trained as they are
  run STR E1-vgg11-dense $dense
  for density in 0.05 0.1 0.2 0.02 0.5; do
    for ratio in ERK balanced uniform; do
      run STR E1-vgg11-$ratio-$density $sparse --er-sparse-method $ratio \
        --er-sparse-init $density
    done
  done
}

E1_resnet20() {
  for density in 0.05 0.2; do
    run STR E1-resnet20-ERK-$density $sparse --arch resnet20 --width 0 \
      --er-sparse-method ERK --er-sparse-init $density
  done
  run STR E1-resnet20-dense $dense --arch resnet20 --width 0
}

E2() { # pruned to density 0.05, 15 epochs in all, as the masks of E1 that stay
  for rewind in weights none; do
    run STR E2-vgg11-dense-rewind-$rewind $sparse --er-sparse-method ERK \
      --er-sparse-init 1 --threshold-list 0.5 0.2 0.1 0.05 --final-prune-epoch 3 --epochs 3 \
      --rewind $rewind
    run STR E2-vgg11-ERK-0.2-rewind-$rewind $sparse --er-sparse-method ERK \
      --er-sparse-init 0.2 --threshold-list 0.1 0.05 --final-prune-epoch 5 --epochs 5 \
      --rewind $rewind
  done
  for method in GraNet GMP; do
    run ER_DST E2-vgg11-ERK-0.2-$method $erk 0.2 --method $method --final-density 0.05
  done
  run STR E2-vgg11-ERK-0.3-STR $sparse --conv-type STRConvER --er-sparse-method ERK \
    --er-sparse-init 0.3 --sInit-value -8 --st-decay 0.0012 --select last
}

E3() { # drop and grow at the density of the start, every 100 steps
  for density in 0.05 0.1 0.02; do
    run ER_DST E3-vgg11-ERK-$density-SET $erk $density --method DST --growth random
    run ER_DST E3-vgg11-ERK-$density-RigL $erk $density --method DST --growth gradient
    run ER_DST E3-vgg11-ERK-$density-RigL-stop $erk $density --method DST \
      --growth gradient --stop-updates 0.75
  done
}

E4() { # strong lottery tickets of density 0.2 inside uniform masks, five levels of 3 epochs
  for start in 1 0.8 0.5 0.3; do
    for anneal in True False; do
      run ER_SLT E4-vgg11-uniform-$start-anneal-$anneal $sparse \
        --er-init-density $start --anneal $anneal --shuffle
    done
  done
}

E5() { # as many weights as the dense network of width 8, 144,856, in wider ones
  run STR E5-vgg11-8-dense $dense --width 8
  while read -r width density; do
    for ratio in uniform ERK; do
      run STR E5-vgg11-$width-$ratio $sparse --width $width --er-sparse-method $ratio \
        --er-sparse-init $density
    done
  done <<'END'
16 0.250741
32 0.0627782
64 0.0157062
END
}

commands() {
  for experiment in ${EXPERIMENTS:-E1 E3 E2 E4 E5 E1_resnet20}; do
    $experiment
  done
}

commands | xargs -P 2 -L 1 bash -c 'cd "$0" && python main.py "$@"'
python results/cifar10.py --curves

#!/usr/bin/env bash
# Dynamic sparse training to density 0.01 on digits, a narrow VGG11, three seeds. 90 runs have 12
# epochs: five methods, three initial masks, with flow preservation after every update and without.
# GraNet and GMP start at the density named, DST and static masks have 0.01 throughout, and masks
# move every 20 steps. 18 runs have 60 epochs: DST, whose masks move every 100 steps, and static.
# About 40 minutes on two cores. Running it again resumes, and skips what is finished.
set -euo pipefail
cd "$(dirname "$0")/../../ER_DST"
export OMP_NUM_THREADS=1 # two runs at the same time on two cores

run() { # epochs, steps between updates, flow preservation; from the row: name init density method
  local every="--update-frequency $2"
  if [[ $method == *is-prune* ]]; then every=; fi # the mask stays
  echo --config configs/digits-dst.yaml --name $name --sparse-init $init --init-density $density \
    $method --epochs $1 $every --flow-preservation $3 --seed $seed \
    --sparse-compute on --log-dir runs/dst-digits/$init-$3-$1 \
    --result-dir ../results/dst-digits --resume auto
}

commands() {
  for seed in 1 2 3; do
    while read -r name init density method; do
      for flow in False always; do
        run 12 20 $flow
      done
    done <<'END'
GraNet ERK 0.5 --method GraNet
GraNet pyramidal 0.1 --method GraNet
GraNet balanced 0.05 --method GraNet
GMP ERK 0.5 --method GMP
GMP pyramidal 0.1 --method GMP
GMP balanced 0.05 --method GMP
DST-gradient ERK 0.01 --method DST --growth gradient
DST-gradient pyramidal 0.01 --method DST --growth gradient
DST-gradient balanced 0.01 --method DST --growth gradient
DST-random ERK 0.01 --method DST --growth random
DST-random pyramidal 0.01 --method DST --growth random
DST-random balanced 0.01 --method DST --growth random
static ERK 0.01 --is-prune False
static pyramidal 0.01 --is-prune False
static balanced 0.01 --is-prune False
END
    while read -r name init density method; do
      run 60 100 False
    done <<'END'
DST-gradient ERK 0.01 --method DST --growth gradient
DST-gradient balanced 0.01 --method DST --growth gradient
DST-random ERK 0.01 --method DST --growth random
DST-random balanced 0.01 --method DST --growth random
static ERK 0.01 --is-prune False
static balanced 0.01 --is-prune False
END
  done
}

commands | xargs -P 2 -L 1 python main.py
python -m startsparse.report ../results/dst-digits/results.csv \
  --by er_sparse_method name flow_preservation epochs --of density training_flops_share test_accuracy \
  --plot ../results/dst-digits/plot.png | tee ../results/dst-digits/table.md
{ # dead units of the tested networks
  echo run,dead_outputs,dead_inputs
  for run in runs/dst-digits/*/digits-dst/*/seed-?; do
    echo "$run,$(tail -n 1 "$run/density.csv" | cut -d , -f 7,8)"
  done
} > ../results/dst-digits/dead_units.csv

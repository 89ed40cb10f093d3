#!/usr/bin/env bash
# Dynamic sparse training to density 0.01 on digits: five methods, three initial masks, with and
# without flow preservation, three seeds: 90 runs of a narrow VGG11, about 25 minutes on two cores.
# Running it again resumes, and skips what is finished. GraNet and GMP start at the density named;
# DST and static masks have 0.01 throughout.
set -euo pipefail
cd "$(dirname "$0")/../../ER_DST"
export OMP_NUM_THREADS=1 # two runs at the same time on two cores

commands() {
  for seed in 1 2 3; do
    for flow in False True; do
      while read -r name init density method; do
        echo --config configs/digits-dst.yaml --name $name --sparse-init $init \
          --init-density $density $method --flow-preservation $flow --seed $seed \
          --sparse-compute off --log-dir runs/dst-digits/$init-$flow \
          --result-dir ../results/dst-digits --resume auto
      done <<'END'
GraNet ERK 0.5 --method GraNet --final-density 0.01
GraNet pyramidal 0.1 --method GraNet --final-density 0.01
GraNet balanced 0.05 --method GraNet --final-density 0.01
GMP ERK 0.5 --method GMP --final-density 0.01
GMP pyramidal 0.1 --method GMP --final-density 0.01
GMP balanced 0.05 --method GMP --final-density 0.01
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
    done
  done
}

commands | xargs -P 2 -L 1 python main.py
python -m startsparse.report ../results/dst-digits/results.csv \
  --by er_sparse_method name flow_preservation --of density training_flops_share test_accuracy \
  --plot ../results/dst-digits/plot.png | tee ../results/dst-digits/table.md
{ # of the tested networks
  echo run,dead_outputs,dead_inputs
  for run in runs/dst-digits/*/digits-dst/*/seed-?; do
    echo "$run,$(tail -n 1 "$run/density.csv" | cut -d , -f 7,8)"
  done
} > ../results/dst-digits/dead_units.csv

#!/usr/bin/env bash
# ResNet18 of 11 million weights on CIFAR-10 on a GPU, bf16, batch 512, two seeds: dense, ERK and
# balanced masks at 0.2, 0.05 and 0.01: 14 runs, of as many epochs as fit into BUDGET seconds.
#
#   BUDGET=480 results/cifar10-jpeg/gpu.sh --set folder --data DIR
#
# It first trains one dense network for four epochs and takes the time. Running it again resumes, with the
# same number of epochs, and skips what is finished; EPOCHS=8 sets that number. PYTHON names another
# Python. gpu/results.csv gets a line per run, with its seconds and, as expt_setup, the card.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../../STR"
python=${PYTHON:-python}
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}"
folder=runs/cifar10-gpu
data=("$@")
runs=14

train() { # name, log folder, result folder, further options
  local name=$1 logs=$2 results=$3
  shift 3
  $python main.py --config configs/cifar10.yaml "${data[@]}" --batch-size 512 --warmup-length 1 \
    --lr 0.2 --amp bf16 --name "$name" --log-dir "$logs" \
    --result-dir "$results" "$@"
}

now() { date +%s.%N; }

measure() { # prints the epochs of a run that fits
  local scratch began ended
  scratch=$(mktemp -d)
  train first "$scratch" "$scratch" --conv-type DenseConv --epochs 1 >&2 # decodes the images
  began=$(now)
  train second "$scratch" "$scratch" --conv-type DenseConv --epochs 4 >&2
  ended=$(now)
  $python - "$scratch"/*/second/seed-1/epochs.csv "$began" "$ended" "$left" "$runs" >&3 <<'END'
import csv, sys

path, (began, ended, left, runs) = sys.argv[1], map(float, sys.argv[2:])
with open(path, newline="") as file:
    seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
epoch = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
rest = ended - began - len(seconds) * epoch
left -= ended - began + rest  # and the first run
print(int((0.9 * left / runs - rest) / epoch))
print(f"{epoch:.2f} s an epoch, {rest:.1f} s around them", file=sys.stderr)
END
  rm -r "$scratch"
}

mkdir -p "$folder" "$here/gpu"
left=${BUDGET:-480}
if [[ -z ${EPOCHS:-} && ! -f $folder/epochs ]]; then
  { measure; } 3> "$folder/measured"
  mv "$folder/measured" "$folder/epochs"
fi
epochs=${EPOCHS:-$(cat "$folder/epochs")}
if ((epochs < 2)); then
  rm -f "$folder/epochs"
  echo "error: $left seconds are too few for $runs runs of two epochs" >&2
  exit 2
fi
echo "$runs runs of $epochs epochs"
card=$($python -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")')

run() { # name, further options
  local name=$1
  shift
  if ((SECONDS > left)); then
    echo "the $left seconds are over; run the same command again for the other runs" >&2
    exit 1
  fi
  train "$name" "$folder" "$here/gpu" --epochs "$epochs" --seed "$seed" --expt-setup "$card" \
    --resume auto "$@"
}

for seed in 1 2; do
  run dense --conv-type DenseConv
  for density in 0.05 0.2 0.01; do
    for ratio in ERK balanced; do
      run $ratio-$density --er-sparse-method $ratio --er-sparse-init $density --er-sampling exact
    done
  done
done
$python -m startsparse.report "$here/gpu/results.csv" --by name \
  --of density training_flops_share seconds test_accuracy | tee "$here/gpu/table.md"

#!/usr/bin/env bash
# Iterative pruning on digits from a dense start and from ER masks, IMP (--rewind weights) and
# learning-rate rewinding (--rewind none), three seeds: 54 runs, about 45 minutes on two cores.
# Running it again resumes, and skips what is finished.
set -euo pipefail
cd "$(dirname "$0")/../../STR"
export OMP_NUM_THREADS=1 # two runs at the same time on two cores
python run_imp.py --config configs/digits-imp.yaml --seeds 1 2 3 --jobs 2 \
  --er-sparse-methods balanced ERK uniform pyramidal --er-sparse-inits 1 0.5 0.2 \
  --densities 0.5 0.2 0.1 0.05 0.02 0.01 --rewind weights none \
  --log-dir runs/imp-digits --result-dir ../results/imp-digits \
  -- --final_prune_epoch 6 --sparse-compute on

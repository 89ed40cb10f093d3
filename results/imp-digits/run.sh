#!/usr/bin/env bash
# Iterative magnitude pruning on digits: a dense start against ER masks of density 0.5 and 0.2 with
# four layer-wise ratios, with IMP and learning-rate rewinding, three seeds: 54 runs, about 10
# minutes on two cores. Rerunning resumes, and skips what is finished.
set -euo pipefail
cd "$(dirname "$0")/../../STR"
export OMP_NUM_THREADS=1
python run_imp.py --config configs/digits-imp.yaml --seeds 1 2 3 --er-sparse-inits 1 0.5 0.2 \
  --er-sparse-methods balanced ERK uniform pyramidal --densities 0.5 0.2 0.1 0.05 0.02 \
  --rewind weights none --jobs 2 --log-dir runs/imp-digits --result-dir ../results/imp-digits

#!/usr/bin/env bash
# Sparse to sparse on tables: breast cancer and digits (64 columns), from a dense start and from
# uniform ER masks of density 0.5 and 0.2, pruned by magnitude to 0.005, with and without reset to
# the initial weights, with and without flow preservation, five seeds: 120 networks, about 6 minutes
# on one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 # one order of sums on every machine, as with --sparse-compute off
python -m startsparse.tabular --tables breast-cancer digits --starts 1 0.5 0.2 \
  --reset False True --flow-preservation False True --seeds 1 2 3 4 5 \
  --sparse-compute off --result-dir results/tabular

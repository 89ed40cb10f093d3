#!/usr/bin/env bash
# Soft thresholds on digits: from a dense start and from a balanced ER mask at 0.3, two weight decays
# of s, three seeds. About 25 minutes on two cores. Run again, it resumes and skips what is finished.
set -euo pipefail
cd "$(dirname "$0")/../../STR"
for seed in 1 2 3; do
  for conv_type in STRConv STRConvER; do
    for st_decay in 0.004 0.008; do
      python main.py --config configs/digits-str.yaml --conv-type "$conv_type" \
        --st-decay "$st_decay" --seed "$seed" --name "$conv_type-$st_decay" \
        --log-dir runs/str-digits --result-dir ../results/str-digits --resume auto
    done
  done
done
python -m startsparse.report ../results/str-digits/results.csv --by conv_type st_decay \
  --of requested density valid_accuracy test_accuracy | tee ../results/str-digits/table.md

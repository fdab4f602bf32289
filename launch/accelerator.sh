#!/usr/bin/env bash
# What needs an accelerator, in one command on a machine without a network:
#
#   DATA=DIR OUT=DIR bash launch/accelerator.sh [STEP]...
#
# Without a step, all of them. Each is limited to LIMIT seconds (default 540)
# and goes on where it stopped when it is called again with the same RUNS.
#
#   benchmark  images/s and peak memory, at float32 (TF32, or the TPU's default)
#              and at bfloat16, beside PyTorch's loop over clients if torch is
#              installed
#   table3     CIFAR-10, nine pairs, trained as one program; cleansed as the paper
#              does, and by the server alone (beyond-6)
#   table4     CIFAR-10's row of Table IV: Neural Cleanse and Fine-Pruning of the
#              models of table3
#   bfloat16   Table III, trained at bfloat16
#   table1     the 18 pairs of Table I on SEEDS (default 0,1,2), as one program
#   table5     what Table V adds to it
#   table2     Fashion-MNIST, nine pairs on SEEDS
#   mnist      Tables VI and VII, Section VI-B, the figures and robust
#              fine-tuning, on seed 0
#   beyond     other rules in training, other attacks, attackers who hide, and
#              Feature Shift Tuning by all clients: nine pairs, the first of SEEDS
#
# Tables II, III and IV, and beyond, need DATA, a TFDS directory. FLAGS are added
# to every run, as in FLAGS='rounds=1 eval_every=1' to try things out; PYTHON is
# the interpreter. Folders count from the repository's root. RUNS (default
# runs/accelerator) is the --workdir of launch/reproduce.py; OUT (default RUNS)
# gets a log per step, what was measured, and runs.tar.gz: settings, phases and
# curves of all runs without their checkpoints, which
# `python launch/reproduce.py --results=DIR ...` takes over once unpacked.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} runs=${RUNS:-runs/accelerator} out=${OUT:-$runs}
limit=${LIMIT:-540} seeds=${SEEDS:-0,1,2} data=${DATA:-}
mkdir -p "$out" "$runs"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0

step() { # NAME COMMAND...
  local name=$1 started=$SECONDS status=0
  shift
  echo "+ $name: $*"
  timeout --signal=TERM --kill-after=30 "$limit" "$@" 2>&1 |
    tee "$out/$name.log" | tail -n 40 || status=$?
  echo "$name: $((SECONDS - started)) s, exit status $status" |
    tee -a "$out/times.txt"
  ((status == 0)) || failed=1
}

reproduce() { # NAME RUNS FLAG...
  local name=$1 folder=$2 text overrides=()
  shift 2
  for text in ${FLAGS:-}; do overrides+=("--override=$text"); done
  step "$name" "$python" launch/reproduce.py --workdir="$folder" \
    --data_dir="$data" "$@" "${overrides[@]}"
}

measure() { # NAME FLAG...
  local name=$1 peer=()
  shift
  "$python" -c 'import torch' 2> /dev/null && peer=(--compare=torch)
  step "$name" "$python" launch/benchmark.py --json="$out/$name.json" "$@" \
    "${peer[@]}"
}

all="benchmark table3 table4 bfloat16 table1 table5 table2 mnist beyond"
for name in "$@"; do
  # Before anything runs.
  if [[ " $all " != *" $name "* ]]; then
    echo "no step $name: choose of $all." >&2
    exit 2
  fi
done
for name in ${*:-$all}; do
  case $name in
    table2 | table3 | table4 | bfloat16 | beyond)
      if [[ -z $data ]]; then
        echo "$name: DATA must name a TFDS directory." >&2
        failed=1
        continue
      fi
      ;;
  esac
  case $name in
    benchmark)
      measure benchmark --workload=W4,W1,W2
      measure benchmark-bfloat16 --workload=W4 --precision=bfloat16
      ;;
    table1 | table5 | table2)
      reproduce "$name" "$runs" --table="${name#table}" --seeds="$seeds"
      ;;
    table3)
      reproduce table3 "$runs" --table=3 --beyond=6
      ;;
    table4)
      reproduce table4 "$runs" --table=4 --datasets=cifar10
      ;;
    bfloat16)
      reproduce bfloat16 "$runs/bfloat16" --table=3 \
        --override=precision=bfloat16
      ;;
    mnist)
      reproduce mnist "$runs" --table=6,7 --discussion=1,2,3 \
        --figure=3,5,6,10,8,7 --beyond=1,3
      ;;
    beyond)
      reproduce beyond "$runs" --beyond=11,12,13,14,15 --seeds="${seeds%%,*}"
      ;;
  esac
done
(cd "$runs" && find . -name config.json -o -name results.json \
  -o -name metrics.jsonl -o -name failed.txt | tar czf - -T -) \
  > "$out/runs.tar.gz"
exit $failed

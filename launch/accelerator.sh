#!/usr/bin/env bash
# What needs an accelerator, in one command on a machine without a network:
#
#   DATA=DIR OUT=DIR bash launch/accelerator.sh [benchmark] [table1] [table3]
#
# Without a step, all of them. Each is limited to LIMIT seconds (default 540)
# and goes on where it stopped when it is called again with the same RUNS.
#
#   benchmark  images/s and peak memory, beside PyTorch's loop over clients if
#              torch is installed
#   table1     the 18 pairs of Table I on SEEDS (default 0,1,2), one sweep
#   table3     the nine pairs of Table III, one sweep at float32 (TF32, or the
#              TPU's default) and one at bfloat16; needs DATA, a TFDS directory
#              with cifar10
#
# FLAGS are added to every run, as in FLAGS='--rounds=1' to try things out;
# PYTHON is the interpreter. Folders count from the repository's root. RUNS
# (default runs/accelerator) holds the runs; OUT (default RUNS) gets a log per
# step, what was measured, and runs.tar.gz: settings, phases and curves of all
# runs without their checkpoints.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} runs=${RUNS:-runs/accelerator} out=${OUT:-$runs}
limit=${LIMIT:-540} seeds=${SEEDS:-0,1,2} data=${DATA:-}
read -ra extra <<< "${FLAGS:-}"
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

train() { # NAME FLAGFILE SWEEP FLAG...
  local name=$1 file=$2 sweep=$3
  shift 3
  step "$name" "$python" launch/main.py --flagfile="launch/$file" \
    --sweep="$sweep" --workdir="$runs/$name" --nofigures "$@" "${extra[@]}"
}

nine() { # FORMAT: a pair for each label but 9
  printf "$1," 0 1 2 3 4 5 6 7 8 | sed 's/,$//'
}

for name in ${*:-benchmark table1 table3}; do
  case $name in
    benchmark)
      peer=()
      "$python" -c 'import torch' 2> /dev/null && peer=(--compare=torch)
      step benchmark "$python" launch/benchmark.py --workload=W1,W2,W4 \
        --json="$out/benchmark.json" "${peer[@]}"
      ;;
    table1)
      train table1 mnist.flags \
        "seed=$seeds;pairs=$(nine 9:%s),$(nine %s:9)"
      ;;
    table3)
      if [[ -z $data ]]; then
        echo "table3: DATA must name a TFDS directory with cifar10." >&2
        failed=1
        continue
      fi
      for precision in default bfloat16; do
        train "table3-$precision" cifar10_dba.flags "pairs=$(nine 9:%s)" \
          --data_dir="$data" --precision="$precision"
      done
      ;;
    *)
      echo "no step $name: benchmark, table1 or table3." >&2
      exit 2
      ;;
  esac
done
(cd "$runs" && find . -name config.json -o -name results.json \
  -o -name metrics.jsonl | tar czf - -T -) > "$out/runs.tar.gz"
exit $failed

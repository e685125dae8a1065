#!/usr/bin/env bash
# Does DiG on this project's kernels in bf16 learn as the reference in fp32 does, and the same way twice? Trains DiG-S/2 on
# Fashion-MNIST for 300 steps: the reference in fp32, and the kernels in bf16 two times from the same seed. On an H100
# that takes two minutes; no run may take longer than its limit. The learning rate is low and gradients are
# clipped: at 1e-4 training amplifies roundings until two runs in fp32 are 8% apart (docs/log.md).
#
#   bash examples/follow.sh DATA OUT        DATA holds Fashion-MNIST's four idx files; OUT gets everything
#
# Ends with what `python -m reports.follow OUT/report` says; its exit status is 1 where a bound fails. What is small lies
# in OUT/report and OUT/report.tgz. MODEL, STEPS, BATCH, LEARNING_RATE, IMPLEMENTATION, DTYPE, EXECUTION and PYTHON may
# be set. Run again, it makes what is missing.
set -euo pipefail
data=$1 out=$2
python=${PYTHON:-python}
model=${MODEL:-DiG-S/2} implementation=${IMPLEMENTATION:-triton} dtype=${DTYPE:-bf16}
steps=${STEPS:-300} batch=${BATCH:-64} execution=${EXECUTION:-graph} rate=${LEARNING_RATE:-1e-5}
mkdir -p "$out/report"

train() { # limit in seconds, name, implementation, dtype
    timeout --kill-after=10 "$1" "$python" -m dig train --model "$model:$3" --dtype "$4" --data "$data" --out "$out/$2" \
        --steps "$steps" --batch "$batch" --execution "$execution" --log-every 1 --save-every "$steps" --keep 1 \
        --lr "$rate" --clip 1 --grid-every 0
    mkdir -p "$out/report/$2"
    cp "$out/$2/config.json" "$out/$2/train.jsonl" "$out/report/$2"
}

train 170 reference reference fp32
train 75 first "$implementation" "$dtype"
train 60 second "$implementation" "$dtype"
status=0
# The checkpoints stay where they are: half a GiB each.
"$python" -m reports.follow "$out/report" --runs "$out" || status=$?
tar czf "$out/report.tgz" -C "$out" report
exit "$status"

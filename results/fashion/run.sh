#!/usr/bin/env bash
# Trains DiG-S/2 and Flash-DiT-S/2 on Fashion-MNIST for the same steps, kills each once and goes on, and measures
# 10,000 samples of four checkpoints of each. About eight minutes on an H100; no step takes longer than its limit.
#
#   bash results/fashion/run.sh DATA OUT        DATA holds Fashion-MNIST's four idx files; OUT gets everything
#
# STEPS, BATCH, SAMPLES, MODELS and PYTHON may be set, as may KILL_AFTER, the seconds until the kill. What is small
# (logs, grids, measurements) is gathered in OUT/report, from where `python -m reports.fashion` draws the figure, and in
# OUT/report.tgz. Run again, it goes on where it was.
set -euo pipefail
data=$1 out=$2
python=${PYTHON:-python}
steps=${STEPS:-2400} batch=${BATCH:-256} samples=${SAMPLES:-10000}
models=${MODELS:-"DiG-S/2 Flash-DiT-S/2"}
execution=${EXECUTION:-graph}
every=$((steps / 4))
mkdir -p "$out"

if [ ! -f "$out/classifier.safetensors" ]; then
    timeout 120 "$python" -m dig classifier --data "$data" --out "$out/classifier.safetensors" --epochs 4
fi

for model in $models; do
    name=${model%%/*}
    run=$out/$name
    report=$out/report/$name
    train=("$python" -m dig train --model "$model" --data "$data" --out "$run" --steps "$steps" --batch "$batch"
        --lr 3e-4 --warmup 100 --ema 0.998 --execution "$execution" --save-every $((every / 2)) --keep 8
        --grid-every "$every" --grid-steps 25 --log-every 20)
    if [ ! -d "$run" ]; then
        timeout --signal=KILL "${KILL_AFTER:-60}" "${train[@]}" || echo "killed; going on"
    fi
    timeout 240 "${train[@]}"
    mkdir -p "$report"
    for quarter in 1 2 3 4; do
        step=$(printf '%08d' $((every * quarter)))
        if grep -qs "\"checkpoint\": \"step-$step.safetensors\"" "$report/evaluation.jsonl"; then
            continue
        fi
        npz=$out/$name-$step.npz
        timeout 120 "$python" -m dig sample --checkpoint "$run/checkpoints/step-$step.safetensors" --sampler ddim \
            --steps 25 --samples "$samples" --batch 2500 --npz "$npz" --grid "$report/unguided-$step.png"
        timeout 60 "$python" -m dig evaluate --samples "$npz" --data "$data" \
            --classifier "$out/classifier.safetensors" --append "$report/evaluation.jsonl"
        rm "$npz"
    done
    timeout 60 "$python" -m dig sample --checkpoint "$run" --sampler ddim --steps 50 --cfg 2 --cfg-channels all \
        --samples 100 --grid "$report/guided.png"
    cp "$run/config.json" "$run/train.jsonl" "$run/events.jsonl" "$run"/samples/*.png "$report"
done
tar czf "$out/report.tgz" -C "$out" report

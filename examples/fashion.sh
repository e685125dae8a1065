#!/usr/bin/env bash
# Trains DiG-S/2 and Flash-DiT-S/2 on Fashion-MNIST for the same steps, kills each once and goes on, and measures samples
# of four checkpoints of each: 2,500 of every one, which the curves are drawn of, and 10,000 of the last. On an H100 that
# should take about four minutes a model; no command of it takes longer than its limit.
#
#   bash examples/fashion.sh DATA OUT        DATA holds Fashion-MNIST's four idx files; OUT gets everything
#
# STEPS, BATCH, SAMPLES, EARLY, MODELS, EXECUTION and PYTHON may be set, as may KILL_AFTER, the seconds from the first
# checkpoint to the kill, and PATIENCE, by which the limits are multiplied: 20 on a CPU. What is small lies in
# OUT/report and, after each model, in OUT/report.tgz: logs, grids, measurements, and the classifier that they are of.
# `python -m reports.fashion OUT/report` draws the figure.
#
# Run again, it makes what is missing. A model at a time works too (MODELS=DiG-S/2, then MODELS=Flash-DiT-S/2), on another
# machine even: take OUT/report.tgz there, and it goes on from that, with the same classifier.
set -euo pipefail
data=$1 out=$2
python=${PYTHON:-python}
steps=${STEPS:-2000} batch=${BATCH:-128} samples=${SAMPLES:-10000} early=${EARLY:-2500}
models=${MODELS:-"DiG-S/2 Flash-DiT-S/2"}
execution=${EXECUTION:-graph}
quarter=$((steps / 4))
patience=${PATIENCE:-1}
report=$out/report
classifier=$report/classifier.safetensors
trap 'kill -KILL $(jobs -p) 2>/dev/null || true' EXIT

say() { echo "== after $SECONDS s: $*"; }

mkdir -p "$out"
if [ ! -d "$report" ] && [ -f "$out/report.tgz" ]; then
    tar xzf "$out/report.tgz" -C "$out"
fi
mkdir -p "$report"
if [ ! -f "$classifier" ]; then
    say "classifier"
    timeout $((120 * patience)) "$python" -m dig classifier --data "$data" --out "$classifier" --epochs 4
fi

for model in $models; do
    name=${model%%/*}
    run=$out/$name
    mine=$report/$name
    if [ -f "$mine/done" ]; then
        continue
    fi
    mkdir -p "$mine"
    train=("$python" -m dig train --model "$model" --data "$data" --out "$run" --steps "$steps" --batch "$batch"
        --lr 3e-4 --warmup 100 --ema 0.998 --execution "$execution" --save-every "$quarter" --keep 4
        --grid-every "$quarter" --grid-steps 25 --log-every 20)
    say "$model: training"
    if ! grep -qs resumed "$run/events.jsonl"; then
        "${train[@]}" &
        process=$! limit=$((SECONDS + 200 * patience))
        while [ ! -f "$(printf '%s/checkpoints/step-%08d.json' "$run" "$quarter")" ] &&
            kill -0 "$process" 2>/dev/null && [ "$SECONDS" -lt "$limit" ]; do
            sleep 0.2
        done
        sleep "${KILL_AFTER:-3}"
        kill -KILL "$process" 2>/dev/null || true
        wait "$process" || say "$model: killed; going on"
    fi
    timeout $((300 * patience)) "${train[@]}"
    files=() given=()
    for i in 1 2 3 4; do
        step=$(printf '%08d' $((quarter * i)))
        npz=$out/$name-$step.npz
        files+=("$npz") given+=(--samples "$npz")
        if [ ! -f "$npz" ]; then
            say "$model: samples of step $step"
            timeout $((150 * patience)) "$python" -m dig sample --sampler ddim --steps 25 --batch 2500 \
                --checkpoint "$run/checkpoints/step-$step.safetensors" --npz "$npz" \
                --samples "$([ "$i" = 4 ] && echo "$samples" || echo "$early")" --grid "$mine/unguided-$step.png"
        fi
    done
    say "$model: measuring"
    rows=$mine/evaluation.jsonl
    rm -f "$rows"
    evaluate=(timeout $((100 * patience)) "$python" -m dig evaluate --data "$data" --classifier "$classifier"
        --reference "$samples" --append "$rows")
    "${evaluate[@]}" --count "$early" "${given[@]}"
    if [ "$early" != "$samples" ]; then
        "${evaluate[@]}" --samples "${files[3]}"
    fi
    timeout $((60 * patience)) "$python" -m dig sample --checkpoint "$run" --sampler ddim --steps 50 --cfg 2 \
        --cfg-channels all --samples 100 --grid "$mine/guided.png"
    cp "$run/config.json" "$run/train.jsonl" "$run/events.jsonl" "$run"/samples/*.png "$mine"
    rm "${files[@]}"
    touch "$mine/done"
    tar czf "$out/report.tgz.new" -C "$out" report
    mv "$out/report.tgz.new" "$out/report.tgz"
done
say "done"

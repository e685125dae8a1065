#!/usr/bin/env bash
# A first hour: look at the models, measure two, train one on pictures in class folders, stop it and go on, sample,
# measure the samples, take the weights to diffusers and to Python, and compare two measurements.
#
#   bash examples/first-hour.sh OUT          OUT gets everything; made if it is not there
#
# Without a GPU it takes some minutes with the small values that are the defaults; on one, set MODEL=DiG-S/2,
# PEER=DiT-S/2, SIZE=64, STEPS=20000 and PICTURES=/my/class/folders. INSTALL=0 leaves out the installation, LAUNCHES are
# the process launches of a measurement. Run again, it makes what is missing.
set -euo pipefail
out=$1
python=${PYTHON:-python}
model=${MODEL:-DiG-S/8} peer=${PEER:-DiT-S/8} size=${SIZE:-32} steps=${STEPS:-60} batch=${BATCH:-16}
samples=${SAMPLES:-48} launches=${LAUNCHES:-5} resolution=${RESOLUTION:-64}
pictures=${PICTURES:-$out/pictures}

say() { printf '\n== %s\n' "$*"; }

mkdir -p "$out"
if [ "${INSTALL:-1}" = 1 ]; then
    say "Install: torch first, then this project with what training needs"
    "$python" -m pip install torch
    "$python" -m pip install -e '.[train]'
fi

say "Which models there are"
"$python" -m bench list > "$out/models.txt"
head -n 8 "$out/models.txt"

say "How fast two of them are here"
"$python" -m bench run --models DiG,DiT --resolutions "$resolution" --modes forward --launches "$launches" \
    --out "$out/monday.jsonl" --resume
"$python" -m reports "$out/monday.jsonl" --out "$out/report"

if [ ! -d "$pictures" ]; then
    say "Pictures to train on: three colours, a folder each"
    "$python" - "$pictures" "$size" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

folder, side = Path(sys.argv[1]), int(sys.argv[2])
random = np.random.default_rng(0)
for channel, name in enumerate(("red", "green", "blue")):
    (folder / name).mkdir(parents=True)
    for number in range(64):
        pixels = random.integers(0, 60, size=(side, side, 3), dtype=np.uint8)
        pixels[side // 4 : -side // 4, side // 4 : -side // 4, channel] += 180
        Image.fromarray(pixels).save(folder / name / f"{number}.png")
PYTHON
fi

train=("$python" -m dig train --data "$pictures" --image-size "$size" --batch "$batch" --lr 1e-3 --ema 0.99)
run=$out/run
first=(--model "$model" --out "$run" --steps "$steps" --save-every $((steps / 4)) --log-every $((steps / 4)))
if [ ! -f "$(printf '%s/checkpoints/step-%08d.json' "$run" "$steps")" ]; then
    say "Train, and stop in the middle as Ctrl-C does"
    "${train[@]}" "${first[@]}" &
    process=$!
    until ls "$run"/checkpoints/step-*.json > /dev/null 2>&1 || ! kill -0 "$process" 2> /dev/null; do
        sleep 0.2
    done
    # To a process in the background a shell lets no SIGINT through; SIGTERM saves and ends the run as well.
    kill -TERM "$process" 2> /dev/null || true
    wait "$process" || echo "stopped, as asked"
    say "Go on with the same command"
    "${train[@]}" "${first[@]}"
fi

say "Sample: a grid with labels, and a folder of PNG files"
"$python" -m dig sample --checkpoint "$run" --steps 10 --grid "$out/grid.png" --labels --scale 3
"$python" -m dig sample --checkpoint "$run" --steps 10 --classes red,blue --samples 8 --images "$out/samples"

say "How good: from the run to its distance from the data"
if [ ! -f "$out/classifier.safetensors" ]; then
    "$python" -m dig classifier --data "$pictures" --image-size "$size" --out "$out/classifier.safetensors" --epochs 2
fi
"$python" -m dig evaluate --checkpoint "$run" --samples "$samples" --steps 10 --data "$pictures" --image-size "$size" \
    --classifier "$out/classifier.safetensors" --append "$out/quality.jsonl"

say "Take the weights along: one file, and Python"
if [ ! -f "$out/model.safetensors" ]; then
    "$python" -m dig export "$run" --out "$out/model.safetensors"
fi
"$python" - "$out/model.safetensors" <<'PYTHON'
import sys

import dig

model = dig.load(sys.argv[1])
drawn = dig.sample(model, classes=["red", "green"], samples=2, steps=5, seed=0)
print("from Python:", tuple(drawn.tensor.shape), drawn.classes, "of", model.trained.class_names)
PYTHON

say "Take a DiT to diffusers"
if [ ! -d "$out/diffusers" ]; then
    "${train[@]}" --model "$peer" --out "$out/peer" --steps $((steps / 2))
    "$python" -m dig export "$out/peer" --out "$out/diffusers" --format diffusers --weights raw
fi
"$python" - "$out" <<'PYTHON'
import sys

import torch
from diffusers import DiTTransformer2DModel

import dig

theirs = DiTTransformer2DModel.from_pretrained(f"{sys.argv[1]}/diffusers/transformer")
dig.match_frequencies(theirs)
ours = dig.load(f"{sys.argv[1]}/diffusers", device="cpu")
x, t, y = torch.randn(2, ours.in_channels, *ours.input_size), torch.tensor([10, 900]), torch.tensor([0, 1])
with torch.no_grad():
    apart = (theirs(x, timestep=t, class_labels=y).sample - ours(x, t, y)).abs().max()
print(f"diffusers' output and ours are at most {apart:.1e} apart")
PYTHON

say "Measure again, and compare"
"$python" -m bench run --models DiG,DiT --resolutions "$resolution" --modes forward --launches "$launches" \
    --out "$out/tuesday.jsonl" --resume
status=0
"$python" -m bench compare "$out/monday.jsonl" "$out/tuesday.jsonl" || status=$?
echo "compare ended with status $status"

say "Done: $out/report, $out/grid.png, $out/samples, $out/quality.jsonl"

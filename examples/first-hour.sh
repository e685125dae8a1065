#!/usr/bin/env bash
# A first hour: look at the models, measure two, train one on pictures in class folders, stop it and go on, sample,
# measure the samples, fine-tune on other classes, take the weights to diffusers and to Python, and compare two
# measurements.
#
#   bash examples/first-hour.sh OUT          OUT gets everything; made if it is not there
#
# Without a GPU it takes some minutes with the small values that are the defaults; on one, set MODEL=DiG-S/2,
# PEER=DiT-S/2, SIZE=64, STEPS=20000, PICTURES=/my/class/folders and OTHERS=/my/other/ones. INSTALL=0 leaves out the
# installation, LAUNCHES are the process launches of a measurement. Run again, it makes what is missing.
set -euo pipefail
out=$1
python=${PYTHON:-python}
model=${MODEL:-DiG-S/8} peer=${PEER:-DiT-S/8} size=${SIZE:-32} steps=${STEPS:-60} batch=${BATCH:-16}
samples=${SAMPLES:-48} launches=${LAUNCHES:-5} resolution=${RESOLUTION:-64}
pictures=${PICTURES:-$out/pictures} others=${OTHERS:-$out/others}

say() { printf '\n== %s\n' "$*"; }

mkdir -p "$out"
if [ "${INSTALL:-1}" = 1 ]; then
    say "Install: torch first, then this project with what training needs"
    "$python" -m pip install torch
    "$python" -m pip install -e '.[train]'
fi

say "Which models there are"
"$python" -m bench list "${model%/*}" "${peer%/*}"

say "How fast two of them are here"
"$python" -m bench run --models DiG,DiT --resolutions "$resolution" --modes forward --launches "$launches" \
    --out "$out/monday.jsonl" --resume
"$python" -m reports "$out/monday.jsonl" --out "$out/report"

if [ ! -d "$pictures" ] || [ ! -d "$others" ]; then
    say "Pictures to train on, of three colours, a folder each; and others, of two, for the fine-tuning"
    "$python" - "$pictures" "$others" "$size" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

random, side = np.random.default_rng(0), int(sys.argv[3])
colours = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
for folder, names in ((sys.argv[1], ("red", "green", "blue")), (sys.argv[2], ("red", "yellow"))):
    for name in names:
        if Path(folder, name).exists():
            continue
        Path(folder, name).mkdir(parents=True)
        for number in range(64):
            pixels = random.integers(0, 60, size=(side, side, 3), dtype=np.uint8)
            pixels[side // 4 : -side // 4, side // 4 : -side // 4] += 180 * np.array(colours[name], dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder, name, f"{number}.png"))
PYTHON
fi

train=("$python" -m dig train --image-size "$size" --batch "$batch" --lr 1e-3 --ema 0.99)
run=$out/run
is_done() { [ -f "$(printf '%s/checkpoints/step-%08d.json' "$1" "$2")" ]; }
if ! is_done "$run" "$steps"; then
    if [ ! -d "$run/checkpoints" ]; then
        say "Train, and stop in the middle as Ctrl-C does"
        "${train[@]}" --data "$pictures" --model "$model" --out "$run" --steps "$steps" --save-every $((steps / 2)) \
            --log-every $((steps / 4)) &
        process=$!
        until ls "$run"/checkpoints/step-*.json > /dev/null 2>&1 || ! kill -0 "$process" 2> /dev/null; do
            sleep 0.2
        done
        # To a process in the background a shell lets no SIGINT through; SIGTERM saves and ends the run as well.
        kill -TERM "$process" 2> /dev/null || true
        wait "$process" || echo "it ended with status $?, as a run does that was stopped"
    fi
    say "Go on: no option is needed again"
    "$python" -m dig train --resume "$run"
fi

say "Sample: a folder of PNG files, and a grid with labels of them"
"$python" -m dig sample --checkpoint "$run" --steps 10 --classes red,blue --samples 8 --images "$out/samples" \
    --grid "$out/grid.png" --labels --scale 3

say "How good: from the run to its distance from the data"
if [ ! -f "$out/classifier.safetensors" ]; then
    "$python" -m dig classifier --data "$pictures" --image-size "$size" --out "$out/classifier.safetensors" --epochs 2
fi
"$python" -m dig evaluate --checkpoint "$run" --samples "$samples" --steps 10 --data "$pictures" --image-size "$size" \
    --classifier "$out/classifier.safetensors" --append "$out/quality.jsonl"

tuned=$out/tuned
if ! is_done "$tuned" $((steps / 4)); then
    say "Fine-tune: the same weights, other pictures, two classes instead of three"
    "${train[@]}" --init "$run" --data "$others" --out "$tuned" --steps $((steps / 4)) --freeze 'blocks.0.*'
fi

say "Take the weights along: one file, and Python"
if [ ! -f "$out/model.safetensors" ]; then
    "$python" -m dig export "$tuned" --out "$out/model.safetensors"
fi
"$python" - "$out/model.safetensors" <<'PYTHON'
import sys

import dig

model = dig.load(sys.argv[1])
drawn = dig.sample(model, classes=["red", "yellow"], samples=2, steps=5, seed=0)
print("from Python: samples of", ", ".join(drawn.classes), tuple(drawn.tensor.shape))
print("classes of the model:", ", ".join(model.trained.class_names))
PYTHON

say "Take a DiT to diffusers"
if [ ! -d "$out/diffusers" ]; then
    "${train[@]}" --data "$pictures" --model "$peer" --out "$out/peer" --steps $((steps / 4))
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
echo "compare ended with status $status: 0 is no slower, 1 slower, 3 not sure"

say "Done: $out/report, $out/grid.png, $out/samples, $out/quality.jsonl"

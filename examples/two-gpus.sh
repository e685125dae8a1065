#!/usr/bin/env bash
# How much faster do several GPUs train than one? Takes the same model and the same number of images a GPU: one process,
# then GPUS of them by DistributedDataParallel and by FSDP, as `python -m dig train` runs them by default. Prints images
# a second of each, from the run's own log, and their ratio to one GPU's times GPUS.
#
#   bash examples/two-gpus.sh DATA OUT        DATA is what train --data takes; OUT gets a folder a run
#
# MODEL, STEPS, BATCH (of a GPU), GPUS, DEVICE, LOG_EVERY, PYTHON and TORCHRUN may be set.
set -euo pipefail
data=$1 out=$2
python=${PYTHON:-python} torchrun=${TORCHRUN:-torchrun}
model=${MODEL:-DiG-S/2} steps=${STEPS:-400} batch=${BATCH:-64} gpus=${GPUS:-2} device=${DEVICE:-auto}

train() { # name, images a step, launcher and module; then options
    local name=$1 images=$2 launch=$3
    shift 3
    # The two dashes end the launcher's own options.
    $launch dig train --model "$model" --data "$data" --out "$out/$name" --steps "$steps" --batch "$images" \
        --device "$device" --log-every "${LOG_EVERY:-50}" --save-every "$steps" --keep 1 --grid-every 0 "$@"
}

train one "$batch" "$python -m"
for kind in ddp fsdp; do
    train "$kind" $((batch * gpus)) "$torchrun --nproc-per-node $gpus -m --" --parallel "$kind"
done
"$python" - "$out" "$gpus" <<'PYTHON'
import json
import statistics
import sys
from pathlib import Path

out, gpus = Path(sys.argv[1]), int(sys.argv[2])
alone = None
for name in ("one", "ddp", "fsdp"):
    lines = [json.loads(line) for line in (out / name / "train.jsonl").read_text().splitlines()]
    # The first line holds the clock's and the caches' warm-up.
    rate = statistics.median(line["images_per_second"] for line in lines[1:])
    alone = alone or rate
    share = f", {rate / (gpus * alone):.3f} of {gpus} times one" if name != "one" else ""
    print(f"{name}: {rate:.1f} images a second{share}")
PYTHON

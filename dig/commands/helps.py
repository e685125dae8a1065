"""Groups and examples of the commands of ``python -m dig``, for `dig.helping`."""

from __future__ import annotations

from dig.helping import Help

MACHINE = "Machine"
OUTPUT = "Output"
SAMPLES = "Samples"
PUBLISHED = "Model of a file that does not say it"

FIRST = (
    "python -m dig train --model DiG-S/2 --data images --image-size 64 --out run",
    "python -m dig sample --checkpoint run --grid samples.png",
    "python -m dig COMMAND --help",
)
HELPS = {
    "train": Help(
        groups={
            "Run": "out resume config steps seed dry_run quiet",
            "Data": "data image_size channels mirror workers vae",
            "Model": "model init freeze lora lora_target checkpoint_blocks",
            "Optimisation": "batch accumulate lr schedule warmup clip weight_decay",
            "Loss and averages": "loss label_dropout ema ema_warmup",
            "Logging and saving": "log_every save_every keep grid_every grid_steps grid_cfg log",
            MACHINE: "device dtype execution deterministic parallel sending hang_timeout",
        },
        examples=(
            "python -m dig train --model DiG-S/2 --data images --image-size 64 --out run",
            "python -m dig train --init run --data others --out tuned --lr 1e-5",
        ),
    ),
    "sample": Help(
        groups={
            "Weights": "checkpoint weights adapter backend vae other_vae",
            OUTPUT: "images npz grid labels scale latents batch",
            SAMPLES: "samples classes seed first",
            "Sampler": "sampler steps eta cfg cfg_channels",
            MACHINE: "device dtype execution model_batch dry_run quiet",
            PUBLISHED: "model image_size num_classes",
        },
        examples=(
            "python -m dig sample --checkpoint run --grid samples.png --labels",
            "python -m dig sample --checkpoint run --samples 10000 --images samples",
        ),
    ),
    "export": Help(
        groups={
            "Weights": "checkpoint weights vae other_vae",
            OUTPUT: "out format",
            PUBLISHED: "model image_size num_classes",
        },
        examples=(
            "python -m dig export run --out model.safetensors",
            "python -m dig export run --out pipeline --format diffusers --vae VAE",
        ),
    ),
    "consolidate": Help(
        groups={"Checkpoint": "run out"},
        examples=(
            "python -m dig consolidate run",
            "python -m dig consolidate run --out checkpoint.safetensors",
        ),
    ),
    "evaluate": Help(
        groups={
            SAMPLES: "samples count",
            "Data": "data reference image_size channels",
            "Features": "classifier inception",
            "Samples that are made first": "checkpoint images classes sampler steps cfg cfg_channels seed weights vae",
            "Output and machine": "append device dry_run quiet",
        },
        examples=(
            "python -m dig evaluate --samples out.npz --data images --classifier C",
            "python -m dig evaluate --checkpoint run --samples 500 --data D --inception I",
        ),
    ),
    "classifier": Help(
        groups={
            "Data": "data test_data image_size channels workers",
            "Training": "epochs batch seed",
            "Output and machine": "out device quiet",
        },
        examples=(
            "python -m dig classifier --data images --image-size 64 --out c.safetensors",
            "python -m dig classifier --data fashion-mnist --out c.safetensors --epochs 1",
        ),
    ),
    "encode": Help(
        groups={
            "Images": "images image_size workers",
            "Latents": "out vae dtype seed shard_size",
            "Machine": "batch device rank world_size dry_run quiet",
        },
        examples=(
            "python -m dig encode images --out latents --vae stabilityai/sd-vae-ft-ema",
            "python -m dig encode images --out latents --vae VAE --image-size 512",
        ),
    ),
}

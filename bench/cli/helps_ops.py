"""Groups and examples of the commands of ``python -m bench ops``, for `dig.helping`."""

from __future__ import annotations

from dig.helping import Help

WHAT = "What is timed"
HOW = "How it is timed"
TILES = "Tile choices, with --sweep"
STEP = "The step"

FIRST = (
    "python -m bench ops registers --capabilities 9.0",
    "python -m bench ops gla",
    "python -m bench ops compare --op gla --base main",
)
HELPS = {
    "gla": Help(
        groups={
            WHAT: "tokens heads key_width value_width batch dtype operations implementations",
            HOW: "samples kernels json",
            TILES: "sweep chunks warps registers scan_warps scan_lanes scan_groups scan_steps "
            "short_warps short_units short_steps",
        },
        examples=("python -m bench ops gla", "python -m bench ops gla --tokens 4096 --implementations triton"),
    ),
    "srem": Help(
        groups={
            WHAT: "sides width batch dtype implementations",
            HOW: "samples kernels json",
            TILES: "sweep channels groups widths rows warps registers best",
        },
        examples=("python -m bench ops srem", "python -m bench ops srem --sides 64 --sweep --best 5"),
    ),
    "rowwise": Help(
        groups={
            WHAT: "widths tokens norm stream batch dtype operations implementations",
            HOW: "samples kernels json",
            TILES: "sweep rows parts warps programs",
        },
        examples=("python -m bench ops rowwise", "python -m bench ops rowwise --operations swiglu --widths 384"),
    ),
    "products": Help(
        groups={WHAT: "tokens passes implementations", HOW: "samples json", TILES: "sweep"},
        examples=("python -m bench ops products", "python -m bench ops products --tokens 12544 --passes up"),
    ),
    "registers": Help(
        groups={"What is compiled": "capabilities kernels quick"},
        examples=("python -m bench ops registers", "python -m bench ops registers --capabilities 9.0 --quick"),
    ),
    "compare": Help(
        groups={
            WHAT: "op base model resolution batch mode implementation dtype device",
            "Verdict": "launches least_effect noise seconds seed",
            "Limits and files": "time_limit out summary",
        },
        examples=(
            "python -m bench ops compare --op gla --base main",
            "python -m bench ops compare --resolution 64 --device cpu --mode forward",
        ),
    ),
    "prepare": Help(
        groups={STEP: "model resolution mode batch weights", "Ways": "programs fused", HOW: "rounds replays json"},
        examples=("python -m bench ops prepare", "python -m bench ops prepare --resolution 512 --programs 0,32"),
    ),
    "chain": Help(
        groups={STEP: "models resolutions modes batch weights", HOW: "rounds replays json"},
        examples=("python -m bench ops chain", "python -m bench ops chain --resolutions 256 --modes train"),
    ),
    "variants": Help(
        groups={"Ways": "settings", STEP: "model resolution mode batch weights", HOW: "rounds replays json"},
        examples=(
            "python -m bench ops variants --set dig.ops.tiles.sm90.PASSES.halved_tokens=0",
            "python -m bench ops variants --set MODULE.NAME=1 --set MODULE.NAME=2",
        ),
    ),
    "shapes": Help(
        groups={
            STEP: "models resolution modes weights",
            "Shapes": "batches grids patches limit",
            HOW: "rounds replays json",
        },
        examples=(
            "python -m bench ops shapes",
            "python -m bench ops shapes --models DiG-XL/2:triton --batches 1,4,5",
        ),
    ),
}

"""Groups and examples of the commands of ``python -m bench``, for `dig.helping`."""

from __future__ import annotations

from dig.helping import Help

WHAT = "What is measured"
HOW = "How it runs"
LIMITS = "Limits and files"
VERDICT = "Verdict"
GPUS = "Several GPUs"

FIRST = (
    "python -m bench list",
    "python -m bench run --models DiG,DiT --resolutions 64,128",
    "python -m reports out/results.jsonl --out out/report",
)
HELPS = {
    "run": Help(
        groups={
            WHAT: "suite models sizes patch resolutions modes batch",
            HOW: "executions compile_scope max_autotune dtype weights device launches",
            LIMITS: "out resume ahead prepare_limit time_limit dry_run quiet",
            GPUS: "gpus alone spread",
        },
        examples=(
            "python -m bench run --suite auto --resume",
            "python -m bench run --models DiG,DiT --resolutions 64,128 --out out/a.jsonl",
        ),
    ),
    "list": Help(
        groups={"Models": "names count"}, examples=("python -m bench list", "python -m bench list DiG DiT-XL")
    ),
    "sampling": Help(
        groups={
            WHAT: "models size patch resolutions batch repeats",
            "Sampler": "sampler steps cfg cfg_channels",
            HOW: "execution compile_scope dtype weights device",
            LIMITS: "out time_limit",
        },
        examples=(
            "python -m bench sampling --models DiG,DiT --resolutions 64 --steps 10",
            "python -m reports.sampling out/sampling.jsonl",
        ),
    ),
    "scaling": Help(
        groups={
            WHAT: "models size patch resolution batch",
            GPUS: "gpus processes parallel sending",
            HOW: "executions dtype device",
            LIMITS: "out resume prepare_limit time_limit",
        },
        examples=(
            "python -m bench scaling --gpus 0,1",
            "python -m bench scaling --models DiT --size S --device cpu",
        ),
    ),
    "compare": Help(
        groups={"Files": "base change out", VERDICT: "least_effect least_memory noise across_machines"},
        examples=(
            "python -m bench compare out/a.jsonl out/b.jsonl",
            "python -m bench compare out/a.jsonl out/b.jsonl --least-effect 0.05",
        ),
    ),
    "export": Help(
        groups={"Files": "results format out"},
        examples=(
            "python -m bench export out/a.jsonl --format csv",
            "python -m bench export out/a.jsonl --format parquet --out a.parquet",
        ),
    ),
    "regression": Help(
        groups={
            WHAT: "base suite case device against_itself self_test",
            VERDICT: "launches least_effect noise seconds seed best_of stored",
            LIMITS: "time_limit out summary",
        },
        examples=(
            "python -m bench regression --base main --suite auto",
            "python -m bench regression --base main --case DiG-S/2@128:forward",
        ),
    ),
    "kernels": Help(
        groups={
            WHAT: "model resolution mode batch",
            HOW: "execution compile_scope dtype weights device",
            "Output": "top in_order",
        },
        examples=(
            "python -m bench kernels --model DiG-S/2",
            "python -m bench kernels --model DiT-S/2 --resolution 256 --top 10",
        ),
    ),
    "profile": Help(
        groups={WHAT: "model resolution mode batch", HOW: "dtype weights device", "Output": "out rows"},
        examples=(
            "python -m bench profile --model DiG-S/2",
            "python -m bench profile --model DiT-S/2 --mode forward --out out/dit",
        ),
    ),
    "capacity": Help(
        groups={
            WHAT: "model mode resolution batch",
            HOW: "execution compile_scope dtype weights device",
            LIMITS: "limit most_batch most_resolution time_limit out",
        },
        examples=(
            "python -m bench capacity --model DiG-S/2 --limit 4",
            "python -m bench capacity --model DiT-XL/2 --mode forward --resolution 512",
        ),
    ),
    "first-step": Help(
        groups={WHAT: "model resolution mode batch", HOW: "dtype device"},
        examples=(
            "python -m bench first-step",
            "python -m bench first-step --model DiT-S/2 --resolution 256",
        ),
    ),
    "coverage": Help(
        groups={VERDICT: "trials launches"},
        examples=("python -m bench coverage", "python -m bench coverage --trials 200 --launches 5"),
    ),
}

"""``python -m dig``: the commands of `dig.cli`, with the models of `bench.models`.

This is the one place of `dig` that knows the folders above it. It imports them when a command asks for a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dig.registry import Registry

if TYPE_CHECKING:
    from dig.layers import Backbone


def _create(name: str, **arguments: Any) -> Backbone:
    from bench.models import create_model

    return create_model(name, **arguments)


def _parse(text: str, device: str) -> tuple[str, dict[str, str]]:
    from bench.cases import ModelChoice
    from bench.models import missing_packages, parse_name
    from dig.packages import MissingPackageError

    name, *words = text.strip().split(":")
    family, _, _ = parse_name(name)
    # Every option, so that one that was named and one that is the default are the same run.
    options = {option: values[0] for option, values in family.options.items()}
    options |= dict(ModelChoice.parse(":".join([family.name, *words]), device).options)
    value = options[family.implementation]
    if device == "cpu" and value in family.gpu_only:
        anywhere = [word for word in family.options[family.implementation] if word not in family.gpu_only]
        raise ValueError(
            f"{family.name} with {family.implementation}={value} needs an NVIDIA GPU; on a CPU: {', '.join(anywhere)}"
        )
    if message := missing_packages(family, options):
        raise MissingPackageError(message)
    return name, options


def _implementation(name: str) -> str:
    from bench.models import parse_name

    return parse_name(name)[0].implementation


def _variants() -> list[tuple[str, dict[str, str]]]:
    from bench.models import list_models, parse_name

    found: list[tuple[str, dict[str, str]]] = []
    for name in list_models():
        family = parse_name(name)[0]
        if family.name == "Flash-DiT":
            continue  # DiT's weights
        variants = family.options.get("variant")
        found += [(name, {"variant": variant}) for variant in variants] if variants else [(name, {})]
    return found


def _macs(model: Backbone) -> int:
    from bench.flops import forward_macs

    return forward_macs(model)


def _ceiling(device: str, dtype: str) -> float:
    from typing import cast

    from bench.jobs import CeilingJob
    from bench.worker import measure_ceiling

    return measure_ceiling(CeilingJob(device=cast(Any, device), dtype=cast(Any, dtype)))


def _environment() -> dict[str, Any]:
    from bench.environment import describe_environment

    return describe_environment()


REGISTRY = Registry(
    create=_create,
    parse=_parse,
    implementation=_implementation,
    variants=_variants,
    macs=_macs,
    ceiling=_ceiling,
    environment=_environment,
)


if __name__ == "__main__":
    from dig.cli import app

    app(prog_name="python -m dig", obj=REGISTRY)

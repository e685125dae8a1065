"""Rows of DiG and of attention, for tests of every family at its best."""

from __future__ import annotations

from dataclasses import replace

from tests.reports.conftest import build_row

BLOCK = {"execution": "compiled-graph", "scope": "block"}
MODEL = {"execution": "compiled-graph", "scope": "model"}


def dig(resolution=1024, ms=10.0, **changes):
    options = (("backend", changes.pop("backend", "triton")), ("variant", "release"))
    size = changes.pop("size", "S")
    return build_row(f"DiG-{size}/2", resolution, ms, options=options, **changes)


def flash(backend, resolution=1024, ms=12.0, **changes):
    size = changes.pop("size", "S")
    how = {} if "execution" in changes else BLOCK
    return build_row(f"Flash-DiT-{size}/2", resolution, ms, options=(("backend", backend),), **how, **changes)


def failed(row, status, message=""):
    return replace(row, status=status, message=message, samples_ms=(), memory=None)


def three_points():
    """Three points, of which DiG leads at one, is behind at one, and has no peer at the third."""
    return [
        dig(256, 2.0, gib=0.5),
        flash("sdpa-cudnn", 256, 1.9, gib=0.75),
        flash("flash-attn-4", 256, 1.8, gib=0.75),
        dig(256, 3.0, backend="fla", gib=1.0, **BLOCK),
        dig(1024, 10.0, gib=1.0),
        flash("sdpa-cudnn", 1024, 15.0, gib=0.5),
        failed(flash("flash-attn-4", 1024), "error", "parity: dQ is off | at head width 72"),
        failed(build_row("DiT-S/2", 1024, **BLOCK), "oom", "CUDA out of memory"),
        build_row("DiS-S/2", 1024, 30.0, gib=1.5, options=(("backend", "mamba-ssm"),), **BLOCK),
        dig(2048, 40.0),
        failed(flash("sdpa-cudnn", 2048), "timeout", "took too long"),
        failed(flash("flash-attn-4", 2048), "error", "parity: dQ is off | at head width 72"),
    ]

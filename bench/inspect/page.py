"""A profile as one HTML page, without scripts and nothing to fetch; every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment

from bench.inspect.profile import Entry, Profile
from bench.measure.profiler import short_name
from bench.messages import visible

TOP = 40
POINTS = 600
MIB = 2**20

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --bar: #3b7dd8; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; font-family: ui-monospace, monospace;
  font-size: .85em; min-width: 14rem; }
.wide { overflow-x: auto; }
td:not(:first-child) { white-space: nowrap; } meter { width: 5rem; } svg { width: 100%; height: auto; }
polyline { fill: none; stroke: var(--bar); stroke-width: 1.5; }
text { fill: currentColor; font-size: 12px; } small { opacity: .75; }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ environment }}</p>
<p>One step, launched eagerly under the profiler: {{ "%.2f"|format(profile.wall_us / 1000) }} ms on the host's clock
with the profiler's own cost, {{ "%.2f"|format(busy / 1000) }} ms of it {{ where }}. Ceilings measured beside it:
{{ rate(profile.flop_rate, "FLOP/s") }} in a matrix product, {{ rate(profile.byte_rate, "B/s") }} in a copy.</p>
{% for heading, entries, rest in sections %}
<h2>{{ heading }}</h2>
<div class="wide"><table>
<tr><th>name</th><th>calls</th><th>µs</th><th>share of the step</th><th>of the roofline</th></tr>
{% for e in entries %}<tr><td title="{{ e.name }}">{{ short(e.name) }}</td>
<td>{{ e.calls }}</td><td>{{ "%.1f"|format(e.us) }}</td>
<td><meter min="0" max="1" value="{{ e.us / busy }}"></meter> {{ "%.1f%%"|format(100 * e.us / busy) }}</td>
<td>{% if e.share is not none %}{{ "%.0f%%"|format(100 * e.share) }}{% endif %}</td></tr>
{% endfor %}</table></div>
{% if rest %}<p><small>and {{ rest }} more</small></p>{% endif %}
{% endfor %}
<p><small>Names are cut at their arguments; the full one shows where the pointer rests. Of the roofline: the least time
for the least work (each input read once, products counted in full) at the measured ceilings, over the time taken. Where
a part of the work is not known, the share is too low; where nothing is, or the data was in a cache and faster than the
ceilings, there is none.</small></p>
<h2>Memory over the step</h2>
{% if line %}<svg viewBox="0 0 1000 260" role="img" aria-label="Allocated bytes over time">
<polyline points="{{ line }}"/>
<text x="0" y="14">{{ "%.1f"|format(top / mib) }} MiB above the start</text>
<text x="1000" y="256" text-anchor="end">{{ "%.2f"|format(1000 * profile.memory[-1][0]) }} ms</text></svg>
{% else %}<p>The trace holds no allocations.</p>{% endif %}
</body></html>
"""


def thin(points: Sequence[tuple[float, int]], most: int = POINTS) -> list[tuple[float, int]]:
    """At most so many points, the highest of each stretch, so that no peak is lost."""
    size = -(-len(points) // most) or 1
    return [max(points[i : i + size], key=lambda p: p[1]) for i in range(0, len(points), size)]


def _line(points: Sequence[tuple[float, int]]) -> tuple[str, int]:
    if not points:
        return "", 0
    kept = thin(points)
    last = kept[-1][0] or 1.0
    low, top = min(0, *(p[1] for p in kept)), max(1, *(p[1] for p in kept))
    return " ".join(f"{1000 * t / last:.1f},{240 - 220 * (b - low) / (top - low):.1f}" for t, b in kept), top


def rate(per_second: float, unit: str) -> str:
    """Three digits with a prefix, ``97.5 GFLOP/s``: a CPU's rate is no ``0.0 TFLOP/s``."""
    power = min(max(int(math.log10(per_second) // 3), 0), 4) if per_second >= 1 else 0
    return f"{per_second / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}{unit}"


def page(profile: Profile, environment: dict[str, Any]) -> str:
    """The page's HTML."""
    machine = environment.get("gpu_name") if profile.case.device == "cuda" else environment.get("cpu")
    line, top = _line(profile.memory)
    sections: list[tuple[str, Sequence[Entry], int]] = [
        ("Time by operation", profile.operations[:TOP], len(profile.operations[TOP:]))
    ]
    if profile.case.device == "cuda":
        sections.append(("Time by kernel", profile.kernels[:TOP], len(profile.kernels[TOP:])))
    return (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            title=visible(profile.case.describe()),
            environment=visible(f"{machine}, torch {environment.get('torch')}, commit {environment.get('commit')}"),
            profile=profile,
            busy=sum(e.us for e in profile.kernels) or 1.0,
            where="on the GPU" if profile.case.device == "cuda" else "in operators",
            sections=sections,
            line=line,
            top=top,
            mib=MIB,
            short=lambda name: visible(short_name(name)),
            rate=rate,
        )
    )

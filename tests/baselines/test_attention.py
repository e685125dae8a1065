"""Attentions by name: the packages they need, and what is said where another package lies in one's place."""

from __future__ import annotations

import base64
import hashlib
import importlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from baselines.attention import PADDED_WIDTH, attend, check_is_flash_attention_4, require_backend
from dig.packages import MissingPackageError, is_installed
from dig.registry import find_family


def records(content: bytes) -> Callable[[str], list[object]]:
    """What importlib.metadata would say of a package with this interface.py."""
    value = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()

    class File(str):
        hash = SimpleNamespace(mode="sha256", value=value)

    return lambda name: [File("flash_attn/cute/interface.py")]


def test_the_file_that_was_installed_is_flash_attention_4s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interface = tmp_path / "interface.py"
    interface.write_bytes(b"right")
    monkeypatch.setattr(metadata, "files", records(b"right"))
    check_is_flash_attention_4(interface)
    interface.write_bytes(b"an older one, of flash-attn")
    with pytest.raises(MissingPackageError, match=r"lies over it; repair it with: pip install --force-reinstall"):
        check_is_flash_attention_4(interface)
    with pytest.raises(MissingPackageError, match="flash_attn/cute is not where Python finds flash_attn"):
        check_is_flash_attention_4(None)


@pytest.mark.parametrize("backend", ["flash-attn", "flash-attn-3", "flash-attn-4", "flash-attn-4-padded"])
def test_what_is_missing_is_named_with_what_to_do(backend: str) -> None:
    family = find_family("Flash-DiT")
    if family.missing_packages({"backend": backend}) is None:
        pytest.skip(f"{backend} is installed: nothing is missing that could be named")
    with pytest.raises(MissingPackageError, match=r"needs the package flash-attn.*install"):
        require_backend(backend)


def test_a_folder_with_nothing_but_flash_attention_4_in_it_is_not_flash_attention_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_installed("flash_attn"):
        pytest.skip("FlashAttention 2 is installed: flash_attn is not FlashAttention 4's folder alone")
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert not is_installed("flash_attn")
    assert not is_installed("flash_attn.cute")
    monkeypatch.setattr(metadata, "version", lambda name: {"flash-attn-4": "4.0.0"}[name])
    assert is_installed("flash_attn.cute")


def test_padded_heads_attend_as_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> list[torch.Tensor]:
        seen.append(q.shape[-1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return [((q * scale) @ k.transpose(-2, -1)).softmax(-1).matmul(v).transpose(1, 2)]

    monkeypatch.setattr(torch.ops.baselines, "flash_attention_4", exact)
    q, k, v = torch.randn(3, 2, 10, 2, 72).unbind(0)
    expected = attend("materialized", q, k, v)
    torch.testing.assert_close(attend("flash-attn-4-padded", q, k, v), expected)
    torch.testing.assert_close(attend("flash-attn-4", q, k, v), expected)
    assert seen == [PADDED_WIDTH, 72]


def test_flash_attention_4s_operations_have_shapes_without_a_gpu() -> None:
    with torch.device("meta"):
        q = torch.empty(2, 10, 3, 64, dtype=torch.bfloat16, requires_grad=True)
        output, lse = torch.ops.baselines.flash_attention_4(q, q, q, 0.125)
    assert output.shape == q.shape
    assert (lse.shape, lse.dtype) == ((2, 3, 10), torch.float32)
    (gradient,) = torch.autograd.grad(output, q, torch.empty_like(output))
    assert gradient.shape == q.shape

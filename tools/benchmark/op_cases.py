"""What tools/benchmark/ops.py measures: operators, shapes, peers, and the elements that have to move."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megamm.layers.media_segments import MediaSegments, attend_to_segments
from megamm.ops.cross_entropy import cross_entropy
from megamm.ops.gated_residual import gated_residual
from megamm.ops.layer_norm import layer_norm
from megamm.ops.linear_cross_entropy import linear_cross_entropy
from megamm.ops.rms_norm import rms_norm, rms_norm_add
from megamm.ops.rope import rope_qkv, rope_table
from megamm.ops.swiglu import swiglu

Side = Callable[..., Any]
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One operator at one shape.

    Attributes:
        make: tensors of a dtype on a device; those that require gradients get them.
        peers: name -> (function of these tensors) or None where the peer is not there.
        forward_elements, backward_elements: numbers read and written at least.
        no_compile: torch.compile is left out, and why.
        equal_gradients: what comes in from behind is 1 everywhere, as from a sum, instead of random numbers.
    """

    name: str
    shape: str
    make: Callable[[torch.dtype, str], list[Tensor]]
    peers: Callable[[torch.dtype, str], dict[str, Side | None]]
    forward_elements: int
    backward_elements: int
    no_compile: str = ""
    equal_gradients: bool = False

    def inputs(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        torch.manual_seed(0)
        return self.make(dtype, device)

    def sides(self, dtype: torch.dtype, device: str) -> dict[str, Side]:
        return {name: side for name, side in self.peers(dtype, device).items() if side is not None}

    def call(self, side: Side, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        out = side(*inputs)
        return out if isinstance(out, tuple) else (out,)

    def gradients(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Incoming gradients, the same for all sides."""
        if self._key not in _GRADIENTS:
            _GRADIENTS.clear()
            generator = torch.Generator(outputs[0].device).manual_seed(1)
            _GRADIENTS[self._key] = [
                torch.ones_like(o)
                if self.equal_gradients
                else torch.randn(o.shape, dtype=o.dtype, device=o.device, generator=generator)
                for o in outputs
            ]
        return [g.to(o.dtype) for g, o in zip(_GRADIENTS[self._key], outputs, strict=True)]

    @property
    def _key(self) -> tuple[str, str]:
        return self.name, self.shape


_GRADIENTS: dict[tuple[str, str], list[Tensor]] = {}


def CASES(device: str, tokens: int | None = None) -> list[Case]:
    """All cases, at sizes that fit the device: several times what its caches hold, unless `tokens` is
    given."""
    tokens = tokens or (4096 if device == "cpu" else 16384)
    vocab = 32000
    return [
        _rms_norm(tokens, 4096),
        _rms_norm_add(tokens, 4096),
        _layer_norm(tokens, 1024),
        _swiglu(tokens, 11008 if device != "cpu" else 4096),
        _rope(tokens, 32, 32, 128),
        _rope(tokens, 32, 8, 128),
        _gated_residual(tokens, 4096),
        _media_attention(2048, 1, 64, 16, 64),
        _media_attention(2048, 8, 64, 16, 64),
        _cross_entropy(tokens // 4, vocab),
        _linear_cross_entropy(tokens // 4, 1024 if device == "cpu" else 4096, vocab),
    ]


def _randn(*shape: int, dtype: torch.dtype, device: str, grad: bool = True, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_(grad)


def _optional(module: str, name: str, device: str = "cuda") -> Any:
    """A peer's class or function; None where it is not installed, does not load, or is for GPUs only."""
    try:
        return getattr(importlib.import_module(module), name) if device != "cpu" else None
    except Exception:
        return None


def _labels(rows: int, vocab: int, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(2)
    return torch.randint(vocab, (rows,), device=device, generator=generator)


# --- norms ----------------------------------------------------------------------------------------------


def _rms_norm(rows: int, width: int) -> Case:
    def make(dtype: torch.dtype, device: str) -> list[Tensor]:
        return [_randn(rows, width, dtype=dtype, device=device), _randn(width, dtype=dtype, device=device)]

    def peers(dtype: torch.dtype, device: str) -> dict[str, Side | None]:
        liger = _optional("liger_kernel.ops.rms_norm", "LigerRMSNormFunction", device)
        return {
            "megamm": lambda x, w: rms_norm(x, w, EPS),
            "eager": _plain_rms_norm,
            "torch fused": lambda x, w: F.rms_norm(x, (width,), w, EPS),
            "te": _te_norm("RMSNorm", width, dtype) if device != "cpu" else None,
            "liger": (lambda x, w: liger.apply(x, w, EPS)) if liger else None,
        }

    return Case("rms_norm", f"{rows}x{width}", make, peers, 2 * rows * width, 3 * rows * width)


def _plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As Hugging Face's LLaMA and megatron's own norm have it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return wide.to(x.dtype) * weight


def _te_norm(name: str, width: int, dtype: torch.dtype) -> Side | None:
    cls = _optional("transformer_engine.pytorch", name)
    if cls is None:
        return None
    module = cls(width, eps=EPS, params_dtype=dtype, device="cuda")

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(("weight", "bias"), parameters, strict=False))
        return torch.func.functional_call(module, named, (x,))

    return run


def _rms_norm_add(rows: int, width: int) -> Case:
    def make(dtype: torch.dtype, device: str) -> list[Tensor]:
        sides = [_randn(rows, width, dtype=dtype, device=device) for _ in range(2)]
        return [*sides, _randn(width, dtype=dtype, device=device)]

    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return _plain_rms_norm(total, weight), total

    def fused_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (width,), weight, EPS), total

    def peers(dtype: torch.dtype, device: str) -> dict[str, Side | None]:
        return {
            "megamm": lambda x, r, w: rms_norm_add(x, r, w, EPS),
            "eager": eager,
            "torch fused": fused_norm,
        }

    return Case("rms_norm_add", f"{rows}x{width}", make, peers, 4 * rows * width, 4 * rows * width)


def _layer_norm(rows: int, width: int) -> Case:
    def make(dtype: torch.dtype, device: str) -> list[Tensor]:
        parameters = [_randn(width, dtype=dtype, device=device) for _ in range(2)]
        return [_randn(rows, width, dtype=dtype, device=device), *parameters]

    def peers(dtype: torch.dtype, device: str) -> dict[str, Side | None]:
        return {
            "megamm": lambda x, w, b: layer_norm(x, w, b, EPS),
            "eager": lambda x, w, b: F.layer_norm(x, (width,), w, b, EPS),
            "te": _te_norm("LayerNorm", width, dtype) if device != "cpu" else None,
        }

    return Case("layer_norm", f"{rows}x{width}", make, peers, 2 * rows * width, 3 * rows * width)


# --- elementwise ----------------------------------------------------------------------------------------


def _swiglu(rows: int, width: int) -> Case:
    def make(dtype: torch.dtype, device: str) -> list[Tensor]:
        return [_randn(rows, 2 * width, dtype=dtype, device=device)]

    def eager(x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value

    def peers(dtype: torch.dtype, device: str) -> dict[str, Side | None]:
        mcore = _optional("megatron.core.fusions.fused_bias_swiglu", "bias_swiglu_impl")  # on CPUs too
        liger = _optional("liger_kernel.ops.swiglu", "LigerSiLUMulFunction", device)

        def of_two(x: Tensor) -> Tensor:
            out: Tensor = liger.apply(*(part.contiguous() for part in x.chunk(2, dim=-1)))
            return out

        return {
            "megamm": swiglu,
            "eager": eager,
            "mcore": (lambda x: mcore(x, None)) if mcore else None,
            "liger": of_two if liger else None,
        }

    return Case("swiglu", f"{rows}x{width}", make, peers, 3 * rows * width, 5 * rows * width)


def _rope(length: int, heads: int, groups: int, head_dim: int) -> Case:
    per_group = (heads // groups + 2) * head_dim

    def angles(device: str) -> Tensor:
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
        return torch.arange(length, device=device)[:, None] * frequencies

    def make(dtype: torch.dtype, device: str) -> list[Tensor]:
        return [_randn(length, 1, groups, per_group, dtype=dtype, device=device)]

    def split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.split([per_group - 2 * head_dim, head_dim, head_dim], dim=-1)
        return q.reshape(length, 1, heads, head_dim), k, v

    def peers(dtype: torch.dtype, device: str) -> dict[str, Side | None]:
        table = rope_table(angles(device))
        both = torch.cat([angles(device)] * 2, dim=-1)[:, None, None]
        cosine, sine = both.cos().to(dtype), both.sin().to(dtype)

        def rotated(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cosine + torch.cat([-second, first], dim=-1) * sine

        def eager(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = split(qkv)
            return rotated(q), rotated(k), v

        return {"megamm": lambda qkv: rope_qkv(qkv, head_dim, table), "eager": eager}

    moved = 2 * length * (heads + groups) * head_dim
    return Case("rope", f"{length}x{heads}:{groups}x{head_dim}", make, peers, moved, moved)


def _gated_residual(rows: int, width: int) -> Case:
    def make(dtype: torch.dtype, device: str) -> list[Tensor]:
        sides = [_randn(rows, width, dtype=dtype, device=device) for _ in range(2)]
        return [*sides, _randn(1, dtype=dtype, device=device, scale=0.1)]

    def peers(dtype: torch.dtype, device: str) -> dict[str, Side | None]:
        return {
            "megamm": gated_residual,
            "eager": lambda x, y, gate: x + gate.tanh() * y,
        }

    return Case("gated_residual", f"{rows}x{width}", make, peers, 3 * rows * width, 3 * rows * width)


# --- losses ---------------------------------------------------------------------------------------------


def _cross_entropy(rows: int, vocab: int) -> Case:
    def make(dtype: torch.dtype, device: str) -> list[Tensor]:
        return [_randn(rows, vocab, dtype=dtype, device=device)]

    def peers(dtype: torch.dtype, device: str) -> dict[str, Side | None]:
        labels = _labels(rows, vocab, device)
        liger = _optional("liger_kernel.transformers.functional", "liger_cross_entropy", device)
        return {
            "megamm": lambda x: cross_entropy(x, labels, overwrite_logits=False),
            "eager": lambda x: F.cross_entropy(x.float(), labels, reduction="none"),
            "liger": (lambda x: liger(x.clone(), labels, reduction="none")) if liger else None,
        }

    return Case("cross_entropy", f"{rows}x{vocab}", make, peers, rows * vocab, 2 * rows * vocab)


def _linear_cross_entropy(rows: int, width: int, vocab: int) -> Case:
    def make(dtype: torch.dtype, device: str) -> list[Tensor]:
        weight = _randn(vocab, width, dtype=dtype, device=device, scale=width**-0.5)
        return [_randn(rows, width, dtype=dtype, device=device), weight]

    def peers(dtype: torch.dtype, device: str) -> dict[str, Side | None]:
        labels = _labels(rows, vocab, device)

        def eager(hidden: Tensor, weight: Tensor) -> Tensor:
            return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")

        return {"megamm": lambda hidden, weight: linear_cross_entropy(hidden, weight, labels), "eager": eager}

    name, moved = f"{rows}x{width}x{vocab}", rows * vocab
    return Case("linear_cross_entropy", name, make, peers, moved, 2 * moved, "matrix products", True)


# --- attention to media -----------------------------------------------------------------------------------


def _media_attention(length: int, images: int, latents: int, heads: int, head_dim: int) -> Case:
    """A position attends to the latents of one of the images."""

    def make(dtype: torch.dtype, device: str) -> list[Tensor]:
        query = _randn(length, 1, heads, head_dim, dtype=dtype, device=device)
        return [
            query,
            *(_randn(images * latents, 1, heads, head_dim, dtype=dtype, device=device) for _ in "kv"),
        ]

    def peers(dtype: torch.dtype, device: str) -> dict[str, Side | None]:
        image = torch.arange(length, device=device)[None] * (images + 1) // length  # the first see none
        segments = MediaSegments.of(image, images, latents)
        number = torch.arange(1, images + 1, device=device).repeat_interleave(latents)
        mask = image[:, None, :, None] == number
        sees = mask.any(dim=-1, keepdim=True)

        def eager(*qkv: Tensor) -> Tensor:
            parts = (x.permute(1, 2, 0, 3) for x in qkv)
            out = F.scaled_dot_product_attention(*parts, attn_mask=mask | ~sees)
            return (out * sees).permute(2, 0, 1, 3)

        return {"megamm": lambda q, k, v: attend_to_segments(q, k, v, segments), "eager": eager}

    size = heads * head_dim
    moved = 2 * (length + images * latents) * size
    return Case(
        f"media_attention, {images} images",
        f"{length}x{latents}x{heads}x{head_dim}",
        make,
        peers,
        moved,
        2 * moved,
    )

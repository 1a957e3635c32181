"""Adapters alone, as PEFT writes them (Hu et al. 2021; PeftModel.save_pretrained): adapter_config.json and
adapter_model.safetensors, to be loaded on top of the model that they adapt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from megamm.config import LoraConfig, ModelConfig
from megamm.convert.engine import read_json, write_json
from megamm.convert.family import Export, Family, Found, Reading, Target
from megamm.convert.fields import Fields
from megamm.convert.rules import Rename, Rule, Table, listed, repeat
from megamm.errors import InputError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": True}
_Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
# target -> (our linear, their linear)
_LINEARS: dict[_Target, tuple[str, str]] = {
    "q": ("self_attention.linear_qkv", "self_attn.q_proj"),
    "k": ("self_attention.linear_qkv", "self_attn.k_proj"),
    "v": ("self_attention.linear_qkv", "self_attn.v_proj"),
    "o": ("self_attention.linear_proj", "self_attn.o_proj"),
    "gate": ("mlp.linear_fc1", "mlp.gate_proj"),
    "up": ("mlp.linear_fc1", "mlp.up_proj"),
    "down": ("mlp.linear_fc2", "mlp.down_proj"),
}
_TARGETS = {linear.rpartition(".")[2]: target for target, (_, linear) in _LINEARS.items()}
_START = "base_model.model."
# Where the classes that megamm exports to have their decoder layers: names of modules, which are not always
# those of saved weights.
_DECODER = "model.layers.{n}."
_LLAVA = "model.language_model.layers.{n}."
_OLD_LLAVA = "language_model.model.layers.{n}."  # before transformers 4.52
_XCOMPOSER = "internlm_model.model.layers.{n}."
_OPEN_FLAMINGO = "lang_encoder.model.layers.{n}.decoder_layer."
_INFIMM = "model.lang_encoder.model.layers.{n}.decoder_layer."
_LAYERS = (_DECODER, _LLAVA, _OLD_LLAVA, _XCOMPOSER, _OPEN_FLAMINGO, _INFIMM)
# Of adapter_config.json: what is read, and what says nothing about the numbers that the adapters add.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "init_lora_weights"}
_WITHOUT_EFFECT = {
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
    *("exclude_modules", "megatron_core", "qalora_group_size", "eva_config", "layers_pattern"),
}
# Other ways to start change the weights beneath the adapters, and a saved adapter belongs to those.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def table(model: ModelConfig) -> Table:
    """The complete mapping of a model's adapters, under the names of the class that its rest is exported to.

    Raises:
        InputError: the model has no adapters.
    """
    if not model.lora.rank:
        raise InputError("model.lora.rank: is 0, so there are no adapters to export; choose another --family")
    return Table(rules(model, f"{_START}{_layers_of(model)}"))


def rules(model: ModelConfig, theirs: str) -> list[Rule]:
    """Rules for the adapters in decoder layers named `theirs` ("model.layers.{n}.")."""
    language, lora = model.language, model.lora
    width, ffn = language.hidden_size, language.ffn_hidden_size
    kv_width = (language.num_kv_heads or language.num_heads) * language.head_dim
    sizes = {"k": (kv_width, width), "v": (kv_width, width), "down": (width, ffn)}
    sizes |= {"gate": (ffn, width), "up": (ffn, width)}
    layer: list[Rule] = []
    for target in lora.targets if lora.rank else ():
        outputs, inputs = sizes.get(target, (width, width))
        linear, their_linear = _LINEARS[target]
        ours = f"language.decoder.layers.{{n}}.{linear}.lora.{target}"
        layer.append(Rename(f"{ours}.a", f"{theirs}{their_linear}.lora_A.weight", (lora.rank, inputs)))
        layer.append(Rename(f"{ours}.b", f"{theirs}{their_linear}.lora_B.weight", (outputs, lora.rank)))
    return repeat(language.num_layers, layer)


def _layers_of(model: ModelConfig) -> str:
    """Where the decoder layers are in the class that a model is exported to."""
    if model.assembly == "merged":
        return _LLAVA if model.connector.kind == "mlp" else _XCOMPOSER
    if model.assembly == "cross_attention" and model.cross_attention.geometry == "flamingo":
        return _INFIMM if model.cross_attention.skip_text_only else _OPEN_FLAMINGO
    return _DECODER


# --- adapter_config.json ------------------------------------------------------------------------------


def to_peft(model: ModelConfig) -> dict[str, Any]:
    """The LoraConfig of a model's adapters."""
    lora = model.lora
    names: Any = [name for name, target in _TARGETS.items() if target in lora.targets]
    if model.assembly != "language":  # others have linears of these names besides those of the decoder
        layers = re.escape(_layers_of(model)).replace(r"\{n\}", r"\d+")
        names = rf"{layers}(self_attn|mlp)\.({'|'.join(names)})"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": names,
        "bias": "none",
        "fan_in_fan_out": False,
        "base_model_name_or_path": None,
        "inference_mode": True,
    }


def from_peft(config: dict[str, Any], keys: list[str], where: str) -> LoraConfig:
    """The adapters that a LoraConfig and the names of the tensors beside it describe.

    Raises:
        InputError: a value is missing, malformed, or nothing that megamm's adapters can express.
    """
    fields = Fields(config, DEFAULTS, where)
    fields.only("peft_type", "LORA")
    fields.only("bias", None, "none")
    fields.only("init_lora_weights", *_STARTS)
    # PEFT keeps getting variants, each with a key of its own
    for key in sorted(config.keys() - _READ - _WITHOUT_EFFECT):
        if config[key] not in (None, False, [], {}):
            raise InputError(
                f"{where}: {key} is {config[key]!r}, which plain adapters (LoRA) have not; merge these into"
                " their model with PEFT, and import that"
            )
    dropout = fields.get("lora_dropout")
    return LoraConfig(
        rank=fields.integer("r"),
        alpha=fields.number("lora_alpha"),
        dropout=fields.number("lora_dropout") if dropout else 0.0,
        targets=_targets(fields, keys),
    )


def _targets(fields: Fields, keys: list[str]) -> list[_Target]:
    """The targets that a list of modules names; a pattern says less than the tensors that it has led to."""
    modules = fields.get("target_modules")
    if isinstance(modules, list):
        names = {str(name).rpartition(".")[2] for name in modules}
    elif isinstance(modules, str):
        names = {key.split(".")[-3] for key in keys if key.count(".") > 2}
    else:
        raise InputError(
            f"{fields.where}: target_modules is {modules!r}, but must be a list of names or a pattern; save"
            " the adapters with PEFT again"
        )
    return [target for name, target in _TARGETS.items() if name in names]


# --- the family ---------------------------------------------------------------------------------------


def _directory(found: Found) -> Path:
    return found.path if found.path.is_dir() else found.path.parent


def _recognises(found: Found) -> bool:
    is_adapter = any(key.startswith(_START) for key in found.tensors.keys())  # noqa: SIM118 (no mapping)
    return is_adapter and (_directory(found) / CONFIG_FILE).is_file()


def _read(found: Found, wanted: ModelConfig | None) -> Reading:
    if wanted is None or not wanted.language.num_layers:
        raise InputError(
            f"{found.path}: adapters need the model that they adapt; name it by a further --from, or say with"
            " --recipe what it is"
        )
    where, keys = str(_directory(found) / CONFIG_FILE), found.tensors.keys()
    lora = from_peft(read_json(_directory(found) / CONFIG_FILE), keys, where)
    model = ModelConfig(language=wanted.language, lora=lora)
    layers = next((start for start in _LAYERS if any(_is_below(start, key) for key in keys)), _DECODER)
    mapping = Table(rules(model, f"{_START}{layers}"))
    # an encoder may have linears of the same names, PEFT save embeddings too, and a pattern leave out layers
    known = set(mapping.their_keys())
    for what, wrong in (("also has", set(keys) - known), ("lacks", known - set(keys))):
        if wrong:
            raise InputError(
                f"{found.path}: {what} {listed(wrong)}, but megamm's adapters are on the same linears of all"
                f" {wanted.language.num_layers} decoder layers and nowhere else; merge these into their model"
                " with PEFT, and import that"
            )
    return Reading(("lora",), model, mapping)


def _is_below(layers: str, key: str) -> bool:
    return key.startswith(f"{_START}{layers.partition('{n}')[0]}")


def _extras(target: Target) -> None:
    write_json(target.directory / CONFIG_FILE, to_peft(target.model))


FAMILY = Family(
    "peft", _recognises, _read, Export(("lora",), table, None, _extras, only_file=WEIGHTS_FILE), adapts=True
)

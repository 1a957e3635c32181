"""The typed form of a recipe: one YAML file per training stage.

Every key of a recipe is a field below; an unknown key is an error. `megamm.recipe` reads, overrides
and validates recipes; nothing else parses them.
"""

from __future__ import annotations

from megamm.config.data import DataConfig, ImageConfig, NamedSource, SourceConfig
from megamm.config.model import (
    UNCOMPARED_KEYS,
    ConnectorConfig,
    CrossAttentionConfig,
    LanguageConfig,
    LoraConfig,
    ModelConfig,
    Part,
    VisionConfig,
)
from megamm.config.parts import EMBEDDING, LATENTS, OUTPUT, POSITIONS, compared_values, part_of
from megamm.config.stage import (
    AnomaliesConfig,
    CheckpointConfig,
    Fp8Config,
    HardwareConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    PartOptimizerConfig,
    PreflightConfig,
    Recipe,
    RecomputeConfig,
    ResumeConfig,
    TemplateName,
    TrainingConfig,
    UnfreezeConfig,
    ValidationConfig,
    WatchdogConfig,
)

__all__ = [
    "EMBEDDING",
    "LATENTS",
    "OUTPUT",
    "POSITIONS",
    "UNCOMPARED_KEYS",
    "AnomaliesConfig",
    "CheckpointConfig",
    "ConnectorConfig",
    "CrossAttentionConfig",
    "DataConfig",
    "Fp8Config",
    "HardwareConfig",
    "ImageConfig",
    "LanguageConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "NamedSource",
    "OptimizerConfig",
    "ParallelConfig",
    "Part",
    "PartOptimizerConfig",
    "PreflightConfig",
    "Recipe",
    "RecomputeConfig",
    "ResumeConfig",
    "SourceConfig",
    "TemplateName",
    "TrainingConfig",
    "UnfreezeConfig",
    "ValidationConfig",
    "VisionConfig",
    "WatchdogConfig",
    "compared_values",
    "part_of",
]

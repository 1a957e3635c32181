"""The typed form of a recipe: one YAML file per training stage.

Every key of a recipe is a field below; an unknown key is an error. `megamm.recipe` reads, overrides
and validates recipes; nothing else parses them.
"""

from __future__ import annotations

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
from megamm.config.stage import (
    CheckpointConfig,
    DataConfig,
    ImageConfig,
    LogConfig,
    NamedSource,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    RecomputeConfig,
    ResumeConfig,
    SourceConfig,
    TemplateName,
    TrainingConfig,
    UnfreezeConfig,
)

__all__ = [
    "UNCOMPARED_KEYS",
    "CheckpointConfig",
    "ConnectorConfig",
    "CrossAttentionConfig",
    "DataConfig",
    "ImageConfig",
    "LanguageConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "NamedSource",
    "OptimizerConfig",
    "ParallelConfig",
    "Part",
    "Recipe",
    "RecomputeConfig",
    "ResumeConfig",
    "SourceConfig",
    "TemplateName",
    "TrainingConfig",
    "UnfreezeConfig",
    "VisionConfig",
]

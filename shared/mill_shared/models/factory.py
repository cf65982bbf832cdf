"""From config to model. An adapter, and torch with it, is imported only when it is built."""

from typing import assert_never

from mill_shared.models.config import (
    ChatConfig,
    HttpChatConfig,
    MaskGeneratorSettings,
    MasksConfig,
    OracleChatConfig,
    OracleMasksConfig,
    SamConfig,
    TransformersChatConfig,
)
from mill_shared.models.protocols import ChatModel, MaskGenerator


def build_mask_generator(config: MasksConfig, settings: MaskGeneratorSettings) -> MaskGenerator:
    """Return who makes the masks, loaded and ready.

    Raises:
        ConfigError: weights or truths are missing or unusable.
    """
    match config:
        case SamConfig():
            from mill_shared.models.sam import SamMaskGenerator

            return SamMaskGenerator(config, settings)
        case OracleMasksConfig():
            from mill_shared.models.oracle import OracleMasks

            return OracleMasks(config)
        case _:
            assert_never(config)


def build_chat_model(config: ChatConfig) -> ChatModel:
    """Return who answers the questions, loaded and ready.

    Raises:
        ConfigError: weights, keys or truths are missing or unusable.
    """
    match config:
        case TransformersChatConfig():
            from mill_shared.models.chat import TransformersChat

            return TransformersChat(config)
        case HttpChatConfig():
            from mill_shared.models.chat_http import HttpChat

            return HttpChat(config)
        case OracleChatConfig():
            from mill_shared.models.oracle import OracleChat

            return OracleChat(config)
        case _:
            assert_never(config)

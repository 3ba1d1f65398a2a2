"""timm's models, which are used where timm happens to be installed."""

from __future__ import annotations

from typing import Any

from torch import nn

from .commands import MissingPackage, SettingError


def create_model(name: str, **options: Any) -> nn.Module:
    """The model that timm makes of this name. Raises MissingPackage without timm, and SettingError where timm does not make it."""
    try:
        import timm
    except ImportError as error:
        raise MissingPackage(f"the model {name!r} is timm's: pip install timm") from error
    try:
        return timm.create_model(name, **options)
    except Exception as error:  # timm, and the hub that it loads weights from, raise what they happen to raise
        raise SettingError(f"timm's model {name!r}: {str(error).splitlines()[0]}") from error

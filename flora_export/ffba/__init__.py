"""FFBA, fused forward-backward adapters, as a PEFT method. Importing this package registers it with PEFT.

import flora_export.ffba
model = peft.get_peft_model(base, flora_export.ffba.FFBAConfig(r=16))
"""

from __future__ import annotations

from peft.utils import PeftType, register_peft_method


def _add_peft_type(name: str) -> None:
    """Add a member to PEFT's `PeftType`, which `register_peft_method` wants there and offers no way to add to."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


_add_peft_type("FFBA")

from flora_export.ffba.config import FFBAConfig  # noqa: E402  # needs the member above
from flora_export.ffba.layer import FFBALayer  # noqa: E402
from flora_export.ffba.model import FFBAModel  # noqa: E402

register_peft_method(name="ffba", config_cls=FFBAConfig, model_cls=FFBAModel)

__all__ = ["FFBAConfig", "FFBALayer", "FFBAModel"]

"""Keys of SimpleTuner's that have no knob here: what happens to each, and why. The tables are in foreign.json5."""

from pathlib import Path
from typing import ClassVar

import json5
from pydantic import BaseModel, ConfigDict, model_validator

# values, as text in small letters, by which a refused key asks for nothing: such a key is left out too
OFF = {"", "none", "false", "0", "0.0", "[]", "{}", "default", "standard", "diffusers", "unmodified", "flow_matching"}

TABLES = {  # of the file: name -> key -> what is said of it, which of renamed keys is our name
    name: {key: said for said, keys in table.items() for key in keys.split()}
    for name, table in json5.loads(Path(__file__).with_suffix(".json5").read_text(encoding="utf-8")).items()
}


class Strict(BaseModel):
    """A part of a config: frozen, and no key that neither it nor its tables know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    LEFT_OUT: ClassVar[dict[str, str]] = {}  # key without a meaning here that does no harm -> why
    REFUSED: ClassVar[dict[str, str]] = {}  # key that is not used here, unless it is off -> what to do instead
    SAME: ClassVar[dict[str, str]] = {}  # another name of a key -> ours

    _ignored: dict[str, str] = {}

    @property
    def ignored(self) -> dict[str, str]:  # the keys that were given and left out, and why
        return self._ignored

    @model_validator(mode="wrap")
    @classmethod
    def leave_out(cls, values, validate):
        if not isinstance(values, dict):
            return validate(values)
        values = {cls.SAME.get(key, key): value for key, value in values.items()}
        used = TABLES["LYCORIS_IGNORED"] if values.get("lora_type") == "lycoris" else ()
        ignored = {key: why for key, why in cls.LEFT_OUT.items() if key in values and key not in used}
        off = [key for key in cls.REFUSED if key in values and str(values[key]).lower() in OFF]
        ignored |= {key: f"it is off; {cls.REFUSED[key]}" for key in off}
        made = validate({key: value for key, value in values.items() if key not in ignored})
        made._ignored = ignored
        return made

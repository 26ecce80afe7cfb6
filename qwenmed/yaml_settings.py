"""The settings of a training put together from all that may say something.

Order of precedence: command line > YAML (`--config`) > what the model's folder recommends > default.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from qwenmed import files
from qwenmed.cli import field_type
from qwenmed.errors import UserError
from qwenmed.settings import LoraSettings, TrainSettings

# What a folder may recommend for training the model in it, per method.
RECOMMENDATION_FILE = "recommended_training.yaml"

Settings = TypeVar("Settings", bound=TrainSettings)


def load_settings(
    kind: type[Settings], given: Mapping[str, Any], config: Path | None, model_folder: Path | None
) -> Settings:
    """Merge the sources of settings by precedence.

    Args:
        kind: TrainSettings or LoraSettings.
        given: the options that stand on the command line.
        config: a YAML file, or None.
        model_folder: where a recommendation file may lie, or None.

    Raises:
        UserError: a YAML file is broken, names an unknown setting or gives a wrong type.
    """
    return kind(**{**recommended(kind, model_folder), **read_yaml(kind, config), **given})


def recommended(kind: type[TrainSettings], model_folder: Path | None) -> dict[str, Any]:
    """What the model's own folder recommends for this method; empty where it says nothing."""
    if model_folder is None or not (model_folder / RECOMMENDATION_FILE).is_file():
        return {}
    return read_yaml(kind, model_folder / RECOMMENDATION_FILE, section="lora" if kind is LoraSettings else "full")


def read_yaml(kind: type[TrainSettings], path: Path | None, section: str | None = None) -> dict[str, Any]:
    """The settings of a YAML file, checked by name and type.

    Raises:
        UserError: no such file, broken YAML, an unknown name or a wrong type.
    """
    if path is None:
        return {}
    import yaml

    try:
        document = yaml.safe_load(files.read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise UserError("YAML 格式错误", where, "请检查缩进和冒号") from None
    except (ValueError, RecursionError):  # impossible dates; nesting without end
        raise UserError("YAML 里有无法读取的值", path, "请检查日期和嵌套") from None
    if section is not None and isinstance(document, dict):
        document = document.get(section, {})
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UserError("YAML 的最外层应为“名称: 值”", path, "例如 learning_rate: 1.0e-5")
    known = {field.name for field in dataclasses.fields(kind)}
    values = {}
    for name, value in document.items():
        key = str(name).replace("-", "_")
        if key not in known:
            raise UserError(f"不认识的设置 {name}", path, "用 --help 查看全部设置")
        values[key] = _typed(kind, key, value, path)
    return values


def _typed(kind: type[TrainSettings], name: str, value: Any, path: Path) -> Any:
    plain_type, optional = field_type(kind, name)
    if value is None and optional:
        return None
    if plain_type is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-5 (no point) as text; that is no reason to turn a user away.
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    meta = next(field.metadata for field in dataclasses.fields(kind) if field.name == name)
    switch = "on" in (meta["choices"] or (meta["metavar"] or "").split("|"))
    if switch and isinstance(value, (bool, int)):  # YAML 1.1 reads on and off as true and false
        if not isinstance(value, bool):
            return str(value)
        return "on" if value else "off"
    if type(value) is plain_type:
        return value
    expected = {int: "整数", float: "数", bool: "true 或 false", str: "文本", dict: "“名称: 值”"}[plain_type]
    raise UserError(f"设置 {name} 的类型不对：应为{expected}，实际是 {value!r}", path, "请改正后重试")

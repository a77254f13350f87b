"""What a model's config.json says of its quantizer: compared with the import, and used where keys do not tell.

Only the models in config_models.py are known, each by the paths in its configuration. Nothing is searched for
elsewhere: a model that contains a codec has numbers of the same names for other parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vqserve.errors import ForeignCheckpointError
from vqserve_server.codebooks.kinds import KINDS
from vqserve_server.quantizers.declared import WEIGHT, Metric
from vqserve_tools.importing.config_models import INNER, ROWS, UNKNOWN, Row, is_size
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.files import has_one_model
from vqserve_tools.importing.files.json_files import read_json

_NAME = "config.json"
# The longest configurations have some 100 KiB: lists of labels.
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelConfig:
    """Facts in a config.json about a quantizer.

    Attributes:
        model: name of the model for messages.
        facts: value of each fact, with the keys of `Row.paths`.
        names: path of each fact in the file.
        metric: metric of the search, or None.
        place: last module of the quantizer's prefix, or "".
        unlike: kinds that the quantizer is not of, with the reason.
        is_known: whether the meaning of the facts is certain.
    """

    model: str
    facts: Mapping[str, Any]
    names: Mapping[str, str]
    metric: Metric | None
    place: str
    unlike: Mapping[str, str]
    is_known: bool

    def completed(self, options: Options, names: Iterable[str], note: Callable[[str], None]) -> Options:
        """Return the options with what they lack and the configuration has.

        Args:
            options: options of the user.
            names: names of the arrays in the checkpoint.
            note: takes what was used, in words.

        Raises:
            ForeignCheckpointError: the options contradict the configuration.
        """
        self._check_kind(options.kind)
        levels = self.facts.get("levels")
        if levels and options.kind and "levels" in KINDS[options.kind].arguments:
            self._check("levels", options.levels, f"--levels {_text(options.levels)}")
            if options.levels is None:
                options = replace(options, levels=levels)
                note(self._used("levels", f"--levels {_text(levels)}"))
        if self.metric and _is_searched(options.kind) and self._has_codes(names, options.prefix):
            if options.metric not in (None, self.metric):
                raise ForeignCheckpointError(f"{self._says('metric', self.metric)}, not --metric {options.metric}")
            if options.metric is None:
                options = replace(options, metric=self.metric)
                note(self._used("metric", f"--metric {self.metric}"))
        return options

    def check(self, place: str, kind: str, arguments: Mapping[str, object], note: Callable[[str], None]) -> None:
        """Check that a quantizer is as the configuration says, and note what was compared.

        Args:
            place: prefix of the quantizer in the checkpoint.
            kind: its kind.
            arguments: its constructor's arguments.
            note: takes what was compared, in words.

        Raises:
            ForeignCheckpointError: it is not; the error names both values.
        """
        self._check_kind(kind)
        if not self._is_at(place):
            return
        compared = []
        for fact, value in _sizes(arguments).items():
            if value is None or fact not in self.facts:
                continue
            values = value if isinstance(value, (list, tuple)) and fact != "levels" else [value]
            if all(_plain(item) == self.facts[fact] for item in values):
                compared.append(f"{self.names[fact]} {_text(self.facts[fact])}")
            elif self.is_known or (fact == "stages" and _plain(value) < self.facts[fact]):
                self._check(fact, value, f"{fact} {_text(value)}, as imported")
            else:
                note(f"{_NAME} ({self.model}) has {self.names[fact]} {_text(self.facts[fact])}, not {_text(value)}")
        metric = arguments.get("metric") or KINDS[kind].metric
        if self.metric and metric and metric != self.metric:
            raise ForeignCheckpointError(f"{self._says('metric', self.metric)}, and the import is searched by {metric}")
        if compared and self.is_known:
            note(f"{_NAME} ({self.model}) agrees: {', '.join(compared)}")

    def _has_codes(self, names: Iterable[str], prefix: str) -> bool:
        """Return whether the quantizer that the configuration describes is below a prefix."""
        ending = f".{self.place}.{WEIGHT}"
        return any(f".{name}".endswith(ending) for name in names if name.startswith(prefix))

    def _is_at(self, place: str) -> bool:
        last = place.removesuffix(".").rpartition(".")[2]
        return not self.place or not last or last == self.place

    def _check_kind(self, kind: str | None) -> None:
        if kind is not None and kind in self.unlike:
            raise ForeignCheckpointError(f"{_NAME} is of {self.model}, not of kind {kind}: {self.unlike[kind]}")

    def _check(self, fact: str, value: object, text: str) -> None:
        if value is not None and _plain(value) != self.facts[fact]:
            raise ForeignCheckpointError(
                f"{self._says(self.names[fact], _text(self.facts[fact]))}, not {text}; if {_NAME} is of another model, "
                "move it out of the folder"
            )

    def _says(self, name: str, value: str) -> str:
        return f"{_NAME} beside the weights ({self.model}) says {name} {value}"

    def _used(self, fact: str, option: str) -> str:
        where = ": ".join([self.model, *([self.names[fact]] if fact in self.names else [])])
        return f"{option}, as {_NAME} says ({where})"


def _sizes(arguments: Mapping[str, object]) -> dict[str, Any]:
    """Return what the arguments of a quantizer say, with the keys of `Row.paths`; None where they say nothing."""

    def first(*names: str) -> object:
        return next((arguments[name] for name in names if name in arguments), None)

    codes = first("n_e", "n_embed", "n_codes")
    return {
        "stages": first("num_quantizers") or (None if codes is None else 1),
        "codes": codes,
        "width": first("codebook_dim", "e_dim", "embedding_dim"),
        "levels": first("levels"),
    }


def _is_searched(kind: str | None) -> bool:
    return kind is None or KINDS[kind].metric is not None or "metric" in KINDS[kind].arguments


def config_of(source: Path) -> ModelConfig | None:
    """Return what the config.json beside the weights says; None if there is none, or it says nothing of a quantizer.

    A config.json belongs to a file if the folder has no other model's weights.

    Raises:
        ForeignCheckpointError: the config.json is too large, or no JSON object.
    """
    folder = source if source.is_dir() else source.parent
    path = folder / _NAME
    if not path.is_file() or not (source.is_dir() or has_one_model(source)):
        return None
    content = read_json(path, _MAX_BYTES)
    found = _known(content)
    if found is None:
        inner = [config for name in INNER if isinstance(config := content.get(name), dict)]
        known = [known for config in inner if (known := _known(config))]
        found = known[0] if len(known) == 1 else (UNKNOWN, content)
    row, config = found
    return _config(row, config)


def _known(content: Mapping[str, Any]) -> tuple[Row, Mapping[str, Any]] | None:
    architectures = content.get("architectures")
    said = [content.get("model_type"), content.get("_class_name")]
    said += architectures if isinstance(architectures, list) else []
    for row in ROWS:
        paths = [_at(content, path) for names in row.paths.values() for path in names]
        if any(name in said for name in row.names) or (not row.names and all(value is not None for value in paths)):
            return row, content
    return None


def _config(row: Row, content: Mapping[str, Any]) -> ModelConfig | None:
    facts: dict[str, Any] = {}
    names: dict[str, str] = {}
    for fact, paths in row.paths.items():
        for path in paths:
            value = _at(content, path)
            if value is not None and fact not in facts and _is_of_type(fact, value):
                facts[fact], names[fact] = tuple(value) if fact == "levels" else value, path
    stages = row.stages_of(content) if row.stages_of else None
    if stages:
        facts["stages"], names["stages"] = stages, "num_quantizers (by target_bandwidths)"
    metric = row.metric
    if "l2_norm" in facts:
        metric = "cosine" if facts["l2_norm"] else "l2"
        names["metric"] = f"{names['l2_norm']} {str(facts['l2_norm']).lower()}"
    if not facts and not row.unlike:
        return None
    return ModelConfig(row.model, facts, names, metric, row.place, row.unlike, row is not UNKNOWN)


def _at(content: Mapping[str, Any], path: str) -> Any:
    value: Any = content
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _is_of_type(fact: str, value: object) -> bool:
    # Other types, such as text of a template, are no facts.
    if fact == "l2_norm":
        return type(value) is bool
    if fact == "levels":
        return isinstance(value, list) and 0 < len(value) <= 64 and all(is_size(level) for level in value)
    return is_size(value)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) else value


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

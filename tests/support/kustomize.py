"""Builds a kustomization as kustomize does, for the features that examples/deploy uses; anything else is an error.

Stricter than kustomize: a patch must change something, an image must be used, and a file that no kustomization names is
found by `files_of`. Generated names have no hash at the end.
"""

from __future__ import annotations

import copy
from pathlib import Path

import yaml

_KEYS = {
    "Kustomization": {"apiVersion", "kind", "resources", "components", "patches", "images", "configMapGenerator"},
    "Component": {"apiVersion", "kind", "resources", "components", "patches"},
}
# Lists of objects that are merged by a key; all other lists are replaced, as Kubernetes defines for these types.
_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    ("containers", "ports"): "containerPort",
    ("spec", "ports"): "port",
}


class KustomizeError(Exception):
    """A kustomization is wrong; the text says where and why."""


def build(folder: Path) -> list[dict]:
    """Return the objects of a kustomization."""
    return _Kustomization(folder, "Kustomization").apply([])


def files_of(folder: Path) -> set[Path]:
    """Return all files that a kustomization reads, its own included."""
    kustomization = _Kustomization(folder, "Kustomization")
    kustomization.apply([])
    return kustomization.files


class _Kustomization:
    def __init__(self, folder: Path, kind: str) -> None:
        self._path = folder / "kustomization.yaml"
        self.files = {self._path.resolve()}
        self._content = yaml.safe_load(self._path.read_text())
        unknown = self._content.keys() - _KEYS[kind]
        if self._content.get("kind") != kind or unknown:
            raise KustomizeError(f"{self._path}: not a {kind}, or with unknown keys: {sorted(unknown)}")

    def apply(self, objects: list[dict]) -> list[dict]:
        """Return the objects so far with those of this kustomization, patched."""
        objects = list(objects)
        for name in self._content.get("resources", []):
            path = self._path.parent / name
            objects += self._nested(path, "Kustomization", []) if path.is_dir() else self._documents(path)
        for generator in self._content.get("configMapGenerator", []):
            objects.append(self._config_map(**generator))
        for name in self._content.get("components", []):
            objects = self._nested(self._path.parent / name, "Component", objects)
        for patch in self._content.get("patches", []):
            for document in self._documents(self._path.parent / patch["path"]):
                self._patch(objects, document)
        for image in self._content.get("images", []):
            self._rename(objects, **image)
        names = [(one["kind"], one["metadata"]["name"]) for one in objects]
        if len(names) != len(set(names)):
            raise KustomizeError(f"{self._path}: an object is there twice: {names}")
        return objects

    def _nested(self, folder: Path, kind: str, objects: list[dict]) -> list[dict]:
        inner = _Kustomization(folder, kind)
        built = inner.apply(objects)
        self.files |= inner.files
        return built

    def _documents(self, path: Path) -> list[dict]:
        self.files.add(path.resolve())
        return [document for document in yaml.safe_load_all(path.read_text()) if document]

    def _config_map(self, *, name: str, files: list[str]) -> dict:
        paths = [self._path.parent / file for file in files]
        self.files |= {path.resolve() for path in paths}
        data = {path.name: path.read_text() for path in paths}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}

    def _patch(self, objects: list[dict], patch: dict) -> None:
        wanted = patch["apiVersion"], patch["kind"], patch["metadata"]["name"]
        for i, one in enumerate(objects):
            if (one["apiVersion"], one["kind"], one["metadata"]["name"]) == wanted:
                patched = _merged(one, patch, ())
                if patched == one:
                    raise KustomizeError(f"{self._path}: a patch of {wanted} changes nothing")
                objects[i] = patched
                return
        raise KustomizeError(f"{self._path}: there is no {wanted} to patch")

    def _rename(self, objects: list[dict], *, name: str, newName: str, newTag: str) -> None:  # noqa: N803
        found = [container for one in objects for container in _containers(one) if container["image"] == name]
        for container in found:
            container["image"] = f"{newName}:{newTag}"
        if not found:
            raise KustomizeError(f"{self._path}: no container has the image {name}")


def _containers(one: dict) -> list[dict]:
    pod = one.get("spec", {}).get("template", {}).get("spec", {})
    return [*pod.get("initContainers", []), *pod.get("containers", [])]


def _merged(old: object, new: object, path: tuple[str, ...]) -> object:
    """Return a strategic merge: objects by their keys, null deletes, lists by a key of their objects or as a whole."""
    if isinstance(old, dict) and isinstance(new, dict):
        merged = copy.deepcopy(old)
        for name, value in new.items():
            if value is None:
                merged.pop(name, None)
            else:
                merged[name] = _merged(merged.get(name), value, (*path, name))
        return merged
    key = _MERGE_KEYS.get(path[-2:]) or _MERGE_KEYS.get(path[-1]) if path else None
    if isinstance(new, list) and key is not None:
        merged = copy.deepcopy(old or [])
        for value in new:
            same = [i for i, one in enumerate(merged) if one[key] == value[key]]
            if value.get("$patch") == "delete":
                if not same:
                    raise KustomizeError(f"{'.'.join(path)} has no {value[key]} to delete")
                del merged[same[0]]
            elif same:
                merged[same[0]] = _merged(merged[same[0]], value, path[-1:])
            else:
                merged.append(copy.deepcopy(value))
        return merged
    return _merged({}, new, path) if isinstance(new, dict) else copy.deepcopy(new)

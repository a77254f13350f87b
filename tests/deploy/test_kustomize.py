"""The tests' own reading of kustomizations notices what is wrong with one."""

from __future__ import annotations

import pytest
import yaml

from support import kustomize

CONFIG = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one"}, "data": {"key": "value"}}
HEAD = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": ["one.yaml"]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def build(folder, **more):
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(HEAD | more))
    return kustomize.build(folder)


def test_what_is_right(folder):
    assert build(folder) == [CONFIG]


def test_a_patch_adds_changes_and_deletes(folder):
    patch = CONFIG | {"data": {"key": None, "other": "more"}}
    (folder / "patch.yaml").write_text(yaml.safe_dump(patch))
    assert build(folder, patches=[{"path": "patch.yaml"}]) == [CONFIG | {"data": {"other": "more"}}]


def test_a_patch_without_a_target_or_an_effect(folder):
    (folder / "patch.yaml").write_text(yaml.safe_dump(CONFIG | {"metadata": {"name": "two"}}))
    with pytest.raises(kustomize.KustomizeError, match="to patch"):
        build(folder, patches=[{"path": "patch.yaml"}])
    (folder / "patch.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.raises(kustomize.KustomizeError, match="changes nothing"):
        build(folder, patches=[{"path": "patch.yaml"}])


def test_files_keys_and_images_that_are_not_there(folder):
    with pytest.raises(FileNotFoundError, match=r"two\.yaml"):
        build(folder, resources=["two.yaml"])
    with pytest.raises(kustomize.KustomizeError, match="namePrefix"):
        build(folder, namePrefix="my-")
    with pytest.raises(kustomize.KustomizeError, match="no container has the image"):
        build(folder, images=[{"name": "vqserve", "newName": "other", "newTag": "1"}])


def test_the_same_object_twice(folder):
    (folder / "again.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.raises(kustomize.KustomizeError, match="twice"):
        build(folder, resources=["one.yaml", "again.yaml"])

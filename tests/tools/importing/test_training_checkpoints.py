"""Checkpoints as trainers write them, with all they keep beside the weights: imported as the state dict alone is."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import pathlib
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vqserve_server.codebooks import codebook_digest, load_codebook
from vqserve_tools import cli
from vqserve_tools.importing.files import open_foreign


class Autoencoder(nn.Module):
    """A model around a quantizer, with what modules have that is not in their state dict."""

    def __init__(self, quantizer: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.quantize = quantizer if quantizer is not None else nn.Embedding(5, 4)
        self.decoder = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(2)])
        self.tied = self.decoder[0]
        self.scales = nn.ParameterDict({"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(3))})
        self.register_buffer("mean", torch.arange(3.0))
        self.register_buffer("cache", torch.arange(7.0), persistent=False)
        self.register_buffer("nothing", None)
        self.history = [torch.ones(2)]
        self.owner = self.encoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder[1](self.encoder(x) + self.mean.sum() + self.quantize.weight[0, 0])


# What trainers keep of their own; the classes stand for those of other packages, which are not needed to read them.
FAKES = """
import dataclasses, enum

class AttributeDict(dict):
    pass

class ListConfig:
    def __init__(self, content, parent=None):
        self.__dict__["_content"] = content
        self.__dict__["_parent"] = parent

class DictConfig(ListConfig):
    def __getstate__(self):
        return self.__dict__
    def __setstate__(self, state):
        raise RuntimeError("run")

class Checkpoint:
    def __reduce__(self):
        return (Checkpoint, (), {"monitor": "loss", "best": 0.5})

class Strategy(enum.Enum):
    EPOCH = "epoch"

@dataclasses.dataclass
class TrainingArguments:
    lr: float = 1e-3
    strategy: Strategy = Strategy.EPOCH

@dataclasses.dataclass(slots=True)
class Slots:
    tensor: object
    name: str = "slots"

class Scaler:
    def __init__(self, tensor):
        self.scale = tensor
"""


@pytest.fixture
def fakes() -> Iterator[types.ModuleType]:
    """A package that is there when a checkpoint is written, and gone when it is read."""
    module = types.ModuleType("not_installed")
    sys.modules[module.__name__] = module
    exec(FAKES, module.__dict__)  # noqa: S102
    del sys.modules[module.__name__]
    yield module
    sys.modules.pop(module.__name__, None)


def optimizer_of(model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def config_of(fakes: types.ModuleType) -> object:
    """A configuration whose parts know what they are part of, as OmegaConf's do."""
    root = fakes.DictConfig({"lr": 1e-3})
    root._content["model"] = fakes.DictConfig({"dim": 4}, root)
    root._content["layers"] = fakes.ListConfig([1, 2, fakes.DictConfig({}, root)], root)
    return root


def extras(fakes: types.ModuleType) -> dict[str, object]:
    """Objects that torch.load(weights_only=True) refuses."""
    return {
        "args": argparse.Namespace(lr=np.float64(1e-3), betas=(0.9, 0.99), path=pathlib.PurePosixPath("/data")),
        "best": np.float32(0.25),
        "seen": np.int64(12),
        "date": datetime.datetime(2025, 5, 1, tzinfo=datetime.UTC),
        "took": datetime.timedelta(hours=3),
        "config": config_of(fakes),
        "arguments": fakes.TrainingArguments(),
        "callback": fakes.Checkpoint(),
        "counts": collections.Counter("abca"),
        "losses": collections.defaultdict(list, {"train": [1.0, 2.0]}),
        "queue": collections.deque([1, 2], maxlen=3),
        "rng": (random.getstate(), np.random.RandomState(0).get_state()),
        "schedule": functools.partial(max, 1),
        "classes": {"optimizer": torch.optim.AdamW, "dtype": torch.float16, "device": torch.device("cpu")},
        "scale": complex(1, 2),
        "shape": torch.Size([2, 3]),
        (1, ("a", 2.5)): {"a key": "that is no name"},
        None: {1, 2},
        2.5: frozenset({3}),
    }


def lightning(model: nn.Module, fakes: types.ModuleType) -> object:
    return {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": model.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5)},
            "x": extras(fakes),
        },
        "optimizer_states": [optimizer_of(model)],
        "lr_schedulers": [{"_last_lr": [np.float64(1e-3)], "base_lrs": [1e-3]}],
        "hparams_name": "kwargs",
        "hyper_parameters": fakes.AttributeDict(extras(fakes)),
        "datamodule": argparse.Namespace(**{"a": 1}),
    }


def deepspeed(model: nn.Module, fakes: types.ModuleType) -> object:
    return {
        "module": model.state_dict(),
        "buffer_names": ["mean"],
        "optimizer": {"optimizer_state_dict": optimizer_of(model), "loss_scaler": fakes.Scaler(torch.ones(1))},
        "param_shapes": [collections.OrderedDict((n, p.shape) for n, p in model.named_parameters())],
        "frozen_param_shapes": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": 100,
        "dp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": 0}, "fp16": fakes.Slots(None)},
        "ds_version": "0.15.1",
        **{str(name): value for name, value in extras(fakes).items()},
    }


def tutorial(model: nn.Module, fakes: types.ModuleType) -> object:
    return {"epoch": 5, "model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer_of(model),
            "loss": np.float64(0.5), **extras(fakes)}  # fmt: skip


def trainer(model: nn.Module, fakes: types.ModuleType) -> object:
    # Its weights are a file of their own, pytorch_model.bin; some scripts put their arguments in.
    state = model.state_dict()
    state["args"] = fakes.TrainingArguments()
    return state


def accelerate(model: nn.Module, fakes: types.ModuleType) -> object:
    return {"model": collections.OrderedDict(model.state_dict()), "step": 7, "optimizers": [optimizer_of(model)],
            "random_states": extras(fakes)["rng"], "scaler": fakes.Scaler(torch.ones(2, 2))}  # fmt: skip


def whole_module(model: nn.Module, fakes: types.ModuleType) -> object:
    return model


def whole_module_inside(model: nn.Module, fakes: types.ModuleType) -> object:
    return {"model": model, "ema": None, "date": "2025", "optimizer": optimizer_of(model), "train_args": extras(fakes)}


def subclass_of_a_dictionary(model: nn.Module, fakes: types.ModuleType) -> object:
    return fakes.AttributeDict(state_dict=fakes.AttributeDict(model.state_dict()), **extras_by_text(fakes))


def extras_by_text(fakes: types.ModuleType) -> dict[str, object]:
    return {str(name): value for name, value in extras(fakes).items()}


LAYOUTS = [
    lightning,
    deepspeed,
    tutorial,
    trainer,
    accelerate,
    whole_module,
    whole_module_inside,
    subclass_of_a_dictionary,
]
Layout = Callable[[nn.Module, types.ModuleType], object]


def save(content: object, path: pathlib.Path, fakes: types.ModuleType, **options: Any) -> None:
    sys.modules[fakes.__name__] = fakes
    torch.save(content, path, **options)
    del sys.modules[fakes.__name__]


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    with open_foreign(path) as arrays:
        return {name: array.read() for name, array in arrays.items()}


@pytest.fixture(params=["zip", "older"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {} if request.param == "zip" else {"_use_new_zipfile_serialization": False}


@pytest.fixture(autouse=True)
def model_is_picklable(monkeypatch: pytest.MonkeyPatch) -> None:
    # This module is not in sys.modules: pytest imports it by path.
    module = types.ModuleType("not_installed_either")
    monkeypatch.setattr(Autoencoder, "__module__", module.__name__)
    module.Autoencoder = Autoencoder
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_names_and_numbers_are_those_of_the_state_dict(tmp_path, fakes, layout, options):
    model = Autoencoder()
    save(layout(model, fakes), tmp_path / "m.ckpt", fakes, **options)
    found = read(tmp_path / "m.ckpt")
    state = model.state_dict()
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert np.array_equal(found[name], tensor.numpy())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["vq", "ema", "gumbel"])
def test_the_codebook_is_that_of_the_state_dict(tmp_path, fakes, make_quantizer, layout, kind):
    model = Autoencoder(make_quantizer(kind))
    source = tmp_path / "m.ckpt"
    save(layout(model, fakes), source, fakes)
    flags = ["--prefix", "quantize", *(["--metric", "l2"] if kind == "vq" else [])]
    assert cli.main(["import", str(source), "-o", str(tmp_path / "o.safetensors"), *flags]) == 0
    assert load_codebook(tmp_path / "o.safetensors").digest == codebook_digest(model.quantize)


def test_the_way_that_was_refused(tmp_path, fakes):
    # With numpy scalars and other objects, torch's own way refuses what is read here.
    for layout in (lightning, deepspeed, tutorial, trainer, whole_module):
        save(layout(Autoencoder(), fakes), tmp_path / "m.ckpt", fakes)
        with pytest.raises(Exception, match="Weights only load failed"):
            torch.load(tmp_path / "m.ckpt", weights_only=True)
        assert read(tmp_path / "m.ckpt")


def test_names_of_an_optimizer_tell_what_they_are(tmp_path, fakes):
    # An average of the weights beside them: the names stay complete.
    model = Autoencoder()
    content = lightning(model, fakes) | {"ema": model.state_dict()}
    save(content, tmp_path / "m.ckpt", fakes)
    names = set(read(tmp_path / "m.ckpt"))
    assert {"state_dict.quantize.weight", "ema.quantize.weight", "optimizer_states.0.state.3.exp_avg"} <= names
    assert "callbacks.ModelCheckpoint{'monitor': 'loss'}.best_model_score" in names


@pytest.mark.parametrize(
    ("around_model", "around_copy"),
    [("module.", ""), ("", "module."), ("_orig_mod.", "module."), ("vqvae.", "ema_model."), ("", "state.module.net.")],
)
def test_names_stay_complete_beside_a_copy_in_other_wrappers(tmp_path, around_model, around_copy):
    path = tmp_path / "last.pt"
    model = {"encoder.w": torch.ones(3, 3), "quantize.embedding.weight": torch.ones(5, 4)}
    content = {
        key: {f"{around}{name}": tensor for name, tensor in model.items()}
        for key, around in (("model", around_model), ("averaged", around_copy))
    }
    torch.save(content, path)
    assert f"averaged.{around_copy}quantize.embedding.weight" in read(path)
    assert f"model.{around_model}quantize.embedding.weight" in read(path)


def test_a_quantizer_beside_the_model_is_not_lost(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"model": {"encoder.w": torch.ones(3, 3)}, "quantizer": {"embedding.weight": torch.ones(5, 4)}}, path)
    assert set(read(path)) == {"model.encoder.w", "quantizer.embedding.weight"}


def test_attributes_of_objects_are_names(tmp_path, fakes):
    content = {"scaler": fakes.Scaler(torch.ones(1)), "slots": fakes.Slots(torch.ones(2)),
               "queue": collections.deque([torch.ones(3)]), "more": collections.defaultdict(list, {"a": torch.ones(4)}),
               "space": argparse.Namespace(a=(torch.ones(5), [torch.ones(6)]))}  # fmt: skip
    save(content, tmp_path / "m.pt", fakes)
    assert {name: len(array) for name, array in read(tmp_path / "m.pt").items()} == {
        "scaler.scale": 1, "slots.tensor": 2, "queue.0": 3, "more.a": 4, "space.a.0": 5, "space.a.1.0": 6
    }  # fmt: skip


def test_tensors_of_other_classes_are_errors_when_they_are_taken(tmp_path, fakes):
    class Wrapped(torch.Tensor):
        pass

    Wrapped.__module__, Wrapped.__qualname__ = fakes.__name__, "Wrapped"
    fakes.Wrapped = Wrapped
    state = {"a": torch.ones(2, 2).as_subclass(Wrapped), "b": torch.zeros(2, 2)}
    save(state, tmp_path / "m.pt", fakes)
    with open_foreign(tmp_path / "m.pt") as arrays:
        assert arrays["b"].read().tolist() == [[0, 0], [0, 0]]
        assert arrays["a"].shape == (2, 2)
        with pytest.raises(
            Exception,
            match=r"m.pt: a is an object of not_installed.Wrapped, .* save tensor.as_subclass\(torch.Tensor\)",
        ):
            arrays["a"].read()
    save({**state, "a": state["a"].as_subclass(torch.Tensor)}, tmp_path / "m.pt", fakes)
    assert read(tmp_path / "m.pt")["a"].tolist() == [[1, 1], [1, 1]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["trace", "freeze"])
def test_programs_have_the_names_of_their_state_dict(tmp_path, how):
    model = Autoencoder().eval()
    del model.scales, model.owner
    source = tmp_path / "m.jit"
    example = torch.ones(1, 3, 2, 2)
    program = torch.jit.trace(model, example)
    program = torch.jit.freeze(program) if how == "freeze" else program
    torch.jit.save(program, str(source))
    expected = torch.jit.load(str(source)).state_dict()
    found = read(source)
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor.numpy())
    assert expected.keys() <= found.keys()
    if how == "freeze":
        assert {name.partition(".")[0] for name in found} == {"CONSTANTS"}
        assert any(np.array_equal(array, model.decoder[1].weight.detach().numpy()) for array in found.values())

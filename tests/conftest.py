"""What every test runs under: one thread, no hub, no network; and the nano model that many share."""

from __future__ import annotations

import os

# Before anything imports torch or transformers: results must not depend on the machine's threads or on a hub.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from open_pisces.config import ModelConfig
    from open_pisces.model.pisces import Pisces

LONGEST = (
    "serve/test_server.py",
    "train/test_distributed.py",
    "test_readme.py",
    "plan/test_plan.py",
    "train/test_train.py",
    "eval/test_judge.py",
    "factory/test_features.py",
    "cli/test_cli_eval.py",
    "bench/test_bench.py",
    "model/test_memory.py",
)
"""Files that take over half a minute: begun first, none of them runs on alone while the other workers are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`LONGEST` first, all others in their order."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


class SocketGuard:
    """Refuses every connection that leaves the machine, and remembers it even if the caller swallows the error."""

    def __init__(self) -> None:
        self.refused: list[Any] = []

    @staticmethod
    def is_local(address: Any) -> bool:
        """Unix sockets and loopback addresses."""
        if not isinstance(address, tuple):
            return True
        host = str(address[0])
        try:
            return ipaddress.ip_address(host.partition("%")[0]).is_loopback
        except ValueError:
            return host in ("localhost", "")

    def check(self, address: Any) -> None:
        """Raise for an address outside the machine."""
        if not self.is_local(address):
            self.refused.append(address)
            raise OSError(f"this test tried to reach {address}; tests stay on this machine")


@pytest.fixture(autouse=True)
def socket_guard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SocketGuard]:
    """Fails a test that tries to leave the machine, unless it is marked ``network``."""
    guard = SocketGuard()
    if request.node.get_closest_marker("network"):
        yield guard
        return
    for name in ("connect", "connect_ex"):
        original = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: Any, original: Any = original) -> Any:
            guard.check(address)
            return original(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)
    look_up = socket.getaddrinfo

    def guarded_look_up(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        guard.check((host or "", port))
        return look_up(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
    yield guard
    assert not guard.refused, f"the test tried to reach {guard.refused}; mark it `network` if it must"


@pytest.fixture(scope="session")
def nano_config() -> ModelConfig:
    """The settings of the nano model."""
    from open_pisces.recipe import load_config

    return load_config("nano/stage1").model


@pytest.fixture(scope="session")
def nano_tokenizer(nano_config: ModelConfig) -> Any:
    """Bytes and the template's special tokens."""
    from open_pisces.data.tokenizer import byte_tokenizer

    return byte_tokenizer(nano_config.template)


@pytest.fixture(scope="session")
def nano_pisces(nano_config: ModelConfig, nano_tokenizer: Any) -> Pisces:
    """A whole nano model, random weights, in evaluation mode. Shared: deepcopy it before changing it."""
    import torch
    from models import build_pisces

    torch.manual_seed(0)
    return build_pisces(nano_config, len(nano_tokenizer)).eval()


@pytest.fixture(scope="session")
def nano_folder(tmp_path_factory: pytest.TempPathFactory, nano_pisces: Pisces, nano_tokenizer: Any) -> Path:
    """That model as a folder with all parts. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("nano") / "model"
    nano_pisces.save_pretrained(folder, nano_tokenizer)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All nano trainings, run in order, once for all workers of pytest-xdist. Shared: nothing may be changed in it."""
    from filelock import FileLock
    from models import costs_counted_once, nano

    from open_pisces.factory.encode import encode
    from open_pisces.recipe import TRAININGS
    from open_pisces.train import loop

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"
    with costs_counted_once(loop):
        with FileLock(f"{folder}.lock"):
            for name in TRAININGS:
                config = nano(folder, name)
                if not loop.is_done(config):  # else another worker has trained it
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setenv("PISCES_DATA", str(folder / "data"))
                        if config.data.features:
                            encode(config)
                        assert loop.train(config) == folder / name
        yield folder

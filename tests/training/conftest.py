"""A model with everything that a resumed run could forget, and a text for it."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from implementations.training.batches import RandomWindows
from implementations.training.guard import exclusive
from implementations.training.settings import TrainingConfig

VOCABULARY = 13


class Tiny(nn.Module):
    """Embedding, norm with a running buffer, dropout, linear: tokens to logits of the next one."""

    def __init__(self, dropout: float = 0.2):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, VOCABULARY)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.head(self.dropout(self.norm(self.embedding(tokens))))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """fsync guards against power cuts, of which there is one test, and costs 10 ms a time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other over 64 numbers: 100 times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny():
    """Makes the same model each time, and leaves torch's generator where it then is."""

    def make(dropout: float = 0.2, seed: int = 3) -> Tiny:
        torch.manual_seed(seed)
        return Tiny(dropout)

    return make


@pytest.fixture
def batches():
    """64 tokens to predict in each batch: a power of two, so dividing by it rounds nothing."""
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(VOCABULARY, (500,), generator=generator)
    return RandomWindows(text, batch=4, length=16, seed=7)


@pytest.fixture
def config():
    """Settings for a short run; overrides by name."""

    def make(**changes) -> TrainingConfig:
        short = {"steps": 20, "warmup": 4, "learning_rate": 0.02, "checkpoint_every": 5}
        return TrainingConfig(**(short | changes))

    return make


@pytest.fixture
def while_held(capsys):
    """Calls something that waits for a folder, lets another work there, and returns its result."""

    def run(folder, call, other):
        with ThreadPoolExecutor(1) as pool:
            with exclusive(folder):
                future, said = pool.submit(call), ""
                while f"waits for another process, which is training in {folder}" not in said:
                    assert not future.done(), future.exception() or "it did not wait"
                    time.sleep(0.01)
                    said += capsys.readouterr().err
                other()
            return future.result()

    return run

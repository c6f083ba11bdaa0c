import torch

from quant_runtime.memory import room


def test_what_torch_holds_and_does_not_use_is_room_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert room(torch.device("cuda")) == 130


def test_of_a_cpu_there_is_no_telling():
    assert room(torch.device("cpu")) is None

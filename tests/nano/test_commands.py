"""nano's commands: what is tried out never touches what is shipped."""

import sys

import pytest
import torch

from kontext_min.nano import __main__ as commands
from kontext_min.presets import WEIGHTS


@pytest.fixture
def called(monkeypatch):
    """Name -> arguments of what a command calls, none of which does anything."""
    found = {}
    for name in ("write_t5", "write_clip", "pretrain_vae", "pretrain_flux", "report", "report_lora", "evaluate"):
        monkeypatch.setattr(commands, name, lambda *arguments, name=name: found.update({name: arguments}))
    yield found
    torch.set_flush_denormal(False)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["nano", *map(str, arguments)])
    commands.main()


def test_a_smoke_test_has_a_folder_of_its_own(called, tmp_path, monkeypatch):
    run(monkeypatch, "pretrain", "--smoke", "--work", tmp_path)
    model = tmp_path / "smoke" / "nano"
    assert called["write_t5"] == (model / "tokenizer_2",) and called["report"] == (model, 4)
    assert called["pretrain_vae"][0] == called["pretrain_flux"][0] == tmp_path / "smoke"
    run(monkeypatch, "pretrain", "--smoke", "--work", tmp_path, "--folder", tmp_path / "mine")
    assert called["pretrain_flux"][2] == called["report"][0] == tmp_path / "mine"
    run(monkeypatch, "pretrain", "--work", tmp_path)
    assert called["pretrain_flux"][0] == tmp_path and called["report"][0] == WEIGHTS / "nano"


def test_some_edits_are_measured_without_writing_over_the_table_of_all(called, monkeypatch):
    run(monkeypatch, "evaluate", "--edits", "sepia", "add")
    assert called == {"evaluate": (WEIGHTS / "nano", ["sepia", "add"], 200)}
    run(monkeypatch, "evaluate")
    assert called.pop("report") == (WEIGHTS / "nano", 200)

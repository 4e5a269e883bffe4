"""Fixtures for all tests: the tiny Kontext that stands for the published files."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test talks to the network

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


@pytest.fixture(scope="session")
def kontext(tmp_path_factory):
    """Folder of a tiny Kontext in diffusers' layout. Read only: tests that change files copy it first."""
    return tiny.write_kontext(tmp_path_factory.mktemp("models") / "kontext")


@pytest.fixture(scope="session")
def single_files(kontext):
    """The same model as a folder of single files. Read only."""
    return tiny.write_single_files(kontext, kontext.parent / "single")

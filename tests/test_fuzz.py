"""A hundred damaged and crafted files of each kind: all are used, or refused in one line."""

import os

import pytest
from helpers import start


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each case is a process of its own by os.fork")
def test_no_damaged_or_crafted_file_does_harm():
    process = start("tests.fuzz", "--cases", 100)
    found, errors = process.communicate(timeout=600)
    assert process.returncode == 0, found + errors
    assert found.count("| 100 |") >= 6  # all cases of each family were tried


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each case is a process of its own by os.fork")
def test_one_case_can_be_tried_again():
    process = start("tests.fuzz", "--only", "cifar:0")
    found, errors = process.communicate(timeout=600)
    assert process.returncode == 0, found + errors
    assert '"case": "cifar:0"' in found and "md5 differs" in found

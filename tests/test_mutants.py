"""The list of tests/mutants.py stays in step with the sources; the faults themselves take minutes and are run by hand."""

import re

from mutants import FAULTS, ROOT


def test_every_fault_has_its_line_and_its_test():
    for fault in FAULTS:
        assert (ROOT / fault.file).read_text().count(fault.right) == 1, fault
        file, _, name = fault.test.partition("::")
        text = (ROOT / "tests" / file).read_text()
        if "from tile_contract import *" in text:
            text += (ROOT / "tests" / "tile_contract.py").read_text()
        assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), fault
    assert len({fault.what for fault in FAULTS}) == len(FAULTS) >= 20

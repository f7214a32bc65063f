"""The README's Python and the examples run and give what they say; links into the project lead somewhere."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_kda
from problems import error

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md"] + sorted((ROOT / "docs").glob("*.md"))


def test_readme_examples():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    torch.manual_seed(0)
    names = {}
    for block in blocks:
        if "import chunk_kda" not in block:  # that one needs flash-linear-attention, and has tests of its own
            exec(block, names)
    x = [names[name] for name in ("q", "k", "v", "g", "beta")]
    gate = (names["K"] ** -0.5, names["A_log"], names["dt_bias"], -5.0)
    want, want_state = flash_kda.reference(*x, *gate)
    for got in ("out", "streamed"):
        assert error(names[got], want) < 5.5e-3
    for got in ("state", "carried"):
        assert error(names[got], want_state) < 4e-3
    want, want_state = flash_kda.reference(*names["packed"], *gate, cu_seqlens=names["cu_seqlens"])
    assert error(names["packed_out"], want) < 5.5e-3
    assert error(names["packed_state"], want_state) < 4e-3


@pytest.mark.parametrize("name", ["direct.py", "packed.py", "streaming.py", "run.py"])
def test_examples(name, tmp_path):
    """Each prints errors or differences, which are those of bf16 outputs at most. with_fla.py needs flash-linear-attention: see test_fla.py."""
    text = tmp_path / "text"
    text.write_text("Some lines.\n\nA second paragraph,\nand more of it.\n", encoding="utf-8")
    done = subprocess.run([sys.executable, str(ROOT / "examples" / name)] + [str(text)] * (name == "run.py"), cwd=str(tmp_path),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 0, done.stdout
    found = [float(number) for number in re.findall(r"\b\d\.\de[+-]\d\d\b", done.stdout)]
    assert found and max(found) < 2e-2, done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#\s]+)\)", document.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert not missing

"""The console script as an extension of the `hf` command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from huggingface_hub.cli.extensions import ExtensionManifest

SCRIPT = shutil.which("hf-fda", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(SCRIPT is None, reason="the package is not installed, so there is no console script")
def test_hf_runs_the_console_script(tmp_path: Path) -> None:
    assert SCRIPT is not None
    manifest = ExtensionManifest(
        owner="org",
        repo="hf-fda",
        repo_id="org/hf-fda",
        short_name="fda",
        executable_path=SCRIPT,
        type="python",
        installed_at=datetime.now(UTC),
    )
    manifest.save(tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-fda")
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def hf(*words: str) -> subprocess.CompletedProcess[str]:
        program = str(Path(SCRIPT or "").with_name("hf"))
        return subprocess.run([program, *words], env=environment, capture_output=True, text=True, timeout=120)

    found = hf("fda", "methods", "ties")
    assert found.returncode == 0
    assert "density" in found.stdout
    refused = hf("fda", "methods", "tie")
    assert refused.returncode == 2
    assert "ties" in refused.stderr

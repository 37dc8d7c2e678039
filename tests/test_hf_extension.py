"""The console script as an extension of the `hf` command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub.cli.extensions import ExtensionManifest

SCRIPTS = str(Path(sys.executable).parent)


def test_hf_runs_the_console_script(tmp_path: Path) -> None:
    script, program = shutil.which("hf-fda", path=SCRIPTS), shutil.which("hf", path=SCRIPTS)
    assert script and program, "the tests run where the package is installed"
    manifest = ExtensionManifest(
        owner="org",
        repo="hf-fda",
        repo_id="org/hf-fda",
        short_name="fda",
        executable_path=script,
        type="python",
        installed_at=datetime.now(UTC),
    )
    manifest.save(tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-fda")
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def hf(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *words], env=environment, capture_output=True, text=True, timeout=120)

    found = hf("fda", "methods", "ties")
    assert found.returncode == 0
    assert "density" in found.stdout
    refused = hf("fda", "methods", "tie")
    assert refused.returncode == 2
    assert "ties" in refused.stderr

